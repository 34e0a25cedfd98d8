"""Loading a model and its processor; whatever is wrong with them is said in one line."""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_prune.vlm.adapter import add_adapter, base_of, is_adapter, read_lora
from vlm_prune.vlm.checkpoint import (
    check_pixels,
    load_weights,
    locate,
    read_config,
    view_of,
    weight_files,
)
from vlm_prune.vlm.common.errors import InputError, first_line, naming
from vlm_prune.vlm.common.files import read_object, write_folder
from vlm_prune.vlm.common.registry import unknown
from vlm_prune.vlm.smol import smol_path
from vlm_prune.vlm.tiny import checkpoint_path
from vlm_prune.vlm.tiny.video import tiny_video_path


class EmbeddedModels(Mapping[str, Path]):
    """Folders of the models that come with the package, by name; looking one up may put it together.

    Args:
        folders: what returns each folder.
    """

    def __init__(self, folders: Mapping[str, Callable[[], Path]]) -> None:
        self._folders = dict(folders)

    def __getitem__(self, name: str) -> Path:
        return self._folders[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._folders

    def __iter__(self) -> Iterator[str]:
        return iter(self._folders)

    def __len__(self) -> int:
        return len(self._folders)


EMBEDDED = EmbeddedModels(
    {"tiny": checkpoint_path, "smol": smol_path, "tiny-video": tiny_video_path}
)
PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
QUANTIZATIONS = {
    "bnb-4bit": "bitsandbytes",
    "bnb-8bit": "bitsandbytes",
    "torchao-int8": "torchao",
    "torchao-int4": "torchao",
}
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flex_attention")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load(
    name: str = "tiny",
    device: str = "auto",
    dtype: str = "auto",
    *,
    device_map: str | dict[str, Any] | None = None,
    quantization: str | None = None,
    attn: str | None = None,
    adapter: str | None = None,
) -> tuple[Any, Any]:
    """Returns a model and its processor from an embedded checkpoint, a folder, or a hub name.

    Only safetensors are read, and no code from the checkpoint is run. A folder that holds a PEFT
    adapter alone is loaded with the base model that it names.

    Args:
        name: `tiny`, `smol`, `tiny-video`, the folder of a checkpoint or of an adapter, or `owner/model`.
        device: where to put the model; `auto` is a GPU if there is one, else the CPU.
        dtype: one of `DTYPES`; `auto` is fp32 on a CPU and the checkpoint's own type elsewhere.
        device_map: `auto` spreads the model over GPUs, CPU memory and disk, as accelerate does; or
            a
            map of its own from module to device. `device` is not used then.
        quantization: one of `QUANTIZATIONS`.
        attn: the attention kernel, one of `ATTENTION`; the library's choice unless given.
        adapter: the folder or hub name of a PEFT adapter (LoRA) on the model.

    Raises:
        InputError: if there is no such checkpoint, device or type, the checkpoint is damaged or of
            an unsupported family, weights are missing, not finite or more than its configuration
            describes, or a library for what was asked for is missing or refuses.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    target = device_of(device)
    options: dict[str, Any] = {"dtype": _dtype(dtype, target.type if device_map is None else "")}
    _check_choices(attn, quantization, device_map)
    with naming(f"cannot load model {name!r}"):
        if adapter is None and is_adapter(name):
            adapter, name = name, base_of(name)
        view = view_of(locate(name, EMBEDDED))
        config = _config(view)
        if attn is not None:
            options["attn_implementation"] = attn
        if quantization is not None:
            options["quantization_config"] = _quantization(quantization)
        placed = device_map is not None or quantization is not None
        if placed:
            options["device_map"] = device_map or {"": target}
            options["offload_folder"] = str(view / "offload")
        model = load_weights(AutoModelForImageTextToText, view, config, **options)
        if quantization is not None:
            _check_quantized(model, quantization)
        with naming("its tokenizer or image processor cannot be used"):
            processor = AutoProcessor.from_pretrained(view, trust_remote_code=False)
        check_processor(processor, config)
        model, _ = _named(
            model if placed else model.to(target), processor, processor.tokenizer, name
        )
    if adapter is not None:
        add_adapter(model, adapter)
    return model.eval(), processor


def load_language(name: str, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """Returns a text-only language model and its tokenizer.

    Only safetensors are read, and no code from the checkpoint is run.

    Args:
        name: a folder or a hub name.
        device: as for `load`.
        dtype: as for `load`.

    Raises:
        InputError: as for `load`, or if the model sees images.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = device_of(device)
    kind = _dtype(dtype, target.type)
    with naming(f"cannot load model {name!r}"):
        view = view_of(locate(name, EMBEDDED))
        config = read_config(view)
        if has_vision(config):
            raise InputError(f"{name!r} is a model that sees images; give a text-only one")
        model = load_weights(AutoModelForCausalLM, view, config, dtype=kind)
        with naming("its tokenizer cannot be used"):
            tokenizer = AutoTokenizer.from_pretrained(view, trust_remote_code=False)
        return _named(model.to(target).eval(), tokenizer, tokenizer, name)


