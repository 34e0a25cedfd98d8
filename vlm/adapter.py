"""PEFT adapters on a model: LoRA, read from safetensors and known options alone.

peft imports modules that an adapter's configuration names and reads pickles, so it gets neither the
folder nor the configuration as it is.
"""

from pathlib import Path
from typing import Any

import msgspec

from vlm_prune.vlm.checkpoint import check_finite, check_report, locate_files
from vlm_prune.vlm.common.errors import InputError, naming
from vlm_prune.vlm.common.files import read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# what decides neither the shape nor the output of an adapter, or is not handed on
IGNORED = frozenset(
    (
        "arrow_config", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
        "inference_mode", "init_lora_weights", "loftq_config", "lora_dropout", "lora_ga_config",
        "megatron_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision",
        "runtime_config", "task_type",
    )
)  # fmt: skip


class Options(msgspec.Struct, kw_only=True):
    """The options of a LoRA that are handed on to peft, named as there."""

    r: int
    lora_alpha: float
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    bias: str = "none"
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False


def is_adapter(name: str) -> bool:
    """Returns whether a name is the folder of an adapter and not of a model."""
    folder = Path(name)
    return bool(name) and (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def base_of(name: str) -> str:
    """Returns the model that an adapter's folder says it is for.

    Raises:
        InputError: if it says nothing.
    """
    base = read_object(Path(name) / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"{CONFIG} names no base model; give --model and the folder as --adapter")
    return base


def read_options(folder: Path) -> dict[str, Any]:
    """Returns the options of an adapter for `peft.LoraConfig`.

    Raises:
        InputError: if the adapter is no LoRA, or has an option of another kind or one that is
            unknown.
    """
    given = read_object(folder / CONFIG)
    if given.get("peft_type") != "LORA":
        raise InputError(f"its peft_type is {given.get('peft_type')!r}; LORA is supported")
    known = Options.__struct_fields__
    for name, value in given.items():
        if value and name not in known and name not in IGNORED:
            raise InputError(f"its option {name!r} is not supported")
    try:
        options = msgspec.convert({n: v for n, v in given.items() if n in known}, Options)
    except msgspec.ValidationError as error:
        raise InputError(f"{CONFIG} is damaged: {error}") from error
    if not 1 <= options.r <= 2**16 or any(
        not 1 <= r <= 2**16 for r in options.rank_pattern.values()
    ):
        raise InputError(f"its rank {options.r} is out of range")
    return msgspec.structs.asdict(options)


def read_lora(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the options of an adapter for `peft.LoraConfig` and its tensors by name.

    Raises:
        InputError: if there is no such adapter, or it is damaged or no LoRA.
    """
    from vlm_prune.vlm.common.state import load_tensors

    with naming(f"cannot load adapter {name!r}"):
        folder = locate_files(name, [CONFIG, WEIGHTS])
        options = read_options(folder)
        if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").exists():
            raise InputError(
                "its weights are adapter_model.bin, a pickle, which is not read; convert it"
            )
        tensors = load_tensors(folder / WEIGHTS)
        check_finite(tensors)
        return options, tensors


def add_adapter(model: Any, name: str) -> Any:
    """Puts a LoRA into the modules of a model, in place, and returns peft's
    wrapper; the model's class stays.

    Args:
        model: a loaded model, quantized or not.
        name: the folder of the adapter, or `owner/model` of the Hub.

    Raises:
        InputError: if there is no such adapter, it is damaged, or it is for another model.
    """
    try:
        import peft
    except ImportError:
        raise InputError("adapters need peft: pip install 'vlm-prune[train]'") from None
    options, tensors = read_lora(name)
    with naming(f"cannot load adapter {name!r}"):
        wrapped = peft.PeftModel(model, peft.LoraConfig(**options, inference_mode=True))
        try:
            expected = peft.get_peft_model_state_dict(wrapped)
            shapes = [(n, tensors[n].shape, t.shape) for n, t in expected.items() if n in tensors]
            wrong = [each for each in shapes if each[1] != each[2]]
            check_report(expected.keys() - tensors.keys(), tensors.keys() - expected.keys(), wrong)
            peft.set_peft_model_state_dict(wrapped, tensors)
        except Exception:
            wrapped.unload()
            raise
        return wrapped
