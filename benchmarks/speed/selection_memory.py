"""Memory that methods hold beside the tokens while they choose."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from vlm_prune.vlm.encoded import Images


class PeakBytes(TorchDispatchMode):
    """Bytes of the tensors made inside that live at a time, at most; those of `given` do not count, nor
    do views of tensors from outside.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.alive, self.peak = WeakTensorKeyDictionary(), 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation and notes the tensors that it makes.

        Args:
            func: the operation.
            types: of its arguments.
            args: of it.
            kwargs: of it.
        """
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor not in self.alive:
                self.given.add(tensor.untyped_storage().data_ptr())
        output = func(*args, **kwargs or {})
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.alive[tensor] = storage.data_ptr(), storage.nbytes()
        sizes = {at: size for at, size in self.alive.values() if at not in self.given}
        self.peak = max(self.peak, sum(sizes.values()))
        return output


@torch.inference_mode()
def selection_memory(method: Any, vision: Images) -> float | None:
    """Returns peak bytes of choosing among encoded images or videos, as a
    multiple of the bytes of the tokens.

    The tokens are those that the language model gets. None for methods that choose inside it, or
    change pixels.
    """
    chooser = getattr(method, "pre", method)
    if chooser.stage not in ("encoder", "projector"):
        return None
    peak = 0.0
    for group in vision.groups:
        tokens = group.tokens
        # the tower's states are there whether a method reads them or not
        with PeakBytes([tokens.projected, tokens.features]) as measured:
            chooser.select(tokens)
        peak = max(peak, measured.peak / tokens.projected.nbytes)
    return peak
