"""`eval` through vLLM: the questions and rows of `eval`, answered by two engines in turn.

vLLM says how many image tokens a prompt has, and not which: `kept` is empty. A prefill holds tower and
selection, of which it gives no times of their own. Tokens and operations of unpruned images are counted
on the Hugging Face model from their sizes: the layers of its tower do not run.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

from PIL.Image import Image
from torch import Tensor

from vlm_prune.benchmarks.evaluation.engine import (
    evaluate,
    most_new_tokens,
    paired_row,
    prompts_of,
    samples_of,
)
from vlm_prune.benchmarks.evaluation.prompts import Prompts
from vlm_prune.benchmarks.evaluation.records import (
    PairedRow,
    PairedTimes,
    Results,
    RunConfig,
    Variant,
)
from vlm_prune.benchmarks.evaluation.store import RunFolder
from vlm_prune.benchmarks.tasks import Sample
from vlm_prune.vlm.budget import even_shares
from vlm_prune.vlm.chat import Messages
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.load import EMBEDDED
from vlm_prune.vlm.serving.server import check_served, engine_errors
from vlm_prune.vlm.serving.settings import Settings, memory_share
from vlm_prune.vlm.trace import Trace

UNPRUNED = Variant("none", 1.0)


def settings_of(model: str, variant: Variant, seed: int = 0) -> Settings:
    """Returns the settings of an engine that keeps what the variant keeps.

    Args:
        model: `tiny`, `smol`, a checkpoint folder, or a hub name.
        variant: the method.
        seed: of the method.

    Raises:
        InputError: if vLLM is missing, or cannot serve the model so.
    """
    settings = Settings.read(
        {
            "method": variant.method, "budget": variant.budget, "seed": seed,
            "arguments": variant.with_positions,
        }
    )  # fmt: skip
    check_served(model, settings)
    return settings


def image_token_of(config: Any) -> int:
    """Returns the number of the image token, which a model's configuration has under one of two names."""
    token: int = getattr(config, "image_token_id", None) or config.image_token_index
    return token


class ServedVLM:
    """An engine of vLLM with the plug-in.

    Args:
        model: `tiny`, `smol`, a checkpoint folder, or a hub name.
        variant: the method.
        device: `cpu`, or the kind of GPU.
        dtype: as for `load`.
        images: the most that a prompt has.
        seed: of the method and of vLLM.
        share: of the device's memory; vLLM's own default unless given.
        options: of vLLM's `LLM`.

    Raises:
        InputError: if vLLM is missing, or the engine does not start.
    """

    def __init__(
        self,
        model: str,
        variant: Variant,
        device: str,
        dtype: str,
        images: int = 1,
        seed: int = 0,
        share: float | None = None,
        **options: Any,
    ) -> None:
        settings = settings_of(model, variant, seed)
        from vllm import LLM

        with engine_errors("vLLM does not start"):
            self.llm = LLM(
                str(EMBEDDED.get(model, model)),
                **settings.engine_options(dtype, device == "cpu", images, share),
                seed=seed,
                **options,
            )
        self.image_token = image_token_of(self.llm.llm_engine.model_config.hf_config)

    def complete(
        self,
        chats: Sequence[Messages],
        images: Sequence[Sequence[Image]],
        max_new_tokens: int | None = None,
        **sampling: Any,
    ) -> list[Any]:
        """Returns vLLM's outputs for conversations, answered greedily unless `sampling` says otherwise.

        Args:
            chats: in the format of `transformers`, whose images are only mentioned.
            images: of each, in their order.
            max_new_tokens: of each answer; the model's own unless given.
            sampling: `temperature`, `top_p` and `top_k`.
        """
        params = self.llm.get_default_sampling_params()
        params.temperature = 0.0
        for name, value in sampling.items():
            setattr(params, name, value)
        if max_new_tokens is not None:
            params.max_tokens = max_new_tokens
        shown = [_with_images(*both) for both in zip(chats, images, strict=True)]
        return list(self.llm.chat(shown, params, use_tqdm=False))

    def image_tokens(self, output: Any) -> int:
        """Returns how many tokens the images have in a prompt that vLLM has answered."""
        return list(output.prompt_token_ids).count(self.image_token)

    def check(self, outputs: Sequence[Any], prompts: Prompts) -> None:
        """Raises `InputError` unless images have as many tokens in vLLM's unpruned prompts as in ours.

        Args:
            outputs: of `complete`.
            prompts: of the same questions.
        """
        whole = sum(map(self.image_tokens, outputs))
        if prompts.vision is not None and whole != sum(prompts.vision.counts):
            raise InputError(
                f"the images of a batch have {whole} tokens in vLLM and {sum(prompts.vision.counts)} "
                "in transformers; their processors differ"
            )

    def trace(self, outputs: Sequence[Any], images: Sequence[Sequence[Image]], model: Any) -> Trace:
        """Returns how many image tokens each layer computed.

        Args:
            outputs: of `complete`.
            images: of each prompt, whose tokens they share: what is reported of them is their mean.
            model: the Hugging Face model of the checkpoint.
        """
        counts = [
            count
            for output, shown in zip(outputs, images, strict=True)
            for count in even_shares(self.image_tokens(output), len(shown))
        ]
        return Trace(computed=[counts] * model.config.get_text_config().num_hidden_layers)


