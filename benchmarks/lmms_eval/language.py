"""A text-only language model for those of lmms-eval's tasks that show no image."""

from collections.abc import Iterator

from lmms_eval.api.model import lmms
from PIL import Image

from vlm_prune.benchmarks.evaluation.language import Language
from vlm_prune.benchmarks.lmms_eval.answers import TEXT_PHASE, StoredAnswer, answered
from vlm_prune.benchmarks.lmms_eval.forced import Forced
from vlm_prune.benchmarks.lmms_eval.model import Ask, PrunedChat
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.timing import now


class LanguageChat(PrunedChat):
    """Answers with a `Language` in place of a vision-language model.

    Args:
        name: a checkpoint folder or a hub name.
        batch_size: prompts per forward pass.
        device: a torch device.
        dtype: float32, bfloat16, float16, or auto.

    Raises:
        InputError: if the model cannot be loaded; later, for each task that shows images.
    """

    def __init__(self, name: str, batch_size: int, device: str, dtype: str) -> None:
        lmms.__init__(self)
        self.batch_size = batch_size
        self.language = Language(name, self._place(device), dtype)
        self.model = self.language.model
        self.pruner = self.journal = None
        self.keep_loaded = True
        self.tick = lambda answered: None

    def check_image(self, image: Image.Image) -> None:
        """Accepts every image: whole tasks that show images are refused."""

    def _render(self, batch: list[Ask]) -> list[str]:
        for kind in ("image", "video"):
            if any(ask.chat.shows(kind) for ask in batch):
                raise InputError(f"it shows {kind}s, and this model reads text alone")
        return [self.language.render(ask.chat.messages()) for ask in batch]

    def _answer(self, batch: list[Ask]) -> Iterator[StoredAnswer]:
        texts, options, forced = self._render(batch), dict(batch[0].options), None
        if batch[0].forced is not None:
            wanted = [str(ask.forced) for ask in batch]
            forced = Forced.of(self.language.tokenizer, texts, wanted, self.device)
            options = forced.options()
        start = now(self.device)
        tokens, lengths = self.language.generate(texts, **options)
        milliseconds = 1e3 * (now(self.device) - start) / len(batch)
        replies = self.language.replies(tokens)
        for number, ask in enumerate(batch):
            row = StoredAnswer(
                **answered(ask, texts[number], replies[number]),
                images=0,
                text_tokens=lengths[number],
                input_tokens=lengths[number],
                output_tokens=int((tokens[number] != self.language.tokenizer.pad_token_id).sum()),
                time_ms={TEXT_PHASE: milliseconds},
            )
            yield row if forced is None else forced.scored(row, number)
