"""The Ray Data pipeline: decode on CPUs, answer with a pool of models, write parts.

Ray Data's streaming executor holds decoding back: decoded images may fill half of the object store,
which is 30 % of the memory, however many there are. A model has one block in work and one waiting;
a block is one batch, or a few where there are very many images.
"""

import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL.Image import Image
from pyarrow import parquet
from transformers import AutoModelForImageTextToText

from vlm_prune.benchmarks.batch.config import MapConfig
from vlm_prune.benchmarks.batch.inputs import decode, find_images, input_root, printable, shown_of
from vlm_prune.benchmarks.batch.output import ANSWERS, Parts, finished, parts_of
from vlm_prune.benchmarks.batch.vllm_stage import vllm_answers
from vlm_prune.benchmarks.evaluation.served import settings_of
from vlm_prune.learners.store import adapter_digest
from vlm_prune.pruning.pipeline import PrunedVLM
from vlm_prune.vlm.chat import rows_encoded_together
from vlm_prune.vlm.checkpoint import weight_stamps
from vlm_prune.vlm.common.errors import InputError, first_line
from vlm_prune.vlm.common.video import VideoClip
from vlm_prune.vlm.families import takes_videos
from vlm_prune.vlm.load import check_loadable, config_of, device_of, load

MOST_BLOCKS = 2000
NO_GPU = "Ray sees no GPU for --device cuda; give --device cpu"
ONE_GPU = "Ray hands out the GPUs; give --device cuda, and --workers for how many"
# What Ray sets aside for a decoding task: the largest image that is opened, and copies of it. As the
# models ask for no memory, Ray Data does not move decoding into their processes.
DECODING = {"num_cpus": 1, "memory": 2**30}
PART_ROWS, PART_SECONDS = 1000, 10.0
# Not rows of the table: what keeps a model from answering at all.
REFUSED = ANSWERS.append(pa.field("refused", pa.string()))


