"""Loading a model and its processor; whatever is wrong with them is said in one line."""

from pathlib import Path
from typing import Any

from vlm_prune.vlm.checkpoint import (
    check_pixels,
    load_weights,
    locate,
    read_config,
    view_of,
)
from vlm_prune.vlm.common.errors import InputError, first_line, naming
from vlm_prune.vlm.common.files import read_object, write_folder
from vlm_prune.vlm.common.registry import unknown
from vlm_prune.vlm.tiny import checkpoint_path

EMBEDDED = {"tiny": checkpoint_path()}
PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load(name: str = "tiny", device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any]:
    """Return a model and its processor from an embedded checkpoint, a folder, or a hub name.

    Only safetensors are read, and no code from the checkpoint is run. `auto` is fp32 on a CPU and
    the checkpoint's own type elsewhere.

    Args:
        name: `tiny`, the folder of a checkpoint, or `owner/model`.
        device: where to put the model.
        dtype: one of `DTYPES`.

    Raises:
        InputError: if there is no such checkpoint, device or type, the checkpoint is damaged or of
            an unsupported family, or weights are missing, not finite or more than its configuration
            describes.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    target, kind = device_of(device), _dtype(dtype, device)
    with naming(f"cannot load model {name!r}"):
        view = view_of(locate(name, EMBEDDED))
        config = _config(view)
        model = load_weights(AutoModelForImageTextToText, view, config, dtype=kind)
        with naming("its tokenizer or image processor cannot be used"):
            processor = AutoProcessor.from_pretrained(view, trust_remote_code=False)
        check_processor(processor, config)
        return _named(model.to(target).eval(), processor, processor.tokenizer, name)


def load_language(name: str, device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any]:
    """Return a text-only language model and its tokenizer, from a folder or a hub name.

    Only safetensors are read, and no code from the checkpoint is run; `device` and `dtype` are as
    for `load`.

    Raises:
        InputError: as for `load`, or if the model sees images.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target, kind = device_of(device), _dtype(dtype, device)
    with naming(f"cannot load model {name!r}"):
        view = view_of(locate(name, EMBEDDED))
        config = read_config(view)
        if hasattr(config, "vision_config"):
            raise InputError(f"{name!r} is a model that sees images; give a text-only one")
        model = load_weights(AutoModelForCausalLM, view, config, dtype=kind)
        with naming("its tokenizer cannot be used"):
            tokenizer = AutoTokenizer.from_pretrained(view, trust_remote_code=False)
        return _named(model.to(target).eval(), tokenizer, tokenizer, name)


def save(model: Any, processor: Any, folder: Path) -> None:
    """Write a model and its processor as a plain checkpoint, all of it or nothing.

    Raises:
        OSError: if it cannot be written.
    """
    from vlm_prune.vlm.common.state import writing

    def fill(partial: Path) -> None:
        with writing(folder):
            model.save_pretrained(partial)
            processor.save_pretrained(partial)

    write_folder(folder, fill)


def family_type(name: str) -> Any:
    """Return the adapter class for a checkpoint from its configuration alone.

    Raises:
        InputError: if there is no such checkpoint, or its family is unsupported.
    """
    from vlm_prune.vlm.families import FAMILIES

    return FAMILIES[config_of(name).model_type]


def config_of(name: str) -> Any:
    """Return the configuration of a checkpoint, without its weights.

    Raises:
        InputError: if there is no such checkpoint, or its family is unsupported.
    """
    with naming(f"cannot load model {name!r}"):
        return _config(view_of(locate(name, EMBEDDED, weights=False), weights=False))


def device_of(name: str) -> Any:
    """Return the device of a name.

    Raises:
        InputError: if there is no such kind of device, or none here.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}; give cpu, cuda, cuda:1 or mps") from None
    try:
        torch.empty(1, device=device).cpu()
    except Exception as error:
        raise InputError(f"there is no device {name!r} here; give cpu") from error
    return device


def _dtype(name: str, device: str) -> str:
    if name not in DTYPES:
        raise InputError(unknown("dtype", name, DTYPES))
    return "float32" if name == "auto" and device == "cpu" else name


def _config(view: Path) -> Any:
    from vlm_prune.vlm.families import check_supported

    check_supported(str(read_object(view / "config.json").get("model_type")))
    return read_config(view)


def check_processor(processor: Any, config: Any) -> None:
    """Refuse a processor that no prompt with an image can be made with.

    Raises:
        InputError: if it has no tokenizer, image processor or chat template, its image token is not
            the one of the model's configuration, or its pixels are no usable numbers.
    """
    for part in ("tokenizer", "image_processor", "chat_template"):
        if getattr(processor, part, None) is None:
            fix = "; put a chat_template.jinja into its folder" if part == "chat_template" else ""
            raise InputError(f"the checkpoint has no {part.replace('_', ' ')}{fix}")
    names = ("image_mean", "image_std", "rescale_factor")
    check_pixels(**{name: getattr(processor.image_processor, name, None) for name in names})
    token = getattr(processor, "image_token", None)
    wanted = getattr(config, "image_token_id", None)
    if isinstance(token, str) and wanted is not None:
        found = processor.tokenizer.convert_tokens_to_ids(token)
        if found != wanted:
            raise InputError(
                f"image token {token!r} is {found} in the tokenizer, {wanted} in config.json"
            )
    try:
        processor.apply_chat_template(PROMPT, add_generation_prompt=True)
    except Exception as error:
        raise InputError(f"the chat template fails: {first_line(error)}") from error


def _named(model: Any, processor: Any, tokenizer: Any, name: str) -> tuple[Any, Any]:
    """Model and processor that say where they come from, not which links were read."""
    name = str(EMBEDDED.get(name, name))
    model.name_or_path = model.config.name_or_path = tokenizer.name_or_path = name
    return model, processor
