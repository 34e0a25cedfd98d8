"""The methods that vLLM serves."""

from vlm_prune.pruning.registry import methods
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.serving.settings import Settings


def served():
    """Names of all methods that the plug-in takes."""
    for name in methods():
        try:
            Settings.read({"method": name})
        except InputError:
            continue
        if name != "none":
            yield name
