"""lmms-eval's tasks answered by vLLM, into the rows that the Hugging Face model gives."""

from collections.abc import Iterator

import msgspec
import torch

from vlm_prune.benchmarks.evaluation.prompts import make_prompts
from vlm_prune.benchmarks.evaluation.records import RunConfig
from vlm_prune.benchmarks.evaluation.served import (
    UNPRUNED,
    ServedEngines,
    phases,
    sizes_alone,
)
from vlm_prune.benchmarks.lmms_eval.answers import StoredAnswer, answered
from vlm_prune.benchmarks.lmms_eval.model import Ask, PrunedChat
from vlm_prune.vlm.common.errors import InputError

IMAGES = 16  # the most that a prompt may have


class ServedChat(PrunedChat):
    """The model of `eval --engine vllm`; it counts tokens and operations on the Hugging Face model.

    Args:
        config: of the run.

    Raises:
        InputError: if several processes share the work, or the model cannot be used.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__(
            config.model, "none", batch_size=config.batch_size, device=config.device,
            dtype=config.dtype, seed=config.seed,
        )  # fmt: skip
        if self.world_size > 1:
            raise InputError(
                "--engine vllm runs in one process, and vLLM uses the GPUs; leave out launch"
            )
        self.config = config
        self.engines = ServedEngines(config)

    def close(self) -> None:
        """Stops vLLM's engines, so that their memory is free."""
        self.engines.close()

    @torch.inference_mode()
    def _answer(self, batch: list[Ask]) -> Iterator[StoredAnswer]:
        options = dict(batch[0].options)
        if batch[0].forced is not None:
            raise InputError("tasks that score given answers need --engine hf")
        if options.pop("num_beams", 1) > 1:
            raise InputError("vLLM does not search with beams here; use --engine hf")
        new_tokens = options.pop("max_new_tokens")
        if not options.pop("do_sample"):
            options = {}
        engine = self.engines.engine(
            UNPRUNED if self.pruner is None else self.config.variant, IMAGES
        )
        if any(ask.chat.videos() for ask in batch):
            raise InputError("videos are not answered by vLLM here; use --engine hf")
        images = [ask.chat.images() for ask in batch]
        outputs = engine.complete(
            [ask.chat.messages() for ask in batch], images, new_tokens, **options
        )
        texts = self._render(batch)
        with sizes_alone(self.model):
            prompts = make_prompts(self.model, self.processor, texts, images)
        if self.pruner is None:
            engine.check(outputs, prompts)
        trace = engine.trace(outputs, images, self.model)
        prefill, decode = phases(outputs)
        times = {"vision": 0.0, "selection": 0.0, "prefill": prefill, "decode": decode}
        for number, (ask, output) in enumerate(zip(batch, outputs, strict=True)):
            answer = output.outputs[0]
            yield StoredAnswer(
                **answered(ask, texts[number], answer.text),
                **msgspec.structs.asdict(prompts.record(number, trace)),
                input_tokens=int(prompts.tensors["attention_mask"][number].sum()),
                output_tokens=len(answer.token_ids),
                time_ms=times,
            )