def save(model: Any, processor: Any, folder: Path) -> None:
    """Writes a model and its processor as a plain checkpoint, all of it or nothing.

    Args:
        model: to write.
        processor: of the model.
        folder: to write into.

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
    """Returns the adapter class for a checkpoint from its configuration alone.

    Raises:
        InputError: if there is no such checkpoint, or its family is unsupported.
    """
    from vlm_prune.vlm.families import FAMILIES

    return FAMILIES[config_of(name).model_type]


def config_of(name: str) -> Any:
    """Returns the configuration of a checkpoint, without its weights.

    Raises:
        InputError: if there is no such checkpoint, or its family is unsupported.
    """
    with naming(f"cannot load model {name!r}"):
        name = base_of(name) if is_adapter(name) else name
        return _config(view_of(locate(name, EMBEDDED, weights=False), weights=False))


def has_vision(config: Any) -> bool:
    """Returns whether a configuration is of a model with a vision tower."""
    return hasattr(config, "vision_config")


def sees_images(name: str) -> bool:
    """Returns whether a checkpoint is of a model with a vision tower.

    Args:
        name: as for `load`, or the folder or hub name of a text-only language model.

    Raises:
        InputError: if there is no such checkpoint.
    """
    with naming(f"cannot load model {name!r}"):
        view = view_of(locate(name, EMBEDDED, weights=False), weights=False)
        return has_vision(read_config(view))


def check_loadable(
    name: str,
    dtype: str = "auto",
    adapter: str | None = None,
    attn: str | None = None,
    quantization: str | None = None,
    device_map: Any = None,
) -> None:
    """Finds out whether `load` could take a checkpoint, without reading its weights.

    Args:
        name: as for `load`.
        dtype: as for `load`.
        adapter: as for `load`.
        attn: as for `load`.
        quantization: as for `load`.
        device_map: as for `load`.

    Raises:
        InputError: as for `load`, except for what the weights themselves are.
    """
    from safetensors import safe_open
    from transformers import AutoProcessor

    _dtype(dtype, "")
    _check_choices(attn, quantization, device_map)
    if quantization is not None:
        _quantization(quantization)
    with naming(f"cannot load model {name!r}"):
        folder = locate(base_of(name) if is_adapter(name) else name, EMBEDDED)
        for file in weight_files(folder):
            with safe_open(folder / file, "pt"):
                pass
        view = view_of(folder, weights=False)
        config = _config(view)
        with naming("its tokenizer or image processor cannot be used"):
            processor = AutoProcessor.from_pretrained(view, trust_remote_code=False)
        check_processor(processor, config)
    if adapter is not None:
        read_lora(adapter)


def _check_choices(attn: str | None, quantization: str | None, device_map: Any) -> None:
    """Raises `InputError` for a kernel, a quantization or a device map that is not known.

    Args:
        attn: attention kernel, or None.
        quantization: name of a quantization, or None.
        device_map: `auto`, a map, or None.
    """
    if attn is not None and attn not in ATTENTION:
        raise InputError(unknown("attention", attn, ATTENTION))
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise InputError(unknown("quantization", quantization, QUANTIZATIONS))
    if isinstance(device_map, str) and device_map != "auto":
        raise InputError(unknown("device map", device_map, ["auto"]))


def device_of(name: str) -> Any:
    """Returns the device of a name; `auto` is the accelerator of this machine, or the CPU.

    Raises:
        InputError: if there is no such kind of device, or none here.
    """
    import torch

    if name == "auto":
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}; give auto, cpu, cuda, cuda:1 or mps") from None
    try:
        torch.empty(1, device=device).cpu()
    except Exception as error:
        raise InputError(f"there is no device {name!r} here; give auto or cpu") from error
    return device


def choose_device(name: str) -> str:
    """Returns the name of a device, and says on the error stream which GPU `auto` has become.

    Raises:
        InputError: if there is no such device.
    """
    chosen = str(device_of(name))
    if name != "auto":
        return name
    if chosen != "cpu":
        print(f"device: {chosen}", file=sys.stderr)
    return chosen


def _dtype(name: str, device: str) -> str:
    if name not in DTYPES:
        raise InputError(unknown("dtype", name, DTYPES))
    return "float32" if name == "auto" and device == "cpu" else name


def _quantization(name: str) -> Any:
    """Returns the library's configuration of a quantization."""
    from importlib import import_module
    from importlib.util import find_spec

    library = QUANTIZATIONS[name]
    if find_spec(library) is None:
        raise InputError(f"{name} needs {library}: pip install {library}")
    if name == "torchao-int4" and find_spec("mslk") is None:
        raise InputError(
            "torchao-int4 needs the kernels of mslk, which PyTorch's package index has (PyPI's is empty); "
            "install them or give torchao-int8"
        )
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if library == "bitsandbytes":
        return BitsAndBytesConfig(load_in_4bit=name == "bnb-4bit", load_in_8bit=name == "bnb-8bit")
    kinds = import_module("torchao.quantization")
    kind = kinds.Int8WeightOnlyConfig if name == "torchao-int8" else kinds.Int4WeightOnlyConfig
    return TorchAoConfig(quant_type=kind())