class Answerer:
    """One model of the pool. A model that cannot be used says so in place of its answers."""

    def __init__(self, config: MapConfig, device: str) -> None:
        self.refused: str | None = None
        self.options: dict[str, Any] = {"do_sample": False}
        if config.max_new_tokens is not None:
            self.options["max_new_tokens"] = config.max_new_tokens
        try:
            pruner = config.variant.build(0)
            loaded = load(
                config.model, device, config.dtype, device_map=config.device_map,
                quantization=config.quantization, attn=config.attn, adapter=config.adapter,
            )  # fmt: skip
            self.vlm = PrunedVLM(*loaded, pruner)
            pruner.admit(self.vlm.model)
        except InputError as error:
            self.refused = str(error)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Returns answers to a batch of `decode`'s rows."""
        if self.refused is not None:
            return pa.Table.from_pylist([{"refused": self.refused}], schema=REFUSED)
        rows = batch.to_pylist()
        answers = [{"row": row["row"], "error": row["error"]} for row in rows if row["error"]]
        answers += self._answer([row for row in rows if not row["error"]])
        return pa.Table.from_pylist(answers, schema=REFUSED)

    def _answer(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answers rows; those that a model cannot take at a time, in groups that it can."""
        shown = [shown_of(row) for row in rows]
        videos = [[medium] if isinstance(medium, VideoClip) else [] for medium in shown]
        groups = rows_encoded_together(self.vlm.processor, videos)
        answers = (
            self._answer_group([rows[n] for n in group], [shown[n] for n in group])
            for group in groups
        )
        return list(chain.from_iterable(answers))

    def _answer_group(
        self, rows: list[dict[str, Any]], images: list[Image | VideoClip]
    ) -> list[dict[str, Any]]:
        """Answers rows at a time; where that fails, each is tried alone."""
        try:
            replies = self.vlm.replies(images, [row["prompt"] for row in rows], **self.options)
        except (ValueError, MemoryError, torch.OutOfMemoryError) as error:
            if len(rows) == 1:
                return [{"row": rows[0]["row"], "error": printable(error)}]
            alone = zip(rows, images, strict=True)
            return [own for row, image in alone for own in self._answer_group([row], [image])]
        return [
            {
                "row": row["row"],
                "answer": reply.text,
                "image_tokens": reply.image_tokens,
                "kept_tokens": reply.kept_tokens,
            }
            for row, reply in zip(rows, replies, strict=True)
        ]


def _no_bar(total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda done: None)


def map_images(
    config: MapConfig,
    output: Path,
    batch_size: int = 8,
    workers: int | None = None,
    cpus: int | None = None,
    bar: Callable[[int], AbstractContextManager[Callable[[int], None]]] = _no_bar,
) -> tuple[int, int]:
    """Fills `output`, going on where an earlier run stopped.

    Args:
        config: what is asked of which images, and by which model.
        output: a Parquet file; it appears when all rows are there. Until then they are in a folder
            beside it.
        batch_size: images answered together; it changes no answer.
        workers: models at a time; one on each GPU, or one on the CPUs, unless given.
        cpus: CPUs to use, all unless given.
        bar: a progress bar over so many rows; gives what to call with the number done.

    Returns:
        How many rows there are, and how many of them are errors.

    Raises:
        InputError: if the input, the output or the model cannot be used.
    """
    # weights may change under their name
    wanted = asdict(config) | {
        "adapter_digest": None if config.adapter is None else adapter_digest(config.adapter),
        "checkpoint": weight_stamps(config.model),
    }
    config.variant.build(0)
    if config.engine == "vllm":
        settings_of(config.model, config.variant)
    if finished(output, wanted):
        shutil.rmtree(parts_of(output), ignore_errors=True)  # a kill left it behind
        return counts(output)
    check_map_config(config)
    source = Path(config.input)
    videos = config.engine == "hf" and takes_videos(config_of(config.model).model_type)
    parts = Parts(output, wanted, partial(find_images, source, config.prompt, config.limit, videos))
    missing = parts.missing()
    if len(missing):
        with _stderr_to(parts.log), local_ray(cpus), bar(len(parts.images)) as advance:
            advance(len(parts.images) - len(missing))
            _collect(parts, _answers(config, workers, missing, batch_size), advance)
    parts.join()
    return counts(output)


def check_map_config(config: MapConfig) -> None:
    """Finds out, before Ray starts, whether device, checkpoint, method and budget go together.

    Raises:
        InputError: if they do not, or the checkpoint cannot be read.
    """
    if config.device.startswith("cuda:"):
        raise InputError(ONE_GPU)
    if config.device == "cuda":
        if not (torch.cuda.is_available() or _joined()):  # Ray may see GPUs of other machines
            raise InputError(NO_GPU)
    elif config.device != "auto":
        device_of(config.device)
    check_loadable(
        config.model, config.dtype, config.adapter, config.attn, config.quantization,
        config.device_map,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config_of(config.model))
    config.variant.build(0).admit(model)


def _joined() -> bool:
    """Returns whether this process belongs to a cluster of Ray already."""
    import ray

    return bool(ray.is_initialized())


def _collect(parts: Parts, answers: Iterator[pa.Table], advance: Callable[[int], None]) -> None:
    """Writes a part every few seconds, and what is left when the run ends in any way.

    Args:
        parts: of the output.
        answers: tables as they come.
        advance: is told how many rows were written.
    """
    waiting: list[pa.Table] = []
    due = time.monotonic() + PART_SECONDS
    try:
        for block in answers:
            refused = block["refused"].drop_null()
            if len(refused):
                if not parts.done.any() and not waiting:
                    parts.discard()
                raise InputError(refused[0].as_py())
            waiting.append(block.select(ANSWERS.names))
            advance(len(block))
            if sum(map(len, waiting)) >= PART_ROWS or time.monotonic() > due:
                parts.write(waiting)
                waiting, due = [], time.monotonic() + PART_SECONDS
    finally:
        if waiting:
            parts.write(waiting)


def _answers(
    config: MapConfig, workers: int | None, missing: pa.Table, batch_size: int
) -> Iterator[pa.Table]:
    """Yields answers in the order in which they are made.

    Args:
        config: what is asked of which model.
        workers: models at a time; as many as fit unless given.
        missing: rows to answer.
        batch_size: images of a forward.
    """
    import ray.data
    import ray.exceptions

    device, models, share = placed(ray.cluster_resources(), config.device, workers)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    rows = batch_size * -(-len(missing) // (batch_size * MOST_BLOCKS))
    blocks = [missing.slice(start, rows) for start in range(0, len(missing), rows)]
    images = ray.data.from_arrow(blocks).map_batches(
        decode,
        batch_format="pyarrow",
        fn_kwargs={
            "root": input_root(Path(config.input), config.allow_outside),
            "frames": config.frames,
            "fps": config.fps,
        },
        **DECODING,
    )
    if config.engine == "vllm":
        answers = vllm_answers(images, config, REFUSED, batch_size, models, share, DECODING)
    else:
        answers = images.map_batches(
            Answerer,
            batch_size=batch_size,
            batch_format="pyarrow",
            fn_constructor_kwargs={"config": config, "device": device},
            compute=ray.data.ActorPoolStrategy(size=models, max_tasks_in_flight_per_actor=2),
            **share,
        )
    try:
        yield from answers.iter_batches(batch_size=None, batch_format="pyarrow")
    except ray.exceptions.RayError as error:
        raise InputError(f"Ray stopped ({printable(error)}); run it again to go on") from error


def placed(
    resources: dict[str, float], device: str, workers: int | None
) -> tuple[str, int, dict[str, Any]]:
    """Returns the models' device, how many there are, and what each of them asks Ray for.

    Args:
        resources: of the cluster, as Ray names them.
        device: `auto`, `cpu`, `cuda` or `mps`.
        workers: how many models; None for one per GPU, or one on the CPUs.

    Raises:
        InputError: if Ray's `resources` do not suffice.
    """
    cpus, gpus = int(resources["CPU"]), int(resources.get("GPU", 0))
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device.startswith("cuda:"):
        raise InputError(ONE_GPU)
    if device == "cuda":
        if not gpus:
            raise InputError(NO_GPU)
        if workers is not None and workers > gpus:
            raise InputError(f"{workers} workers on cuda need as many GPUs, and there are {gpus}")
        return device, workers or gpus, {"num_gpus": 1}
    workers = workers or 1
    if workers > cpus - 1:
        raise InputError(
            f"{workers} workers on {device} need {workers + 1} CPUs, one for decoding, and there "
            f"are {cpus}; give fewer --workers"
        )
    return device, workers, {"num_cpus": (cpus - 1) // workers}


@contextmanager
def local_ray(cpus: int | None) -> Iterator[None]:
    """Starts Ray on this machine alone, unless it runs already: quiet,
    and it tells nobody anything.

    Ray listens on every network interface and runs what it is sent by who knows this secret, unless
    `RAY_AUTH_MODE` is `disabled`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(
            address="local", num_cpus=cpus or max(2, os.cpu_count() or 1), include_dashboard=False,
            _node_ip_address="127.0.0.1", log_to_driver=False, logging_level=logging.CRITICAL,
        )  # fmt: skip
    except Exception as error:  # Ray raises bare ones, as when it starts slowly
        raise InputError(f"Ray does not start ({first_line(error)}); run it again") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _stderr_to(log: Path) -> Iterator[None]:
    """Sends file descriptor 2, to which Ray's core writes notes itself, to a log."""
    kept = os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def counts(output: Path) -> tuple[int, int]:
    """Returns the rows of a finished table, and how many of them are errors."""
    errors = parquet.read_table(output, columns=["error"], partitioning=None)["error"]
    return len(errors), len(errors) - errors.null_count
