"""Fused attention as separate q, k, v and o linear maps, and back without loss.

Adapters need one `nn.Linear` per matrix. open_clip fuses q, k and v in `nn.MultiheadAttention` or
in an attention of its own with the same `in_proj_weight`; timm in a linear map named `qkv`. They
are told apart by these attributes, not by class. Hugging Face's CLIP is split already.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_prune.continual.config import Module, Tower, tower_of
from vlm_prune.vlm.common.errors import InputError

BLOCK = re.compile(r"(?P<before>.*?)(?:resblocks|blocks|layers)\.(?P<layer>\d+)\.(?P<part>.+)")
PARTS: dict[str, Module] = {
    **{f"{a}.{m}_proj": m for a in ("attn", "self_attn") for m in ("q", "k", "v")},
    **{f"attn.qkv.{m}": m for m in ("q", "k", "v")},
    "attn.out_proj": "o",
    "self_attn.out_proj": "o",
    "attn.proj": "o",
    **{f"mlp.{name}": "in" for name in ("c_fc", "fc1")},
    **{f"mlp.{name}": "out" for name in ("c_proj", "fc2")},
}


@dataclass(frozen=True)
class Site:
    """One linear map of one block of one tower."""

    name: str
    tower: Tower
    layer: int
    module: Module


def sites(model: nn.Module) -> dict[str, Site]:
    """Returns every linear map of the two transformers by its name in
    `model`, which must be split.
    """
    found = {}
    for name, module in model.named_modules():
        match = BLOCK.fullmatch(name)
        if match and isinstance(module, nn.Linear) and match["part"] in PARTS:
            found[name] = Site(name, tower_of(name), int(match["layer"]), PARTS[match["part"]])
    return found


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    # without memory for weights that are replaced at once
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return linear


def _thirds(tensor: Tensor | None) -> tuple[Any, ...]:
    return (None,) * 3 if tensor is None else tensor.chunk(3)


def _joined(parts: list[nn.Linear]) -> tuple[nn.Parameter, nn.Parameter | None]:
    weight = nn.Parameter(torch.cat([p.weight.detach() for p in parts]))
    if parts[0].bias is None:
        return weight, None
    return weight, nn.Parameter(torch.cat([p.bias.detach() for p in parts]))


class SplitAttention(nn.Module):
    """Attention over separate projections; built from, and turned back into, a fused one."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        weights, biases = _thirds(fused.in_proj_weight), _thirds(fused.in_proj_bias)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = fused.out_proj
        self.num_heads: int = fused.num_heads
        # kept to be put back, out of the reach of state_dict() and parameters()
        fused.in_proj_weight = fused.in_proj_bias = None
        self._fused = (fused,)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the attention's output, (M, L, d).

        Args:
            query: (M, L, d).
            key: (M, S, d).
            value: (M, S, d).
            mask: (L, S) or (M * heads, L, S), bool (true hides) or additive; None shows all.
        """
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        q, k, v = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v)
        )  # (M, heads, L, d_head)
        # (M heads, L, L) -> (M, heads, L, L)
        if mask is not None and mask.ndim == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))
        if mask is not None and mask.dtype == torch.bool:
            mask = ~mask  # True hides a token in these modules, and shows it in the function below
        q, k = self.normalize(q, k)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.project(mixed)

    def normalize(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k

    def project(self, mixed: Tensor) -> Tensor:
        """Joins heads and applies the output projection, (M, heads, L, d_head) -> (M, L, d)."""
        output: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return output

    def fuse(self) -> Any:
        fused = self._fused[0]
        weight, bias = _joined([self.q_proj, self.k_proj, self.v_proj])
        fused.in_proj_weight, fused.in_proj_bias, fused.out_proj = weight, bias, self.out_proj
        return fused


class SplitMultihead(SplitAttention):
    """In place of `nn.MultiheadAttention`."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Returns the output and no weights, as `nn.MultiheadAttention` does.

        Args:
            query: (M, L, d), or (L, M, d) unless the fused module has the batch first.
            key: likewise with S tokens.
            value: likewise with S tokens.
            need_weights: ignored; no block of a CLIP reads them.
            attn_mask: as for `attend`.
        """
        if self._fused[0].batch_first:
            return self.attend(query, key, value, attn_mask), None
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        return self.attend(query, key, value, attn_mask).transpose(0, 1), None


class SplitCustom(SplitAttention):
    """In place of open_clip's own attention, with its optional norms and head scales."""

    def __init__(self, fused: Any) -> None:
        super().__init__(fused)
        self.ln_q, self.ln_k, self.ln_inner = fused.ln_q, fused.ln_k, fused.ln_inner
        self.head_scale = fused.head_scale

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return self.attend(x, x, x, attn_mask)

    def normalize(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.ln_q(q), self.ln_k(k)

    def project(self, mixed: Tensor) -> Tensor:
        if self.head_scale is not None:
            mixed = mixed * self.head_scale
        output: Tensor = self.out_proj(self.ln_inner(mixed.transpose(1, 2).flatten(2)))
        return output

    def fuse(self) -> Any:
        fused = super().fuse()
        fused.head_scale = self.head_scale
        return fused


class SplitQKV(nn.Module):
    """In place of timm's fused `qkv` map; the attention around it stays."""

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        self.q, self.k, self.v = map(_linear, _thirds(fused.weight), _thirds(fused.bias))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)

    def fuse(self) -> nn.Linear:
        return _linear(*_joined([self.q, self.k, self.v]))


def split(model: nn.Module) -> None:
    """Replaces every fused attention inside a transformer block, in place; outputs stay the same.

    Raises:
        InputError: for an attention that cannot be split.
    """
    for path, module in list(model.named_modules()):
        if not BLOCK.fullmatch(path) or isinstance(module, SplitAttention):
            continue
        parent, name = _parent(model, path)
        if getattr(module, "in_proj_weight", None) is not None:
            custom = not isinstance(module, nn.MultiheadAttention)
            if custom and getattr(module, "logit_scale", None) is not None:
                raise InputError(f"{path} is scaled cosine attention, which cannot be split")
            setattr(parent, name, SplitCustom(module) if custom else SplitMultihead(module))
        elif name == "qkv" and isinstance(module, nn.Linear):
            if module.out_features % 3 or getattr(parent, "q_bias", None) is not None:
                raise InputError(f"{path} has biases of its own for q and v and cannot be split")
            setattr(parent, name, SplitQKV(module))


def fuse(model: nn.Module) -> None:
    """Undoes `split`, in place: the state dict has exactly the keys that it had before."""
    for path, module in list(model.named_modules()):
        if isinstance(module, SplitAttention | SplitQKV):
            parent, name = _parent(model, path)
            setattr(parent, name, module.fuse())


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    before, _, name = path.rpartition(".")
    return model.get_submodule(before), name