def _check_quantized(model: Any, name: str) -> None:
    """Refuses a model that a library left as it was, or whose modules it packs but cannot compute; says
    how much it left where that is a part.

    Args:
        model: as loaded; one module of each size is called.
        name: of the quantization.
    """
    import torch

    def is_plain(weight: Any) -> bool:
        kinds = (torch.Tensor, torch.nn.Parameter)
        return type(weight.data) in kinds and weight.is_floating_point()

    if all(map(is_plain, model.parameters())):
        raise InputError("its modules are too narrow for this quantization; leave it out")
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and not m.weight.is_meta]
    inner = [m for m in linear if m is not model.get_output_embeddings()]
    left = sum(is_plain(m.weight) for m in inner)
    if left:
        kind = str(model.dtype).removeprefix("torch.")
        print(
            f"{name}: {left} of {len(inner)} linear layers stay in {kind}, as the library quantizes "
            "no weights of their shape",
            file=sys.stderr,
        )
    for (inputs, outputs), module in {(m.in_features, m.out_features): m for m in linear}.items():
        tokens = torch.zeros(1, 2, inputs, dtype=model.dtype, device=module.weight.device)
        try:
            with torch.no_grad():
                module(tokens)
        except Exception as error:
            raise InputError(
                f"{name} cannot compute a layer of {inputs} x {outputs} on {tokens.device.type} "
                f"({first_line(error)}); leave it out or give another quantization"
            ) from error


def _config(view: Path) -> Any:
    from vlm_prune.vlm.families import check_supported

    check_supported(str(read_object(view / "config.json").get("model_type")))
    return read_config(view)


def check_processor(processor: Any, config: Any) -> None:
    """Refuses a processor that no prompt with an image can be made with.

    Raises:
        InputError: if it has no tokenizer, image processor or chat template, its image token is not
            the one of the model's configuration, its pixels are no usable numbers, or it makes
            crops by pan and scan.
    """
    for part in ("tokenizer", "image_processor", "chat_template"):
        if getattr(processor, part, None) is None:
            fix = "; put a chat_template.jinja into its folder" if part == "chat_template" else ""
            raise InputError(f"the checkpoint has no {part.replace('_', ' ')}{fix}")
    names = ("image_mean", "image_std", "rescale_factor")
    check_pixels(**{name: getattr(processor.image_processor, name, None) for name in names})
    if getattr(processor.image_processor, "do_pan_and_scan", False):
        raise InputError(
            "pan and scan makes crops that no prompt says which picture they are of; "
            "set do_pan_and_scan to false in the checkpoint's processor configuration"
        )
    token = getattr(processor, "image_token", None)
    wanted = getattr(config, "image_token_id", None)
    if isinstance(token, str) and wanted is not None:
        found = processor.tokenizer.convert_tokens_to_ids(token)
        # Gemma's marker of an image stands for a run of other tokens
        marked = getattr(processor.tokenizer, "boi_token", None) == token
        if (processor.tokenizer.image_token_id if marked else found) != wanted:
            raise InputError(
                f"image token {token!r} is {found} in the tokenizer, {wanted} in config.json"
            )
    try:
        processor.apply_chat_template(PROMPT, add_generation_prompt=True)
    except Exception as error:
        raise InputError(f"the chat template fails: {first_line(error)}") from error


def _named(model: Any, processor: Any, tokenizer: Any, name: str) -> tuple[Any, Any]:
    """Writes into model and tokenizer where they come from, not which links were read,
    and returns model and processor.

    Args:
        model: as loaded.
        processor: as loaded.
        tokenizer: of the processor.
        name: that was asked for.
    """
    name = str(EMBEDDED.get(name, name))
    model.name_or_path = model.config.name_or_path = tokenizer.name_or_path = name
    return model, processor