def evaluate_served(
    model: Any,
    processor: Any,
    folder: RunFolder[PairedRow],
    progress: Callable[[int], None] = lambda done: None,
) -> list[Results]:
    """Fills the folder of a run, and returns its results.

    Args:
        model: the Hugging Face model of the checkpoint that vLLM serves.
        processor: the model's.
        folder: of the run.
        progress: called with the number of questions done.

    Raises:
        InputError: as for `evaluate`, and if vLLM cannot run the model or the method.
    """
    pair = ServedPair(model, processor, folder)
    try:
        return evaluate(model, processor, [folder], progress, pair)
    finally:
        pair.close()


class ServedEngines:
    """The unpruned and the pruned engine of a run, each started when it has something to answer.

    Args:
        config: of the run.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.share = memory_share(2)
        self.started: dict[str, ServedVLM] = {}

    def engine(self, variant: Variant, images: int) -> ServedVLM:
        """Returns the engine of a variant.

        Args:
            variant: the method.
            images: the most that a prompt has.
        """
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        config = self.config
        if variant.method not in self.started:
            self.started[variant.method] = ServedVLM(
                config.model, variant, config.device, config.dtype, images,
                seed=config.seed, max_num_seqs=config.batch_size,
                share=self.share, disable_log_stats=False, enable_prefix_caching=False,
                mm_processor_cache_gb=0,
            )  # fmt: skip
        return self.started[variant.method]

    def close(self) -> None:
        """Stops vLLM's engines, so that their memory is free."""
        with ExitStack() as stack:
            for engine in self.started.values():
                stack.callback(engine.llm.llm_engine.engine_core.shutdown)
        self.started = {}


class ServedPair:
    """Answers a run's embedded tasks with an unpruned and a pruned engine.

    Args:
        model: the Hugging Face model of the checkpoint.
        processor: the model's.
        folder: of the run.
    """

    def __init__(self, model: Any, processor: Any, folder: RunFolder[PairedRow]) -> None:
        self.model, self.processor, self.config = model, processor, folder.config
        self.engines = ServedEngines(folder.config)

    @cached_property
    def images(self) -> int:
        """Returns the most images that a question has."""
        config = self.config
        samples = samples_of(config.tasks, config.limit, config.seed, config.split, config.frames)
        return max([1, *(len(sample.images) for sample in samples)])

    def close(self) -> None:
        """Stops vLLM's engines, so that their memory is free."""
        self.engines.close()

    def __call__(self, batch: list[Sample], pruners: list[Any]) -> Iterator[list[PairedRow]]:
        """Yields the rows of a batch, for the run's one method."""
        unpruned, pruned = (
            self.engines.engine(variant, self.images) for variant in (UNPRUNED, self.config.variant)
        )
        chats, shown = [s.messages() for s in batch], [s.images for s in batch]
        before, after = (
            engine.complete(chats, shown, most_new_tokens(batch)) for engine in (unpruned, pruned)
        )
        with sizes_alone(self.model):
            prompts = prompts_of(self.model, self.processor, batch)
        unpruned.check(before, prompts)
        trace = pruned.trace(after, shown, self.model)
        (prefill, decode), (baseline_prefill, baseline_decode) = (
            phases(outputs) for outputs in (after, before)
        )
        times = PairedTimes(
            vision=0.0, selection=0.0, prefill=prefill, decode=decode, baseline_vision=0.0,
            baseline_prefill=baseline_prefill, baseline_decode=baseline_decode,
        )  # fmt: skip
        baseline, ours = (
            [output.outputs[0].text.strip() for output in outputs] for outputs in (before, after)
        )
        yield [
            paired_row(self.model, sample, prompts.record(number, trace), one, other, times)
            for number, (sample, one, other) in enumerate(zip(batch, baseline, ours, strict=True))
        ]


@contextmanager
def sizes_alone(model: Any) -> Iterator[None]:
    """Keeps the layers of a model's vision tower from computing inside the block: they give what they get.

    How many tokens images have, in what grid and for what operations, is as without it: it depends on
    their sizes alone. Features mean nothing.

    Args:
        model: of a supported family.
    """
    layers = list(family_of(model).tower_layers)
    for layer in layers:
        layer.forward = _first_argument
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _first_argument(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def phases(outputs: Sequence[Any]) -> tuple[float, float]:
    """Returns milliseconds of a question of a batch that vLLM has answered, until
    the last first token and after it.

    Both are a share of the batch's.
    """
    stats = [output.metrics for output in outputs]
    first = max(request.first_token_ts for request in stats)
    prefill = first - min(request.scheduled_ts for request in stats)
    decode = max(request.last_token_ts for request in stats) - first
    return 1e3 * prefill / len(stats), 1e3 * decode / len(stats)


def _with_images(chat: Messages, images: Sequence[Image]) -> Messages:
    """Returns a conversation that holds its images."""
    left = iter(images)
    return [
        message
        | {
            "content": [
                {"type": "image_pil", "image_pil": next(left)} if part["type"] == "image" else part
                for part in message["content"]
            ]
        }
        for message in chat
    ]
