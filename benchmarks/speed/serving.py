"""Requests per second and time to the first token of vLLM, pruned and unpruned in turn.

Both answer one fixed list of requests, each with an image of its own, a question and as many answer
tokens, on random weights. So many requests are under way at a time; when one ends the next begins.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypedDict

from vlm_prune.benchmarks.evaluation.environment import environment
from vlm_prune.benchmarks.evaluation.records import (
    SCHEMA_VERSION,
    Amount,
    Argument,
    Count,
    Record,
)
from vlm_prune.benchmarks.speed.bench import shorten
from vlm_prune.benchmarks.speed.shapes import SHAPES
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.serving.plugin import check_installed, check_model
from vlm_prune.vlm.serving.server import engine_errors
from vlm_prune.vlm.serving.settings import Settings, memory_share
from vlm_prune.vlm.tiny import checkpoint_path

if TYPE_CHECKING:
    from PIL.Image import Image

ARMS = ("unpruned", "pruned")
PATIENCE_S = 10.0


@dataclass(frozen=True)
class ServingConfig:
    """What is measured.

    Args:
        shape: name of an architecture of the LLaVA-1.5 family.
        method: keeps tokens in the pruned arm.
        budget: tokens per image, or a fraction.
        requests: answered at each concurrency.
        concurrency: how many requests are under way at a time, each in turn.
        new_tokens: answered per request.
        text: tokens of a prompt besides its image's.
        repeats: how often each arm is measured.
        dtype: of weights and activations.
        layers: decoder layers, the shape's own unless given.
        arguments: further hyperparameters of the method.
    """

    shape: str
    method: str
    budget: int | float
    requests: int = 32
    concurrency: tuple[int, ...] = (1, 4, 16)
    new_tokens: int = 16
    text: int = 60
    repeats: int = 2
    dtype: str = "float32"
    layers: int | None = None
    arguments: dict[str, Argument] | None = None

    @property
    def settings(self) -> Settings:
        return Settings(self.method, self.budget, arguments=self.arguments or {})


@dataclass(frozen=True)
class Load:
    """One arm's answers to the list at one concurrency, once.

    Args:
        concurrency: requests under way at a time.
        seconds: from the first request to the last answer.
        requests: answered.
        first_token_s: of each request, from when it was handed over.
        prompt_tokens: of a request, as the language model got it.
    """

    concurrency: int
    seconds: float
    requests: int
    first_token_s: list[float]
    prompt_tokens: int


class ServedLoad(Record, frozen=True):
    """Of one arm at one concurrency the medians over `runs`.

    Args:
        concurrency: requests under way at a time.
        requests_per_s: answered.
        first_token_s: from when a request was handed over.
        prompt_tokens: of a request, as the language model got it.
        runs: each time that the list was answered.
    """

    concurrency: Count
    requests_per_s: Amount
    first_token_s: Amount
    prompt_tokens: Count
    runs: list[Load]


class ServingSpeedup(Record, frozen=True):
    """What pruning gains at one concurrency: pruned over unpruned requests per second, and of the
    times to the first token.
    """

    concurrency: Count
    requests_per_s: Amount
    first_token: Amount


class ServingResults(Record, tag_field="schema_version", tag=SCHEMA_VERSION, frozen=True):
    """`bench.json` of `bench --engine vllm`; lists are in the order of the concurrencies.

    Args:
        config: what was measured.
        environment: device, driver, versions and command.
        unpruned: the model as it is.
        pruned: the model with the method.
        speedup: of the two.
    """

    config: ServingConfig
    environment: dict[str, str]
    unpruned: list[ServedLoad]
    pruned: list[ServedLoad]
    speedup: list[ServingSpeedup]


def bench_serving(config: ServingConfig) -> ServingResults:
    """Measures both arms, each in a process of its own, in turn.

    Raises:
        InputError: if vLLM is not there, or cannot run the shape or the method.
    """
    import torch

    check_installed()
    Settings.read(config.settings.as_dict())
    architecture = SHAPES[config.shape]()
    if architecture.model_type != "llava":
        known = [name for name, make in SHAPES.items() if make().model_type == "llava"]
        raise InputError(f"the engine vllm measures shapes of LLaVA-1.5: {', '.join(known)}")
    check_model(architecture, config.settings)
    runs: dict[str, list[Load]] = {arm: [] for arm in ARMS}
    with TemporaryDirectory(prefix="vlm-prune-") as name, ExitStack() as stack:
        _write_model(config, architecture, Path(name))
        share = memory_share(len(ARMS))
        arms = {arm: stack.enter_context(_started(config, arm, name, share)) for arm in ARMS}
        for _ in range(config.repeats):
            for concurrency in config.concurrency:
                for arm, serve in arms.items():
                    runs[arm].append(serve(concurrency))
    summaries = {arm: _summary(config, loads) for arm, loads in runs.items()}
    return ServingResults(
        config=config,
        environment=environment(torch.device("cpu" if not torch.cuda.is_available() else "cuda")),
        **summaries,
        speedup=[
            ServingSpeedup(
                concurrency=one.concurrency,
                requests_per_s=other.requests_per_s / one.requests_per_s,
                first_token=other.first_token_s / one.first_token_s,
            )
            for one, other in zip(summaries["unpruned"], summaries["pruned"], strict=True)
        ],
    )


@contextmanager
def _alive(config: ServingConfig, arm: str, process: Any) -> Iterator[None]:
    """Raises `InputError` where an arm's process has ended."""
    try:
        yield
    except (EOFError, OSError):
        process.join(1)
        raise InputError(
            f"vLLM ended with code {process.exitcode} while it served the {arm} {config.shape}; a "
            "negative one is a signal, -9 for want of memory"
        ) from None


