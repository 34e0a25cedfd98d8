"""The lmms-eval model: every supported family, pruned, in batches."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from vlm_prune.benchmarks.evaluation.prompts import make_prompts
from vlm_prune.benchmarks.evaluation.records import Variant
from vlm_prune.benchmarks.evaluation.timing import timed_generate
from vlm_prune.benchmarks.lmms_eval.answers import Answers, StoredAnswer, answered, fingerprint
from vlm_prune.benchmarks.lmms_eval.chat import Chat, chat_of, rounds_of, shared_options, stops_of
from vlm_prune.benchmarks.lmms_eval.forced import Forced
from vlm_prune.benchmarks.lmms_eval.throughput import log_throughput
from vlm_prune.learners import from_pretrained
from vlm_prune.vlm.chat import check_takes_videos, render, rows_encoded_together
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.video import FRAMES, VideoClip, check_rate, open_video
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.load import load

PADDING = "padding"


@dataclass(frozen=True)
class Ask:
    """One question to the model: its row's id, the conversation, and `generate`'s arguments.

    With `forced` the text is not answered but scored.
    """

    id: str
    chat: Chat
    options: dict[str, Any]
    until: tuple[str, ...] = ()
    forced: str | None = None


class PrunedChat(lmms):  # type: ignore[misc]
    """A pruned model for `lmms-eval --model vlm_prune`.

    Args:
        pretrained: `tiny` or `smol` (embedded), a checkpoint folder, or a hub name.
        method: a registered pruner, `none` for the unpruned model.
        budget: image tokens kept per image, or a fraction of them in (0, 1].
        batch_size: questions answered together.
        device: a torch device; the first GPU where there is one unless given.
        dtype: float32, bfloat16, float16, or auto.
        positions: positions of kept tokens: auto, contiguous, original.
        seed: for methods that draw random numbers.
        wings: folder or hub name of a Wings adapter.
        frames: of a video, at most.
        hyperparameters: the method's own.

    `throughput` of the results then holds `avg_kept_visual_tokens`, `avg_layer_visual_tokens` (the
    mean over decoder layers), `avg_papers_visual_tokens` (as the method's paper counts, where there
    is one), `avg_visual_tokens` (unpruned), per image, and `avg_vision_ms`, `avg_selection_ms`,
    `avg_prefill_ms`, `avg_decode_ms`, `avg_first_token_ms` (of the first three), per question, and
    `avg_tower_share`, that of vision in the latter: one over the share of `method=none` is the most that a
    cut behind the tower can make of the first token.

    `loglikelihood` returns the negative log-likelihood, a sum over tokens, because lmms-eval takes
    the smallest value for the best choice.

    Raises:
        InputError: if the model, the method or one of its hyperparameters cannot be used.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "tiny",
        method: str = "zoo",
        budget: float = 64,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        positions: str = "auto",
        seed: int = 0,
        wings: str | None = None,
        frames: int = FRAMES,
        **hyperparameters: Any,
    ) -> None:
        super().__init__()
        check_rate(frames, None)
        self.batch_size, self.frames = questions_at_once(batch_size), frames
        variant = Variant(method, budget, positions, hyperparameters)
        self.pruner: Any | None = variant.build(seed)
        self.model, self.processor = load(pretrained, self._place(device), dtype)
        if wings is not None:
            from_pretrained(self.model, wings)
        self.pruner.admit(self.model)
        self.pruner = self.pruner.prepared(self.model, self.processor)
        self.journal: Answers | None = None
        self.keep_loaded = False
        self.tick: Callable[[int], None] = lambda answered: None

    def _place(self, device: str | None) -> str:
        """Returns the device of this process; processes come from `accelerate launch`."""
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        if device is None or self._world_size > 1:
            return str(self.accelerator.device)
        return device

    def check_image(self, image: Image.Image) -> None:
        """Raises `InputError` for an image that the model does not take."""
        family_of(self.model).check_size(self.processor.image_processor, *image.size)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def clean(self) -> None:
        """Frees the model after a run, unless more runs follow."""
        if not self.keep_loaded:
            super().clean()

    def close(self) -> None:
        """Ends what answers beside the model: nothing here."""

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Returns answers with their token counts, in order."""
        asks, names = [], Counter[str]()
        for request in requests:
            chat, options = chat_of(request, self.task_dict)
            until = stops_of(options) if self.is_simple else ()
            asks.append(Ask(_name(request, names), chat, shared_options(options), until))
        return [_result(row, row.reply) for row in self._rows(asks)]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Returns for each request its answers round by round; each
        round's question sees those before.
        """
        names = Counter[str]()
        talks = [rounds_of(request, self.task_dict) for request in requests]
        ids = [_name(request, names) for request in requests]
        answers: list[list[str]] = [[] for _ in requests]
        unfinished = list(range(len(requests)))
        number = 0
        while unfinished:
            asks, indices = [], []
            for index in unfinished:
                chat = talks[index].ask(number, answers[index])
                if chat is not None:
                    options = talks[index].options
                    until = stops_of(options) if self.is_simple else ()
                    name = f"{ids[index]}/round{number}"
                    asks.append(Ask(name, chat, shared_options(options), until))
                    indices.append(index)
            for index, row in zip(indices, self._rows(asks), strict=True):
                answers[index].append(row.reply)
            unfinished, number = indices, number + 1
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Returns the negative log-likelihood of each continuation, and
        whether it is the greedy answer.

        lmms-eval 0.7.3 would turn bare pairs into strings.
        """
        asks, names = [], Counter[str]()
        for request in requests:
            chat, continuation = chat_of(request, self.task_dict)
            asks.append(Ask(_name(request, names), chat, {}, forced=continuation))
        rows = self._rows(asks)
        return [_result(row, (row.nll, row.greedy)) for row in rows]

    def _rows(self, asks: list[Ask]) -> list[StoredAnswer]:
        """Returns one row for each question; those of the journal are not computed again.

        Batches are fixed slices of questions with the same generation arguments.
        """
        groups: dict[str, list[Ask]] = {}
        for ask in asks:
            key = "forced" if ask.forced is not None else repr(sorted(ask.options.items()))
            groups.setdefault(key, []).append(ask)
        done: dict[str, StoredAnswer] = {}
        bar = tqdm(total=len(asks), disable=self.rank != 0 or self.keep_loaded, desc="answering")
        computed: list[StoredAnswer] = []
        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                rows = self._known(batch)
                if rows is None:
                    rows = list(self._answer(batch))
                    computed += rows
                    if self.journal is not None:
                        self.journal.append(rows)
                done |= {ask.id: row for ask, row in zip(batch, rows, strict=True)}
                bar.update(len(batch))
                self.tick(len(batch))
        bar.close()
        log_throughput(computed, self.pruner, self.device)
        return [done[ask.id] for ask in asks]

    def _known(self, batch: list[Ask]) -> list[StoredAnswer] | None:
        """Returns the batch's rows, if the journal has all of them for these very questions."""
        if self.journal is None:
            return None
        rows = [self.journal.rows.get(ask.id) for ask in batch]
        texts = self._render(batch)
        for ask, row, text in zip(batch, rows, texts, strict=True):
            if row is None or row.question_hash != fingerprint(ask, text):
                return None
        return [row for row in rows if row is not None]

    def _render(self, batch: list[Ask]) -> list[str]:
        messages = [ask.chat.messages() for ask in batch]
        return [render(self.processor, each, add_generation_prompt=True) for each in messages]

    def _answer(self, batch: list[Ask]) -> Iterator[StoredAnswer]:
        names = [ask.chat.videos() for ask in batch]
        if any(names):
            check_takes_videos(family_of(self.model), self.processor)
        clips = [[open_video(name, self.frames) for name in row] for row in names]
        rows: dict[int, StoredAnswer] = {}
        for group in rows_encoded_together(self.processor, clips):
            own = self._answer_group([batch[n] for n in group], [clips[n] for n in group])
            rows |= zip(group, own, strict=True)
        return (rows[number] for number in range(len(batch)))

    @torch.inference_mode()
    def _answer_group(
        self, batch: list[Ask], clips: list[list[VideoClip]]
    ) -> Iterator[StoredAnswer]:
        texts, images = self._render(batch), [ask.chat.images() for ask in batch]
        prompts = make_prompts(self.model, self.processor, texts, images, clips)
        options, forced = dict(batch[0].options), None
        if batch[0].forced is not None:
            wanted = [str(ask.forced) for ask in batch]
            forced = Forced.of(self.processor, texts, wanted, self.device)
            options = forced.options()
        new, phases, trace = timed_generate(self.model, prompts, self.pruner, **options)
        replies = self.processor.batch_decode(new, skip_special_tokens=True)
        times = {
            "vision": phases.vision or prompts.vision_s,
            "selection": phases.selection,
            "prefill": phases.prefill,
            "decode": phases.decode,
        }
        ends = self.model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends or []
        for number, ask in enumerate(batch):
            row = StoredAnswer(
                **answered(ask, texts[number], replies[number]),
                **msgspec.structs.asdict(prompts.record(number, trace)),
                input_tokens=int(prompts.tensors["attention_mask"][number].sum()),
                output_tokens=_length(new[number].tolist(), ends),
                time_ms={key: 1e3 * value / len(batch) for key, value in times.items()},
            )
            yield row if forced is None else forced.scored(row, number)


