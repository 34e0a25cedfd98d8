"""SALE: products in four bits, relative to what a row pays nearby."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlm_prune.pruning.attention.base import BlockAttention, Calibrated
from vlm_prune.pruning.attention.blocks import Geometry, KeptBlocks
from vlm_prune.pruning.attention.calibration import HeadCalibration, check_found, read_prompts
from vlm_prune.pruning.attention.engine import BlockRun, PromptRow
from vlm_prune.pruning.attention.executors import attend_dense, attend_gather
from vlm_prune.pruning.attention.inputs import AttentionInputs
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.sparse_attention import AttentionCall


@dataclass
class Sale(Calibrated, BlockAttention):
    """Keep blocks in which any product, in four bits, is large beside a row's sum over near keys.

    https://arxiv.org/abs/2505.24179

    The mean key is taken from all keys, which changes no softmax, and the mean query from all
    queries; what it pays each key is added in full precision. A row's sum is over the first quarter
    block of keys and at least a block before the row. Query blocks are half of a `block`, key blocks a
    quarter. Each token has a scale of its own. Four bits are computed in full precision here, so that
    an estimate costs half of dense attention: this is a reference for accuracy.

    The authors find a threshold for each head by calibration, as `calibrate_sale` does.

    Args:
        calibration: file of `calibrate_sale`, whose thresholds stand in for `threshold`; without a
            `density`.
        threshold: without a `density`, the least share of a row's near sum.
        row_step: one of so many rows is estimated.
        bits: of the products; 0 for exact ones.
    """

    threshold: float = 0.008
    row_step: int = 1
    bits: int = 4
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.24179"
    from_zero: ClassVar[frozenset[str]] = BlockAttention.from_zero | {"bits"}
    registered: ClassVar[str] = "sale"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration and self.density is not None:
            raise InputError(
                "calibrated thresholds decide what SALE keeps, and so does a density; give density=null"
            )
        if self.block % 4:
            raise InputError(
                f"SALE splits blocks in four; {self.block} tokens are no multiple of 4"
            )
        if self.bits == 1:
            raise InputError("one bit holds no product; give 2 or more, or 0 for exact products")
        if self.row_step > self.block // 2:
            raise InputError(f"row_step {self.row_step} is above a query block's {self.block // 2}")

    def geometry(self, inputs: AttentionInputs) -> Geometry:
        return Geometry(self.block // 2, self.block // 4, self.block, self.block)

    def rounded(self, tensor: Tensor) -> Tensor:
        """Returns numbers (..., d) rounded to `bits` bits, with a scale for each row."""
        if not self.bits:
            return tensor
        levels = 2 ** (self.bits - 1) - 1
        scale = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-12) / levels
        rounded: Tensor = (tensor / scale).round() * scale
        return rounded

    def near_sums(self, query: Tensor, key: Tensor, most: int) -> Tensor:
        """Returns the logarithm of each row's sum of exponentials over near keys, (G, H / G, n).

        Args:
            query: (G, H / G, n, d), scaled.
            key: (G, n, d).
            most: products that may be held at a time.
        """
        rows, sink, length = self.block // 2, self.block // 4, key.shape[1]
        width = self.block + rows
        # of each query block the keys of a block before it and its own, (G, blocks, d, width)
        windows = pad(key, (0, 0, self.block, 0)).unfold(1, width, rows)
        blocks = windows.shape[1]
        # (G, blocks, H / G x rows, d): heads that share keys are rows of one product
        blocked = query.unflatten(2, (blocks, rows)).transpose(1, 2).flatten(2, 3)
        found = torch.empty(blocked.shape[:-1], device=key.device)
        first = key[:, None, :sink].transpose(-1, -2)
        index = torch.arange(length, device=key.device).unflatten(0, (blocks, rows))
        # the key that each query block's window begins with, negative in the first ones
        offset = index[:, :1] - self.block
        size = max(1, most // (query.shape[0] * query.shape[1] * rows * width))
        for begin in range(0, blocks, size):
            part = slice(begin, begin + size)
            own = offset[part, :, None] + torch.arange(width, device=key.device)
            seen = (own >= 0) & (own <= index[part, :, None])
            near = (blocked[:, part] @ windows[:, part]).unflatten(2, (-1, rows))
            near = near.masked_fill(~seen[:, None], -torch.inf)
            # keys of the sink that are in the window count there
            outside = torch.arange(sink, device=key.device) < offset[part, :, None]
            far = (blocked[:, part] @ first).unflatten(2, (-1, rows))
            far = far.masked_fill(~outside[:, None], -torch.inf)
            found[:, part] = torch.cat([near, far], -1).float().logsumexp(-1).flatten(2)
        by_head: Tensor = found.unflatten(2, (-1, rows)).transpose(1, 2).flatten(2)
        return by_head

    def thresholds(self, inputs: AttentionInputs) -> Tensor:
        """Returns each head's threshold, (H,); 0 where a head keeps everything."""
        found = self.found.of_layers("thresholds") if self.found else {}
        default = torch.full((inputs.heads,), self.threshold)
        return found.get(inputs.layer, default).to(inputs.key.device)

    def scores(self, inputs: AttentionInputs) -> Tensor:
        """Scores a block by the logarithm of its largest product less its row's near sum and less its
        head's threshold, (R, query blocks, key blocks).

        Heads that share a mask take the largest value of them.
        """
        geometry = self.geometry(inputs)
        rows, columns = geometry.rows, geometry.columns
        blocks, length = geometry.shape(inputs.length)[0], inputs.length
        query = inputs.grouped.float() * inputs.scaling
        key = inputs.key.float()
        key = key - key.mean(1, keepdim=True)
        sums = self.near_sums(query, key, inputs.most)
        mean = query.mean(2, keepdim=True)
        # a product also has what the mean query pays the key, in full precision, and its row's sum:
        # columns behind those of the four bits, so that one product gives all of it
        common = (mean @ key[:, None].transpose(-1, -2)).squeeze(2)
        own_head = torch.eye(common.shape[1], device=key.device)[:, None]
        coarse = torch.cat(
            [
                self.rounded(query - mean),
                own_head.expand(len(key), -1, length, -1),
                -sums[..., None],
            ],
            -1,
        )
        one = key.new_ones(len(key), length, 1)
        coarse_key = torch.cat([self.rounded(key), common.transpose(1, 2), one], -1)
        coarse = coarse.unflatten(2, (blocks, rows))[:, :, :, :: self.row_step]
        masks = inputs.heads if self.share == "head" else inputs.groups
        found = key.new_full((masks, *geometry.shape(length)), -torch.inf)
        # of each head, (G, H / G, 1, 1)
        least = self.thresholds(inputs).log().view(len(key), -1, 1, 1)
        size = max(1, inputs.most // (inputs.heads * coarse.shape[3] * length))
        for begin in range(0, blocks, size):
            part, before = slice(begin, begin + size), min(length, (begin + size) * rows)
            # rows of a query block, of all heads of a group, with the keys before its end
            products = coarse[:, :, part].flatten(1, 3) @ coarse_key[:, :before].transpose(1, 2)
            best = products.unflatten(2, (-1, columns)).amax(-1)
            # (G, H / G, blocks, rows, key blocks): the largest over rows
            best = best.unflatten(1, coarse[:, :, part].shape[1:4]).amax(3) - least
            best = best.flatten(0, 1) if self.share == "head" else best.amax(1)
            found[:, part, : before // columns] = best
        return found

    def window(self, inputs: AttentionInputs) -> Tensor:
        """Returns the key blocks that end inside the window before each query block,
        (query blocks, key blocks).
        """
        geometry = self.geometry(inputs)
        query, key = geometry.shape(inputs.length)
        index = torch.arange(max(query, key), device=inputs.key.device)
        ends = (index[:key] + 1) * geometry.columns
        return ends > index[:query, None] * geometry.rows - self.block

    def choose(self, inputs: AttentionInputs) -> Tensor:
        """Returns the blocks whose score reaches the threshold, and each query block's window,
        (R, query blocks, key blocks).
        """
        return (self.scores(inputs) >= 0) | self.window(inputs)


@dataclass
class ThresholdSearch(BlockRun):
    """Attends densely, and lowers thresholds of heads whose sparse attention would be too far off.

    Args:
        method: with masks of their own for all heads, and a threshold of 1.
        bound: absolute difference of a head's attention, summed over its width, the mean over tokens,
            that a threshold must stay below.
        start: the first threshold of each head.
        least: a head whose threshold would fall to this or below keeps everything: 0.
        thresholds: of the heads of each layer, (H,).
    """

    method: Sale
    bound: float = 0.4
    start: float = 0.008
    least: float = 1e-4
    thresholds: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, call: AttentionCall, prompt: PromptRow, row: int) -> list[Tensor]:
        """Returns dense attention of one prompt, (H, n, v), in one part.

        Args:
            call: of the layer.
            prompt: a row of it.
            row: its number.
        """
        dense = attend_dense(prompt.query, prompt.key, prompt.value, call.scaling)
        inputs = self.inputs_of(call, prompt)
        if inputs is not None:
            self.lower(inputs, prompt.value, dense)
        return [dense]

    def lower(self, inputs: AttentionInputs, value: Tensor, dense: Tensor) -> None:
        """Lowers the thresholds of a layer's heads by halves until all are near enough in one prompt.

        Args:
            inputs: queries and keys before the prompt's tail.
            value: (G, n, v), its tail included.
            dense: attention of all queries to all keys, (H, n, v).
        """
        geometry, length = self.method.geometry(inputs), inputs.length
        scores, window = self.method.scores(inputs), self.method.window(inputs)
        candidates = geometry.candidates(length, scores.device)
        # keys and values for each query head
        shared = inputs.heads // inputs.groups
        key, values = (
            part[:, :length].repeat_interleave(shared, 0) for part in (inputs.key, value)
        )
        start = torch.full((inputs.heads,), self.start, device=key.device)
        found = self.thresholds.setdefault(inputs.layer, start)
        heads = found.nonzero()[:, 0]
        while len(heads):
            reached = scores[heads] >= found[heads].log()[:, None, None]
            kept = KeptBlocks((reached | window) & candidates, geometry).forced(length)
            ours = attend_gather(
                inputs.query[heads], key[heads], values[heads], kept, inputs.scaling
            )
            off = (ours - dense[heads, :length]).abs().sum((1, 2), dtype=torch.float32)
            heads = heads[off >= self.bound * inputs.tokens]
            halves = found[heads] / 2
            found[heads] = torch.where(halves > self.least, halves, 0)
            heads = heads[found[heads] > 0]


def calibrate_sale(
    model: Any,
    prompts: Iterable[Mapping[str, Any]],
    method: Sale | None = None,
    bound: float = 0.4,
    least: float = 1e-4,
) -> HeadCalibration:
    """Returns a threshold for each layer and head, found on prompts, for `Sale(calibration=...)`.

    https://arxiv.org/abs/2505.24179

    A head starts at the method's `threshold`. It is halved until the head's attention differs from
    dense attention by less than `bound`: absolute differences summed over its width, their mean over
    tokens. Where it falls to `least` the head keeps everything, which is a threshold of 0. Prompts come
    one after the other, and thresholds only fall. The authors take 5 to 9 retrieval prompts of 200,000
    characters. Layers that a prompt leaves to SDPA, such as those of sliding windows, get none.

    Args:
        model: of a supported family.
        prompts: what its processor gives for them.
        method: its sizes, the first threshold and the shortest prompt; `Sale` as it is unless given.
        bound: of the difference.
        least: threshold of a head that keeps everything.

    Raises:
        InputError: if the model's attention cannot be replaced, or no prompt is long enough.
    """
    method = Sale(density=None) if method is None else method
    plain = replace(method, density=None, calibration="", share="head", threshold=1.0)
    search = ThresholdSearch(plain, bound=bound, start=method.threshold, least=least)
    count = read_prompts(model, search, prompts)
    check_found(search.thresholds, "SALE", method.minimum)
    tensors = {f"layers.{layer}.thresholds": own for layer, own in search.thresholds.items()}
    about = {"prompts": count, "bound": bound, "least": least, "method_options": asdict(method)}
    return HeadCalibration.of("sale", tensors, model, **about)
