"""How much memory a forward pass keeps for its backward pass."""

import torch
from torch import Tensor


class SavedActivations(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that a forward pass within the block keeps for its backward pass; parameters
    do not count, and tensors that share memory count once.
    """

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        super().__init__(self._note, lambda tensor: tensor)

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter):
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        """Returns the bytes counted so far."""
        return sum(self.sizes.values())
