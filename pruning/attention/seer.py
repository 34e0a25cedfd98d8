"""SeerAttention: small gates, trained for a model, that tell blocks of keys which are paid attention."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_prune.pruning.attention.base import BlockAttention, Calibrated
from vlm_prune.pruning.attention.calibration import HeadCalibration, check_found, read_prompts
from vlm_prune.pruning.attention.engine import BlockRun, PromptRow
from vlm_prune.pruning.attention.executors import attend_dense
from vlm_prune.pruning.attention.inputs import AttentionInputs, blocks_before
from vlm_prune.vlm.attention import turns_neighbors
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.sparse_attention import AttentionCall

WARM_UP, BATCH = 20, 16


@dataclass
class Seer(Calibrated, BlockAttention):
    """Keep the blocks to which gates, trained for the model, give most of a query block's attention.

    https://arxiv.org/abs/2410.13276

    A gate reads queries and keys before rotation: of a block the mean query, and the largest, least and
    mean key. Linear maps, one for each key head, bring both to the width of a head, where they are
    rotated by the position of the block's middle token. Heads that share a key head share a gate, which
    reads the mean of their queries. `train_gates` trains them.

    Args:
        calibration: file of gates for the model; there is no default.
        block: tokens of a block, as the gates were trained with.
        threshold: without a `density`, the least share of a query block's attention.
    """

    block: int = 64
    threshold: float = 0.002
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.13276"
    registered: ClassVar[str] = "seer"
    reads_rotation: ClassVar[bool] = True

    def admit(self, model: Any) -> None:
        """Raises `InputError` for models without SDPA, or whose rotary pairs are neighbors, and without gates
        for the model and the size of blocks.
        """
        check_pairs(model)
        if self.found is None:
            raise InputError(
                "seer needs gates trained for the model; make them with vlm-prune calibrate seer, and "
                "give the file as calibration"
            )
        super().admit(model)
        if (block := self.found.about.get("block")) != self.block:
            raise InputError(
                f"{self.calibration} has gates for blocks of {block} tokens; give block={block}"
            )

    def gates(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Returns the maps of a layer's gates, of queries (G, d, d) and of keys (G, 3 d, d).

        Raises:
            InputError: if there are none for the layer.
        """
        assert self.found is not None
        query, key = (self.found.of_layers(what).get(inputs.layer) for what in ("query", "key"))
        if query is None or key is None:
            raise InputError(
                f"{self.calibration} has no gates for layer {inputs.layer}; give more dense_layers, or "
                "train them"
            )
        return query.to(inputs.key.device), key.to(inputs.key.device)

    def logits(self, inputs: AttentionInputs) -> Tensor:
        """Returns what gates give each pair of blocks, (G, blocks, blocks), before a softmax."""
        return gate_logits(*self.gates(inputs), GateExample.of(inputs, self.block))

    def scores(self, inputs: AttentionInputs) -> Tensor:
        return self.logits(inputs)

    def choose(self, inputs: AttentionInputs) -> Tensor:
        logits = self.logits(inputs)
        before = blocks_before(logits.shape[1], logits.device)
        return logits.masked_fill(~before, -torch.inf).softmax(-1) > self.threshold


def check_pairs(model: Any) -> None:
    """Raises `InputError` for models whose rotary pairs are neighbors in a head."""
    family = family_of(model)
    if turns_neighbors(family.decoder.layers[-1]):
        raise InputError(
            f"gates turn pairs of a head's two halves, and {family.model.config.model_type} models turn "
            "neighbors; give pooled"
        )


def half_turned(states: Tensor) -> Tensor:
    """Returns states (..., r) with each pair of their two halves turned by a right angle."""
    first, second = states.chunk(2, -1)
    return torch.cat([-second, first], -1)


def turned_by_positions(states: Tensor, rotary: Tensor, back: bool = False) -> Tensor:
    """Returns states (..., n, d), in fp32, turned by the positions of their tokens.

    Args:
        states: of which the first r numbers are turned.
        rotary: cosines and sines, (2, n, r), perhaps times a factor.
        back: whether to undo it.
    """
    cos, sin = rotary.float()
    turned, rest = states.float().split([cos.shape[-1], states.shape[-1] - cos.shape[-1]], -1)
    if back:
        # the factor is the length of each turn
        length = cos.square() + sin.square()
        cos, sin = cos / length, -sin / length
    return torch.cat([turned * cos + half_turned(turned) * sin, rest], -1)