@contextmanager
def _started(
    config: ServingConfig, arm: str, folder: str, share: float
) -> Iterator[Callable[[int], Load]]:
    """Starts an engine in a process of its own, which answers the list at a concurrency.

    Args:
        config: what is measured.
        arm: `unpruned` or `pruned`.
        folder: of the model.
        share: of a GPU's memory.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(config, arm, folder, share, theirs))
    process.start()
    theirs.close()

    def receive() -> Any:
        with _alive(config, arm, process):
            received = ours.recv()
        if isinstance(received, str):
            raise InputError(received)
        return received

    def serve(concurrency: int) -> Load:
        with _alive(config, arm, process):
            ours.send(concurrency)
        load: Load = receive()
        return load

    try:
        receive()  # an engine that still starts would slow the other one's answers
        yield serve
    finally:
        ours.close()
        process.join(PATIENCE_S)  # it ends by itself, unless it is still answering or starting
        process.terminate()
        process.join()


def _summary(config: ServingConfig, runs: Sequence[Load]) -> list[ServedLoad]:
    """Returns the medians over repeats, one for each concurrency."""
    by_concurrency = [
        [load for load in runs if load.concurrency == concurrency]
        for concurrency in config.concurrency
    ]
    return [
        ServedLoad(
            concurrency=loads[0].concurrency,
            requests_per_s=median(load.requests / load.seconds for load in loads),
            first_token_s=median(median(load.first_token_s) for load in loads),
            prompt_tokens=loads[0].prompt_tokens,
            runs=loads,
        )
        for loads in by_concurrency
    ]


def _write_model(config: ServingConfig, architecture: Any, folder: Path) -> None:
    """Writes a folder that vLLM fills with random weights: configuration, tokenizer and processor.

    Args:
        config: what is measured.
        architecture: configuration of the shape, changed in place.
        folder: of the model.
    """
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint_path())
    architecture.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")
    architecture.architectures = ["LlavaForConditionalGeneration"]
    text = architecture.get_text_config()
    for name in ("bos", "eos", "pad"):
        setattr(text, f"{name}_token_id", getattr(processor.tokenizer, f"{name}_token_id"))
    if config.layers is not None:
        shorten(text, config.layers, config.shape)
    architecture.save_pretrained(folder)
    processor.save_pretrained(folder)


def _serve(config: ServingConfig, arm: str, folder: str, share: float, requests: Any) -> None:
    """Serves the list in this process, which is new, at each concurrency that is sent.

    Args:
        config: what is measured.
        arm: `unpruned` or `pruned`.
        folder: of the model.
        share: of a GPU's memory.
        requests: the connection that concurrencies come by and loads go back by; what keeps the
            engine from answering goes back as a text.
    """
    threads = f"0-{(os.cpu_count() or 1) - 1}"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", threads)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    with suppress(EOFError, BrokenPipeError):
        try:
            with engine_errors(f"vLLM does not serve the {arm} {config.shape}"):
                _answer(config, arm, folder, share, requests)
        except InputError as error:
            requests.send(str(error))


def _answer(config: ServingConfig, arm: str, folder: str, share: float, requests: Any) -> None:
    """Starts the engine, and answers the list at each concurrency that is received.

    Args:
        config: what is measured.
        arm: `unpruned` or `pruned`.
        folder: of the model.
        share: of a GPU's memory.
        requests: as for `_serve`.
    """
    from vllm import LLM, SamplingParams

    settings = config.settings if arm == "pruned" else Settings("none")
    llm = LLM(
        folder, load_format="dummy", seed=0, max_model_len=1024,
        max_num_seqs=max(config.concurrency), enforce_eager=True,
        distributed_executor_backend="uni",
        **settings.engine_options(config.dtype, on_cpu=False, images=1, share=share),
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=config.new_tokens, ignore_eos=True)
    served = Served(llm.llm_engine, sampling)
    first = 0
    requests.send(None)
    while True:
        concurrency = requests.recv()
        # requests that are not counted, then those that are, each with a picture of its own
        for count in (min(2, concurrency), config.requests):
            prompts = [_prompt(config, first + number) for number in range(count)]
            first += count
            load = served.run(prompts, concurrency)
        requests.send(load)


class ImagePrompt(TypedDict):
    """A prompt as vLLM takes it."""

    prompt: str
    multi_modal_data: dict[str, "Image"]


def _prompt(config: ServingConfig, number: int) -> ImagePrompt:
    """Returns a picture and a question that no other request of the list has."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(number)
    picture = Image.fromarray(draw.integers(0, 256, (336, 336, 3), np.uint8))
    # the tokenizer's single bytes, one token each, around the image's placeholder
    text = "".join(chr(code) for code in draw.integers(ord("A"), ord("Z"), config.text - 4))
    return {"prompt": f"USER: <image>\n{text} ASSISTANT:", "multi_modal_data": {"image": picture}}