class PrunedSimple(PrunedChat):
    """The same model for tasks that lmms-eval gives to simple-mode models: `--force_simple`."""

    is_simple = True


def questions_at_once(batch_size: int | str) -> int:
    """Reads a batch size as lmms-eval passes it.

    Raises:
        InputError: if it is no number from 1; sizes that lmms-eval would find out are not offered.
    """
    if not str(batch_size).strip().isdecimal() or int(batch_size) < 1:
        raise InputError(f"batch_size {batch_size!r} is not a number of questions; give 1 or 8")
    return int(batch_size)


def _result(row: StoredAnswer, answer: Any) -> GenerationResult:
    counts = TokenCounts(input_tokens=row.input_tokens, output_tokens=row.output_tokens)
    return GenerationResult(answer, counts)


def _name(request: Instance, names: Counter[str]) -> str:
    """Returns task, document, and which of the document's requests this is.

    Processes with fewer documents than others are given one again, as padding.
    """
    key = f"{request.task_name}/{int(request.doc_id):06d}"
    if request.metadata.get("__padding_only__"):
        key = f"{key}/{PADDING}"
    names[key] += 1
    return key if names[key] == 1 else f"{key}/{names[key] - 1}"


def _length(tokens: list[int], ends: list[int]) -> int:
    """Returns the number of tokens up to and with the first end of sequence."""
    for number, token in enumerate(tokens):
        if token in ends:
            return number + 1
    return len(tokens)
