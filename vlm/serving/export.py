"""Checkpoints that both transformers and vLLM load."""

from pathlib import Path

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import output_folder, write_folder
from vlm_prune.vlm.stored_weights import rename_weights


def export(name: str, folder: Path) -> int:
    """Saves a model and its processor so that transformers and vLLM both load the folder.

    Args:
        name: `tiny`, `smol`, a checkpoint folder, or a hub name; weights keep their type.
        folder: where to; it must be new or empty.

    Returns:
        The number of weights.

    Raises:
        InputError: if the folder is none for results or holds something, or the model cannot be
            loaded.
    """
    from vlm_prune.vlm.load import DTYPES, config_of, load

    if output_folder(folder).exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; give a new folder")
    dtype = str(config_of(name).dtype).removeprefix("torch.")
    model, processor = load(name, dtype=dtype if dtype in DTYPES else "float32")

    def fill(partial: Path) -> None:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        rename_weights(partial)

    write_folder(folder, fill)
    return len(model.state_dict())