@dataclass
class Served:
    """An engine that answers a list with so many requests under way."""

    engine: Any
    sampling: Any
    handed: int = 0

    def run(self, prompts: Sequence[ImagePrompt], concurrency: int) -> Load:
        waiting = list(prompts)
        began: dict[str, float] = {}
        first: dict[str, float] = {}
        ended, tokens = 0, 0
        start = time.perf_counter()
        while ended < len(prompts):
            while waiting and len(began) - ended < concurrency:
                name, self.handed = str(self.handed), self.handed + 1
                began[name] = time.perf_counter()
                self.engine.add_request(name, waiting.pop(0), self.sampling)
            for output in self.engine.step():
                if output.outputs and output.outputs[0].token_ids:
                    first.setdefault(output.request_id, time.perf_counter())
                ended += output.finished
                tokens = len(output.prompt_token_ids)
        seconds = time.perf_counter() - start
        waits = [first[name] - began[name] for name in began]
        return Load(concurrency, seconds, len(prompts), waits, tokens)


def serving_rows(results: ServingResults) -> list[list[str]]:
    """Returns header and one row per concurrency."""
    lines = [["concurrency", "unpruned req/s", "pruned req/s", "", "unpruned first token s",
              "pruned first token s", ""]]  # fmt: skip
    for one, other, gain in zip(results.unpruned, results.pruned, results.speedup, strict=True):
        lines.append(
            [
                str(one.concurrency),
                f"{one.requests_per_s:.3f}",
                f"{other.requests_per_s:.3f}",
                f"{gain.requests_per_s:.2f}x",
                f"{one.first_token_s:.3f}",
                f"{other.first_token_s:.3f}",
                f"{gain.first_token:.2f}x",
            ]
        )
    return lines


def serving_summary(results: ServingResults) -> list[str]:
    """Returns lines that say what was measured."""
    config = results.config
    before, after = results.unpruned[0].prompt_tokens, results.pruned[0].prompt_tokens
    layers = "" if config.layers is None else f", {config.layers} decoder layers"
    arguments = json.dumps(config.arguments) if config.arguments else ""
    return [
        f"{config.shape}{layers}, {config.dtype}, {results.environment['device']}, vLLM",
        (
            f"{config.method} {arguments} keeps {config.budget} of each image; prompts of {after} "
            f"tokens instead of {before}, {config.new_tokens} answered"
        ),
        f"{config.requests} requests at each concurrency; medians of {config.repeats} runs in turn",
    ]