@dataclass(frozen=True)
class GateExample:
    """What gates read of one prompt in one layer, and what they learn.

    Args:
        query: mean of each block, and of the heads that share a key head, (G, blocks, d).
        key: the largest, least and mean numbers of each block, side by side, (G, blocks, 3 d).
        rotary: of each block's middle token, (2, blocks, r); None where positions are not known.
        target: shares of each query block's attention, (G, blocks, blocks); None where nothing is learned.
    """

    query: Tensor
    key: Tensor
    rotary: Tensor | None
    target: Tensor | None = None

    @classmethod
    def of(cls, inputs: AttentionInputs, block: int) -> "GateExample":
        """Returns what gates read of rotated queries and keys."""
        query, key, rotary = inputs.query, inputs.key, inputs.rotary
        if rotary is not None:
            query, key = (turned_by_positions(part, rotary, back=True) for part in (query, key))
            rotary = rotary[:, block // 2 :: block]
        blocks = key.float().unflatten(1, (-1, block))
        pooled = torch.cat([blocks.amax(2), blocks.amin(2), blocks.mean(2)], -1)
        # (H, n, d) -> (G, H / G, blocks, block, d) -> (G, blocks, d)
        grouped = query.float().unflatten(0, (inputs.groups, -1)).unflatten(2, (-1, block))
        return cls(grouped.mean((1, 3)), pooled, rotary)


def gate_logits(query_map: Tensor, key_map: Tensor, example: GateExample) -> Tensor:
    """Returns what gates give each pair of blocks, (..., G, blocks, blocks), before a softmax.

    Args:
        query_map: (G, d, d).
        key_map: (G, 3 d, d).
        example: what they read, perhaps of several prompts, (..., G, blocks, d).
    """
    query, key = example.query @ query_map, example.key @ key_map
    if example.rotary is not None:
        query, key = (turned_by_positions(part, example.rotary) for part in (query, key))
    found: Tensor = query @ key.transpose(-1, -2) * query_map.shape[-1] ** -0.5
    return found


def pooled_attention(inputs: AttentionInputs, block: int) -> Tensor:
    """Returns the largest attention between the tokens of two blocks, as a share of a query block's sum,
    (G, blocks, blocks); of heads that share a key head the largest.

    Args:
        inputs: queries and keys.
        block: tokens of a block.
    """
    blocks = inputs.length // block
    found = torch.zeros(inputs.groups, blocks, blocks, device=inputs.key.device)
    for number, weights in enumerate(inputs.block_rows(block)):
        largest = weights.amax((1, 2)).unflatten(1, (-1, block)).amax(2)
        found[:, number, : number + 1] = largest / largest.sum(-1, keepdim=True)
    return found


@dataclass
class GateInputs(BlockRun):
    """Attends densely, and notes what gates read and learn.

    Args:
        method: its sizes.
        examples: of each layer, one for a prompt.
    """

    method: Seer
    examples: dict[int, list[GateExample]] = field(default_factory=dict)

    def attend(self, call: AttentionCall, prompt: PromptRow, row: int) -> list[Tensor]:
        """Returns dense attention of one prompt, (H, n, v), in one part.

        Args:
            call: of the layer.
            prompt: a row of it.
            row: its number.
        """
        inputs = self.inputs_of(call, prompt)
        if inputs is not None:
            block = self.method.block
            example = replace(GateExample.of(inputs, block), target=pooled_attention(inputs, block))
            self.examples.setdefault(call.layer, []).append(example)
        return [attend_dense(prompt.query, prompt.key, prompt.value, call.scaling)]


def divergence(query_map: Tensor, key_map: Tensor, example: GateExample) -> Tensor:
    """Returns how far gates are from the attention of an example, (): the mean Kullback-Leibler divergence
    of its query blocks without the first quarter, which choose from little.

    Args:
        query_map: (G, d, d).
        key_map: (G, 3 d, d).
        example: with a target.
    """
    assert example.target is not None
    logits = gate_logits(query_map, key_map, example)
    before = blocks_before(logits.shape[-1], logits.device)
    found = logits.masked_fill(~before, -torch.inf).log_softmax(-1)
    target = example.target
    # what no query may see adds nothing
    terms = torch.where(target > 0, target * (target.clamp(min=1e-30).log() - found), 0.0)
    return terms.sum(-1)[..., target.shape[-1] // 4 :].mean()


def joined_examples(examples: list[GateExample]) -> GateExample:
    """Returns examples of equally many blocks as one, with the prompts in front."""
    query, key, target = (
        torch.stack([getattr(example, name) for example in examples])
        for name in ("query", "key", "target")
    )
    rotary = None
    if examples[0].rotary is not None:
        # (2, prompts, 1, blocks, r): the same for all heads
        rotary = torch.stack([e.rotary for e in examples if e.rotary is not None], 1)[:, :, None]
    return GateExample(query, key, rotary, target)


def train_gates(
    model: Any,
    prompts: Iterable[Mapping[str, Any]],
    method: Seer | None = None,
    steps: int = 500,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> HeadCalibration:
    """Returns gates for each layer and key head of a model, which stays as it is, for `Seer(calibration=...)`.

    https://arxiv.org/abs/2410.13276

    Gates learn, by the Kullback-Leibler divergence, the model's attention on prompts: the largest
    between the tokens of two blocks, as shares of a query block's sum. They begin as mean pooling. AdamW
    without decay takes 16 prompts of one length at a step, and its learning rate falls as a cosine
    after 20 steps. The authors train 500 steps on prompts of 32,000 to 64,000 tokens. What gates read is
    kept for all prompts and layers, so that the model reads each prompt once.

    Args:
        model: of a supported family.
        prompts: what its processor gives for them.
        method: its size of blocks and the shortest prompt; `Seer` as it is unless given.
        steps: of training.
        learning_rate: the highest.
        seed: of the prompts' draws.
        progress: called after each step.

    Raises:
        InputError: if the model's attention cannot be replaced, or no prompt is long enough.
    """
    # it imports peft, and with it libraries that only training needs
    from transformers import get_cosine_schedule_with_warmup

    method = Seer() if method is None else method
    check_pairs(model)
    run = GateInputs(method)
    count = read_prompts(model, run, prompts)
    check_found(run.examples, "seer", method.minimum)
    maps = {layer: starting_maps(examples[0]) for layer, examples in run.examples.items()}
    before = mean_divergence(maps, run.examples)
    parameters = [part.requires_grad_() for pair in maps.values() for part in pair]
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARM_UP, steps)
    # prompts of one number of blocks go together
    first = next(iter(run.examples.values()))
    lengths = torch.tensor([example.key.shape[1] for example in first])
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        at = lengths[torch.randint(len(lengths), (), generator=draw)]
        alike = (lengths == at).nonzero()[:, 0]
        chosen = alike[torch.randperm(len(alike), generator=draw)[:BATCH]].tolist()
        with torch.enable_grad():
            loss = torch.stack(
                [
                    divergence(*maps[layer], joined_examples([own[number] for number in chosen]))
                    for layer, own in run.examples.items()
                ]
            ).mean()
            loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress()
    tensors = {
        f"layers.{layer}.{name}": part.detach()
        for layer, pair in maps.items()
        for name, part in zip(("query", "key"), pair, strict=True)
    }
    about = {
        "block": method.block,
        "prompts": count,
        "steps": steps,
        "learning_rate": learning_rate,
        "divergence": [before, mean_divergence(maps, run.examples)],
        "method_options": asdict(method),
    }
    return HeadCalibration.of("seer", tensors, model, **about)


def starting_maps(example: GateExample) -> tuple[Tensor, Tensor]:
    """Returns maps with which gates are mean pooling, of queries (G, d, d) and of keys (G, 3 d, d)."""
    groups, _, width = example.query.shape
    own = torch.eye(width, device=example.query.device).expand(groups, -1, -1)
    nothing = torch.zeros_like(own)
    return own.clone(), torch.cat([nothing, nothing, own], 1)


@torch.no_grad()
def mean_divergence(
    maps: Mapping[int, tuple[Tensor, Tensor]], examples: Mapping[int, list[GateExample]]
) -> float:
    """Returns how far gates are from attention, the mean over layers and prompts.

    Args:
        maps: of the gates of each layer.
        examples: of each layer.
    """
    found = [
        divergence(*maps[layer], example) for layer, own in examples.items() for example in own
    ]
    return float(torch.stack(found).mean())
