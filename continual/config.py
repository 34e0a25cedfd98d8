"""Where a CLIP is adapted, and how it is trained on each task."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from inspect import signature
from typing import Any, Literal, get_args

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.registry import unknown

EncoderName = Literal["vision", "text", "all"]
Tower = Literal["vision", "text"]
Module = Literal["q", "k", "v", "o", "in", "out"]
MODULES: tuple[Module, ...] = get_args(Module)
TextTerm = Literal["all", "present", "none"]


def tower_of(name: str) -> Tower:
    """Returns the tower that a parameter or module of a CLIP belongs to, in every library."""
    return "vision" if name.startswith("vis") else "text"


def check_options(kind: type[Any], what: str, options: Mapping[str, Any]) -> None:
    """Raises `InputError` for an option that a dataclass lacks, or whose value is of another kind.

    Args:
        kind: the dataclass.
        what: what it describes, for the message.
        options: values by field name.
    """
    known = {f.name: f for f in fields(kind) if f.init}
    for option, value in options.items():
        if option not in known and option in signature(kind).parameters:
            continue  # an old name, which the class itself reads
        if option not in known:
            raise InputError(unknown(f"option of {what}", option, known))
        field = known[option]
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if not _alike(value, default):
            raise InputError(f"{option} of {what} is {value!r}; give a value such as {default!r}")


def _alike(value: Any, default: Any) -> bool:
    if default is None or isinstance(default, tuple):
        return True
    if isinstance(default, float) and not isinstance(value, bool):
        return isinstance(value, int | float)
    return type(value) is type(default)


def above(field: str, value: float, least: float, strict: bool = False) -> None:
    """Raises `InputError` unless `value` is at least (or, if strict, above) `least`.

    Args:
        field: name for the message.
        value: what the user gave.
        least: the bound.
        strict: whether the bound itself is refused.
    """
    if not isinstance(value, int | float) or not (value > least if strict else value >= least):
        bound = f"above {least:g}" if strict else f"{least:g} or more"
        raise InputError(f"{field} {value} is out of range; give {bound}")


def within(field: str, value: float, low: float = 0.0, high: float = 1.0) -> None:
    """Raises `InputError` unless `value` lies in [low, high].

    Args:
        field: name for the message.
        value: what the user gave.
        low: the smallest value allowed.
        high: the largest value allowed.
    """
    if not low <= value <= high:
        raise InputError(f"{field} {value} is out of range; give {low:g} to {high:g}")


def one_of(field: str, value: str, known: tuple[str, ...]) -> None:
    """Raises `InputError`, with a suggestion, unless `value` is `known`.

    Args:
        field: name for the message.
        value: what the user gave.
        known: the values allowed.
    """
    if value not in known:
        raise InputError(unknown(field, value, known))


@dataclass(frozen=True)
class Placement:
    """The linear maps that get an adapter.

    Args:
        encoder: `vision`, `text` or `all` for both.
        modules: per block, attention's q, k, v, o and the MLP's in and out.

    Raises:
        InputError: for an unknown name, or no module at all.
    """

    encoder: EncoderName = "all"
    modules: tuple[Module, ...] = MODULES

    def __post_init__(self) -> None:
        one_of("encoder", self.encoder, get_args(EncoderName))
        for module in self.modules:
            one_of("module", module, MODULES)
        if not self.modules or len(set(self.modules)) < len(self.modules):
            raise InputError(f"modules {self.modules} must name each module once")

    @property
    def towers(self) -> tuple[Tower, ...]:
        """Returns the towers that get adapters."""
        return ("vision", "text") if self.encoder == "all" else (self.encoder,)


@dataclass(frozen=True)
class Recipe:
    """Training of one task; the defaults are those of CoDyRA's X-TAIL runs.

    https://arxiv.org/abs/2412.01004

    Args:
        steps: optimizer steps per task.
        batch: images per step, over all processes together.
        lr: AdamW's learning rate; cosine to 0, no warm-up.
        weight_decay: AdamW's.
        betas: AdamW's. The second, 0.9999, belongs to the pruning thresholds.
        clip_norm: largest gradient norm; None does not clip.
        label_smoothing: of the image-to-text cross-entropy.
        text_term: the text-to-image cross-entropy, a mean over `all` classes seen so far (as the
            authors' code has it: earlier classes contribute nothing and only dilute it), over those
            `present` in the batch, or `none`.
        prompts: most class prompts per step that text gradients are computed for, those of the
            batch first; None is all of them. Others are left out of the step's softmax.
        joint: test over the classes of all tasks together (X-TAIL) and not over the task's own.
        seen_only: with `joint`, test over the classes of the tasks up to the last one learned, or up to
            the image's own where that comes later (class-incremental learning).
        ensemble: test with the mean over all of a task's templates; training uses the first.
        eval_batch: images per forward when testing.
        seed: for batches, augmentation and initial weights.

    Raises:
        InputError: for a value out of range.
    """

    steps: int = 500
    batch: int = 64
    lr: float = 5e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.9999)
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    text_term: TextTerm = "all"
    prompts: int | None = None
    joint: bool = True
    seen_only: bool = False
    ensemble: bool = False
    eval_batch: int = 64
    seed: int = 8

    def __post_init__(self) -> None:
        for field in ("steps", "batch", "eval_batch"):
            above(field, getattr(self, field), 1)
        above("lr", self.lr, 0, strict=True)
        above("weight_decay", self.weight_decay, 0)
        above("seed", self.seed, 0)
        for beta in self.betas:
            within("betas", beta)
        within("label_smoothing", self.label_smoothing)
        one_of("text_term", self.text_term, get_args(TextTerm))
        if self.prompts is not None:
            above("prompts", self.prompts, 1)
        if self.clip_norm is not None:
            above("clip_norm", self.clip_norm, 0, strict=True)
