"""Each kernel against its reference, the compiled reference and the roofline."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import gelu, normalize

from vlm_prune.benchmarks.speed.roofline import Ceilings, Timing, timed
from vlm_prune.benchmarks.stats.table import as_markdown
from vlm_prune.kernels.attention_received import attention_received
from vlm_prune.kernels.compact_tokens import compact_tokens
from vlm_prune.kernels.dispatch import Backend, backend, backend_for
from vlm_prune.kernels.greedy_select import greedy_select
from vlm_prune.kernels.greedy_select.reference import SelectionRule
from vlm_prune.kernels.pairwise_cosine import pairwise_cosine
from vlm_prune.kernels.text_guided_score import text_guided_score
from vlm_prune.kernels.token_sensitivity import (
    closed_form,
    monte_carlo,
    weight_kernel,
    weight_root,
)

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and a prompt; the defaults are LLaVA-1.5-7B's."""

    batch: int = 1
    image: int = 576
    text: int = 60
    keep: int = 64
    heads: int = 32
    head_dim: int = 128
    tower_heads: int = 16
    tower_head_dim: int = 64
    directions: int = 64

    @property
    def width(self) -> int:
        """Returns the width of the language model."""
        return self.heads * self.head_dim

    @property
    def tower_width(self) -> int:
        """Returns the width of the vision tower."""
        return self.tower_heads * self.tower_head_dim


@dataclass(frozen=True)
class Case:
    """One operation on fixed inputs, and what it cannot do without.

    Args:
        call: runs it under the backend in force.
        flops: FLOPs of its matrix products, each done once.
        moved: bytes of inputs and outputs, each moved once.
        waits: whether it reads a size from the device, which no CUDA graph can.
    """

    name: str
    call: Callable[[], tuple[Tensor, ...]]
    flops: float
    moved: float
    waits: bool = False


def _bytes(*tensors: Tensor) -> float:
    return float(sum(tensor.numel() * tensor.itemsize for tensor in tensors))


