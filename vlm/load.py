"""Loading a model and its processor; whatever is wrong with them is said in one line."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from vlm_prune.vlm.common.errors import InputError, first_line
from vlm_prune.vlm.tiny import checkpoint_path

EMBEDDED = "tiny"


def load(name: str = EMBEDDED, device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any]:
    """Model and processor from the embedded checkpoint (`tiny`), a folder, or a hub name.

    Only safetensors are read, and no code from the checkpoint is run. `auto` is fp32 on a CPU and
    the checkpoint's own type elsewhere.

    Raises:
        InputError: if there is no such checkpoint, it is damaged, or its family is unsupported.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return _load(name, device, dtype, _config, AutoModelForImageTextToText, AutoProcessor)


def load_language(name: str, device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any]:
    """A text-only language model and its tokenizer, from a folder or a hub name.

    Only safetensors are read, and no code from the checkpoint is run; `dtype` as for `load`.

    Raises:
        InputError: if there is no such checkpoint, it is damaged, or the model sees images.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    def text_only(path: str) -> Any:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if hasattr(config, "vision_config"):
            raise InputError(f"{name!r} is a model that sees images; give a text-only one")
        return config

    return _load(name, device, dtype, text_only, AutoModelForCausalLM, AutoTokenizer)


def _load(
    name: str,
    device: str,
    dtype: str,
    config_of: Callable[[str], Any],
    model_class: Any,
    processor_class: Any,
) -> tuple[Any, Any]:
    import torch

    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    with _readable(name) as path:
        target = torch.device(device)
        model = model_class.from_pretrained(
            path, config=config_of(path), dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        processor = processor_class.from_pretrained(path, trust_remote_code=False)
        return model.to(target).eval(), processor


def _config(path: str) -> Any:
    from transformers import AutoConfig

    from vlm_prune.vlm.families import check_supported

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    check_supported(config.model_type)
    return config


@contextmanager
def _readable(name: str) -> Iterator[str]:
    """Where a checkpoint lies; what goes wrong while it is read becomes one line."""
    from safetensors import SafetensorError

    path = str(checkpoint_path()) if name == EMBEDDED else name
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise InputError(f"{path} holds no config.json, so it is no checkpoint folder")
    try:
        yield path
    except InputError:
        raise
    except (
        OSError,
        ValueError,
        RuntimeError,
        AssertionError,
        AttributeError,
        KeyError,
        SafetensorError,
    ) as error:
        hint = "give 'tiny', a checkpoint folder, or a hub name"
        if get_close_matches(name, [EMBEDDED]):
            hint = f"did you mean {EMBEDDED!r}?"
        raise InputError(f"cannot load model {name!r}: {first_line(error)} ({hint})") from error


def family_type(name: str) -> Any:
    """The adapter class for a checkpoint, from its config alone; `name` and errors as for `load`."""
    from vlm_prune.vlm.families import FAMILIES

    with _readable(name) as path:
        return FAMILIES[_config(path).model_type]
