"""What of a checkpoint reaches the libraries that load it: known files, without keys that lead elsewhere.

The configuration of a checkpoint can name Python files of its folder, kernels of the Hub, other
checkpoints and files outside. So loaders get a folder of links to the known files, and the JSON among
them is written anew without such keys.
"""

import atexit
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from vlm_prune.vlm.common.errors import InputError, naming
from vlm_prune.vlm.common.files import read_object, write_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SETTINGS = (
    CONFIG,
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
VOCABULARIES = (
    "tokenizer.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")

HIDDEN = frozenset(
    (
        # Python files of the checkpoint
        "auto_map",
        "custom_generate",
        "custom_pipelines",
        "trust_remote_code",
        "code_revision",
        # kernels of the Hub
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "kernel_config",
        "use_kernels",
        "fusion_config",
        # other files and other checkpoints
        "audio_tokenizer",
        "configuration_files",
        "fast_tokenizer_files",
        "gguf_file",
        "init_inputs",
        "merges_file",
        "spm_file",
        "tokenizer_file",
        "tokenizer_object",
        "transformers_weights",
        "use_pretrained_backbone",
        "vocab_file",
    )
)
"""Keys of a configuration that no loader gets to see, at any depth."""

CLASSES = {
    "tokenizer_class": re.compile(r"(?!Auto)\w+(Tokenizer|TokenizerFast|Backend)"),
    "processor_class": re.compile(r"(?!Auto)\w+Processor"),
    "image_processor_type": re.compile(r"(?!Auto)\w+(ImageProcessor\w*|FeatureExtractor)"),
    "feature_extractor_type": re.compile(r"(?!Auto)\w+(ImageProcessor\w*|FeatureExtractor)"),
    "video_processor_type": re.compile(r"(?!Auto)\w+VideoProcessor\w*"),
}
"""What a class may be called that a configuration names; transformers would take any of its classes."""

SMALL = 2**27  # weights that cost no memory to speak of
DEPTHS = ("num_hidden_layers", "depth", "num_layers", "n_layer", "n_layers", "encoder_layers")
# buffers that older versions of transformers stored
BUFFERS = re.compile(r"(.*\.)?(position_ids|inv_freq|masked_bias|num_batches_tracked)")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def locate(name: str, embedded: Mapping[str, Path], weights: bool = True) -> Path:
    """Returns the folder of a checkpoint: an embedded one, a folder, or
    what the Hub has of that name.

    Only known files are downloaded, and only for a name of the form `owner/model`.

    Args:
        name: what a user gave.
        embedded: folders of embedded models by name.
        weights: whether the weights are wanted, too.

    Raises:
        InputError: if there is no such folder and the name is none of the Hub's.
        OSError: if the Hub has no such model, or cannot be reached.
    """
    if name in embedded:
        return embedded[name]
    folder = Path(name)
    if name and folder.is_dir():
        return folder
    if folder.exists():
        raise InputError("it is no folder; give the folder of a checkpoint")
    if HUB_NAME.fullmatch(name) or _cached(name):
        return _download(name, weights)
    near = get_close_matches(name, embedded) or [
        str(folder.parent / other)
        for other in get_close_matches(folder.name, _names(folder.parent))
    ]
    known = ", ".join([*map(repr, embedded), "a checkpoint folder"])
    hint = f"did you mean {near[0]!r}?" if near else f"give {known}, or owner/model"
    raise InputError(f"there is no such model; {hint}")


def locate_files(name: str | Path, files: list[str]) -> Path:
    """Returns the folder with some files that lie beside a model, such as an adapter's.

    Args:
        name: a folder, or a name of the form `owner/model` on the Hub.
        files: what is downloaded; a folder may lack them.

    Raises:
        InputError: if there is no such folder and the name is none of the Hub's.
        OSError: if the Hub has nothing of that name, or cannot be reached.
    """
    if str(name) and Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or not HUB_NAME.fullmatch(str(name)):
        raise InputError("there is no such folder; give one, or owner/model of the Hub")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name), allow_patterns=files))


def weight_stamps(name: str) -> list[tuple[str, int, int]]:
    """Returns name, size and time of change (ns) of the weights in a folder, or of a file; none for other
    names.
    """
    path = Path(name)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) if name else []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _names(folder: Path) -> list[str]:
    """Returns the names of the folders in a folder that hold a checkpoint."""
    if not folder.is_dir():
        return []
    return [path.name for path in folder.iterdir() if (path / CONFIG).is_file()]