def cases(shape: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yields the operations as the pruners call them.

    Args:
        shape: sizes of the model.
        device: to compute on.
        dtype: of the tensors.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    batch, tokens, length = shape.batch, shape.image + 1, shape.image + shape.text
    query = random(batch, shape.tower_heads, tokens, shape.tower_head_dim)
    key = random(batch, shape.tower_heads, tokens, shape.tower_head_dim)
    products = 2.0 * batch * tokens * tokens * shape.tower_width
    yield Case(
        "attention_received",
        lambda: (attention_received(query, key),),
        products,
        _bytes(query, key) + 4.0 * batch * tokens,
    )

    text = random(batch, shape.heads, shape.text, shape.head_dim)
    keys = random(batch, shape.heads, length, shape.head_dim)
    columns = torch.arange(shape.image, length, device=device).repeat(batch, 1)
    valid = torch.ones(batch, length, dtype=torch.bool, device=device)
    products = 2.0 * batch * shape.text * length * shape.width
    yield Case(
        "text_guided_score",
        lambda: (text_guided_score(text, keys, columns, valid, shape.head_dim**-0.5),),
        products,
        _bytes(text, keys) + 4.0 * batch * length,
    )

    features = random(batch, shape.image, shape.tower_width)
    w1, b1 = random(shape.width, shape.tower_width) / shape.tower_width**0.5, random(shape.width)
    w2 = random(shape.width, shape.width) / shape.width**0.5
    bank = normalize(random(shape.directions, shape.tower_width), dim=-1)
    images, first = batch * shape.image, 2.0 * shape.width * shape.tower_width
    roots, kernels = {}, {}
    for name in get_args(Backend):
        with backend(name):
            roots[name], kernels[name] = weight_root(w2), weight_kernel(w1, w2)
    yield Case(
        "monte_carlo",
        lambda: (monte_carlo(features, w1, b1, gelu, roots[backend_for(features)], bank, 0.01),),
        first * (images + shape.directions) + 1.0 * images * shape.directions * shape.width**2,
        _bytes(features, w1, b1, bank) + _bytes(w2) / 2 + 4.0 * images,
    )
    yield Case(
        "closed_form",
        lambda: (closed_form(features, w1, b1, gelu, kernels[backend_for(features)]),),
        images * (first + 2.0 * shape.width**2),
        _bytes(features, w1, b1, kernels["triton"]) + 4.0 * images,
    )

    projected = random(batch, shape.image, shape.width)
    products = 2.0 * batch * shape.image**2 * shape.width
    yield Case(
        "pairwise_cosine",
        lambda: (pairwise_cosine(projected, projected),),
        products,
        _bytes(projected) + 4.0 * batch * shape.image**2,
    )
    similarity = pairwise_cosine(projected, projected)
    scores = random(batch, shape.image).float().sigmoid()
    steps = float(batch * shape.keep * shape.image)
    floors = {rule: (2 * steps, 4 * steps) for rule in get_args(SelectionRule)}
    floors["dpp"] = (shape.keep * steps, 4 * steps)
    # every gain is computed once at least, from all that its token covers
    floors["coverage"] = (2.0 * similarity.numel(), _bytes(similarity))
    for rule, (flops, moved) in floors.items():
        yield Case(
            f"greedy_select {rule}",
            lambda rule=rule: (greedy_select(similarity, scores, shape.keep, rule),),  # type: ignore[misc]
            flops,
            moved + _bytes(scores),
        )

    keep = torch.rand(batch, length, generator=generator).to(device) < shape.keep / shape.image
    hidden_states, rotary = (
        random(batch, length, shape.width),
        random(batch, length, 2 * shape.head_dim),
    )
    positions = torch.arange(length, device=device).repeat(batch, 1)
    share = float(keep.float().mean())
    yield Case(
        "compact_tokens",
        lambda: tuple(compact_tokens(keep, hidden_states, positions, rotary)[1]),
        0.0,
        2 * share * _bytes(hidden_states, positions, rotary) + _bytes(keep),
        waits=True,
    )


def error(case: Case, dtype: torch.dtype) -> str:
    """Says what is wrong with the kernel's output against the
    reference's; empty when nothing is.
    """
    with backend("reference"):
        expected = case.call()
    with backend("triton"):
        ours = case.call()
    for one, other in zip(ours, expected, strict=True):
        if not other.is_floating_point():
            differing = int((one != other).sum())
            if differing:
                return f"{differing} selections differ"
            continue
        relative = float((one.double() - other.double()).norm() / other.double().norm())
        if not relative <= TOLERANCE[dtype]:
            return f"relative error {relative:.1e}"
    return ""


def measure_case(
    case: Case, ceilings: Ceilings, device: torch.device, dtype: torch.dtype, compiled: bool = True
) -> dict[str, Any]:
    """Returns timings of a case whose kernel agrees with the reference; of another only the error.

    `replayed` is the kernel in a CUDA graph, without the time that Python takes to launch it.

    Args:
        case: the operation with its tensors.
        ceilings: measured speeds of the device.
        device: to compute on.
        dtype: of the tensors.
        compiled: whether the reference is timed under `torch.compile` too.
    """
    row: dict[str, Any] = {"operation": case.name, "error": error(case, dtype)}
    if row["error"]:
        return row

    def time(name: Backend, call: Callable[[], object]) -> Timing:
        with backend(name):
            return timed(call, device)

    times = {"triton": time("triton", case.call), "reference": time("reference", case.call)}
    if device.type == "cuda" and not case.waits:
        graph = torch.cuda.CUDAGraph()
        with backend("triton"), torch.cuda.graph(graph):
            case.call()
        times["replayed"] = time("triton", graph.replay)
    if compiled:
        with suppress(RuntimeError):  # what the compiler cannot do is left out of the table
            times["compiled"] = time("reference", torch.compile(case.call))
    return row | {
        "flops": case.flops,
        "bytes": case.moved,
        "floor_ms": ceilings.floor_ms(case.flops, case.moved),
        **{f"{name}_ms": asdict(timing) for name, timing in times.items()},
    }


def kernel_table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Returns rows of `measure_case` in Markdown; milliseconds are medians with quartiles."""
    names = ("triton", "replayed", "reference", "compiled")
    lines = [["operation", *names, "floor"]]
    for row in rows:
        cells = [f"not measured: {row['error']}", *[""] * 4]
        if not row["error"]:
            times = (row.get(f"{name}_ms") for name in names)
            cells = [str(Timing(**time)) if time else "" for time in times]
            cells.append(f"{row['floor_ms']:.3f}")
        lines.append([row["operation"], *cells])
    return (
        "".join(f"- {key}: {value}\n" for key, value in about.items()) + "\n" + as_markdown(lines)
    )