def _cached(name: str) -> bool:
    """Returns whether the local cache has a model of a name without owner,
    as old models of the Hub have.
    """
    from huggingface_hub import try_to_load_from_cache

    return re.fullmatch(r"[\w.-]+", name) is not None and isinstance(
        try_to_load_from_cache(name, CONFIG), str
    )


def _download(name: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    offline = "/" not in name
    files = [*SETTINGS, *VOCABULARIES, *TEMPLATES, INDEX]
    folder = Path(snapshot_download(name, allow_patterns=files, local_files_only=offline))
    if weights:
        shards = [WEIGHTS]
        if (folder / INDEX).is_file():
            shards += set(_weight_map(folder / INDEX).values())
        revision = folder.name
        folder = Path(
            snapshot_download(
                name, revision=revision, allow_patterns=shards, local_files_only=offline
            )
        )
    return folder


def view_of(folder: Path, weights: bool = True) -> Path:
    """Makes a new folder with what loaders may see of a checkpoint; it goes when the program ends.

    Args:
        folder: the checkpoint.
        weights: whether the view shall have the weights, too.

    Raises:
        InputError: if a file is damaged, names a class of another kind, or weights are missing or
            no
            safetensors.
    """
    if not (folder / CONFIG).is_file():
        raise InputError(f"{str(folder)!r} holds no config.json, so it is no checkpoint folder")
    files = weight_files(folder) if weights else []
    view = make_view(folder, SETTINGS, [*VOCABULARIES, *TEMPLATES, *files])
    if weights and files != [WEIGHTS]:
        write_json(view / INDEX, {"metadata": {}, "weight_map": _weight_map(folder / INDEX)})
    return view


def make_view(folder: Path, settings: Iterable[str], files: Iterable[str]) -> Path:
    """Makes a new folder with some files of another one; it goes when the program ends.

    Args:
        folder: where the files are; those that are not there are left out.
        settings: JSON files, which are written anew without the keys that loaders do not get.
        files: names or patterns of files that are linked as they are.

    Raises:
        InputError: if a JSON file is damaged or names a class of another kind.
    """
    view = Path(mkdtemp(prefix="vlm-prune-checkpoint-"))
    atexit.register(shutil.rmtree, view, ignore_errors=True)
    for name in settings:
        if (folder / name).is_file():
            content = read_object(folder / name)
            _check_classes(content, folder / name)
            write_json(view / name, without_hidden(content))
    for name in files:
        for path in folder.glob(name):
            if path.is_file():
                link = view / path.relative_to(folder)
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(path.resolve())
    return view


def without_hidden(settings: Any) -> Any:
    """Returns settings without the keys that no loader gets to see."""
    if isinstance(settings, dict):
        return {k: without_hidden(v) for k, v in settings.items() if k not in HIDDEN}
    if isinstance(settings, list):
        return [without_hidden(value) for value in settings]
    return settings


def _check_classes(settings: Any, path: Path) -> None:
    if isinstance(settings, dict):
        for key, value in settings.items():
            pattern = CLASSES.get(key)
            if pattern and value and not (isinstance(value, str) and pattern.fullmatch(value)):
                raise InputError(f"{path}: {key} {value!r} is no class of that kind")
            _check_classes(value, path)
    elif isinstance(settings, list):
        for value in settings:
            _check_classes(value, path)


def weight_files(folder: Path) -> list[str]:
    """Returns the names of the safetensors files that hold a checkpoint's weights.

    Raises:
        InputError: if there are none, one is missing, or the weights are a pickle.
    """
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        what = (
            f"only {pickles[0]}, a pickle, which is not read; convert it" if pickles else "missing"
        )
        raise InputError(f"{str(folder)!r} has no {WEIGHTS} ({what})")
    names = sorted(set(_weight_map(folder / INDEX).values()))
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{str(folder)!r} lacks {name}, which {INDEX} names")
    return names


def _weight_map(index: Path) -> dict[str, str]:
    """Returns the file of each tensor; files lie beside the index.

    Raises:
        InputError: if the index has no such map, or names other files.
    """
    found = read_object(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise InputError(f"{index} has no weight_map")
    for name in found.values():
        if not (isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)):
            raise InputError(f"{index} names {name!r}, which is no safetensors file beside it")
    return found


def read_config(view: Path) -> Any:
    """Returns the configuration of a checkpoint, given its view.

    Raises:
        InputError: if a part of the model is timm's, which can load files of other checkpoints.
    """
    from transformers import AutoConfig

    with naming("its config.json cannot be used"):
        config = AutoConfig.from_pretrained(view, trust_remote_code=False)
    for part in _parts(config):
        if part.model_type.startswith("timm_"):
            raise InputError(f"a {part.model_type} inside of {config.model_type} is not supported")
    return config


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield from _parts(part)


def load_weights(kind: Any, view: Path, config: Any, **options: Any) -> Any:
    """Returns the model of a configuration with the weights of a view.

    Args:
        kind: a class with `from_pretrained`.
        view: what `view_of` gave.
        config: the model's configuration.
        options: for `from_pretrained`.

    Raises:
        InputError: if weights are missing, not finite, of another shape, or more than the
            configuration describes.
    """
    from transformers.utils import logging

    _check_size(kind, view, config)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would report is refused below
    try:
        model, report = kind.from_pretrained(
            view, config=config, use_safetensors=True, trust_remote_code=False,
            ignore_mismatched_sizes=True, output_loading_info=True, **options,
        )  # fmt: skip
    finally:
        logging.set_verbosity(verbosity)
    check_report(report["missing_keys"], report["unexpected_keys"], report["mismatched_keys"])
    if report["error_msgs"]:
        raise InputError(" ".join(str(report["error_msgs"][0]).split()))
    check_finite(dict(model.named_parameters()))
    return model


def check_report(missing: Any, unexpected: Any, mismatched: Any = ()) -> None:
    """Refuses weights that are not those of a configuration.

    Args:
        missing: names that the configuration asks for.
        unexpected: names that it does not know.
        mismatched: names with the stored shape and the shape that it asks for.

    Raises:
        InputError: unless all are empty, buffers of older versions apart.
    """
    unexpected = [name for name in unexpected if not BUFFERS.fullmatch(name)]
    for names, what in (
        (missing, "the weights lack tensors of the configuration"),
        (unexpected, "the weights hold tensors which the configuration does not describe"),
    ):
        if names:
            raise InputError(f"{what} ({len(names)}, first {min(names)!r})")
    if mismatched:
        name, stored, wanted = min(mismatched)
        raise InputError(
            f"the weights' {name!r} is {tuple(stored)} where the configuration describes {tuple(wanted)}"
        )


def check_finite(tensors: Mapping[str, Any]) -> None:
    """Refuses weights that are no numbers; quantized and offloaded ones are left alone.

    Raises:
        InputError: with the name of the first.
    """
    import torch

    floats = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    for name, tensor in tensors.items():
        data = tensor.detach()
        plain = type(data) in (torch.Tensor, torch.nn.Parameter) and data.dtype in floats
        if not plain or data.is_meta or not data.numel():
            continue
        # the least and the greatest are finite only if all are, and need no copy
        if not all(map(torch.isfinite, data.aminmax())):
            raise InputError(f"the weights' {name!r} has values that are not finite")


def _check_size(kind: Any, view: Path, config: Any) -> None:
    """Refuses a configuration of a far larger model than the weights',
    before memory is taken for it.

    Args:
        kind: class of the model.
        view: folder with the weights.
        config: that is checked.
    """
    import torch
    from safetensors import safe_open

    names, stored, largest = 0, 0, 0
    for file in weight_files(view):
        with safe_open(view / file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                part = tensors.get_slice(name)
                size = 1
                for length in part.get_shape():
                    size *= length
                # quantized weights are packed, up to eight of them in an integer
                size *= 1 if part.get_dtype().startswith(("F", "BF")) else 8
                names, stored, largest = names + 1, stored + size, max(largest, size)
    for part in _parts(config):
        for key in DEPTHS:
            depth = getattr(part, key, 0)
            if isinstance(depth, int) and depth > names:
                raise InputError(f"{key} is {depth}, but the weights are {names} tensors")
    with torch.device("meta"):
        build = getattr(kind, "from_config", kind)
        model = build(deepcopy(config))
    described = sum(parameter.numel() for parameter in model.parameters())
    # embeddings may be stored once and used twice; what is a little less is told by name later
    if described > stored + largest + SMALL:
        raise InputError(
            f"the configuration describes {described:,} weights, but {stored:,} are stored"
        )


def check_pixels(**numbers: Any) -> None:
    """Refuses what pixels are normalized with if it cannot be used.

    Args:
        numbers: by name, a number, a sequence of them, or None.

    Raises:
        InputError: if something is no finite number, or 0 other than in a mean.
    """
    for name, value in numbers.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise InputError(f"{name} {value!r} is no number")
            if not math.isfinite(number) or (number == 0 and "mean" not in name):
                raise InputError(f"{name} {value!r} cannot normalize pixels")
