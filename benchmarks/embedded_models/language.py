"""The stages after the tower: projector and language model learn to answer, many questions per sequence.

Each row is a prefix (text turns and at most one image) followed by question blocks. A block sees
the prefix and itself, and its positions restart after the prefix, so that one pass over an image
trains many questions and no answer can be copied from a neighbor.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from vlm_prune.benchmarks.embedded_models.log import Say
from vlm_prune.benchmarks.embedded_models.tower import optimizers, set_rate

IGNORE = -100
Lesson = Literal["lookups", "finding", "places", "all", "practice", "sight", "told"]
ImageEncoder = Callable[[list[Tensor]], Tensor]


class QuestionBlock(NamedTuple):
    """A question with its answer, and the kind of question, under which training reports it."""

    prompt: str
    answer: str
    kind: str


@dataclass
class Row:
    """One training sequence.

    `before` precedes the image; each block starts where the prefix ends. `image` is
    (tokens, width) tower features, (tokens, 3) symbols, or None. `token_indices` says where
    its tokens stand in an image of `image_size`, for positions with gaps where others are left out;
    otherwise positions are contiguous.
    """

    before: str
    blocks: list[QuestionBlock]
    image: Tensor | None = None
    token_indices: Tensor | None = None
    image_size: int = 0


@dataclass
class Packed:
    """Tensors of a batch of rows; shapes (B, L), mask (B, 1, L, L) additive.

    `kinds` has the kind of each labeled token, end tokens included, in reading order. `spans` says
    for runs of queries, from the first block of any row on, which keys they can see.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    mask: Tensor
    kinds: list[str]
    spans: list["Span"]


class Span(NamedTuple):
    """Queries `[start, stop)` see no keys but `[0, prefix)` and `[seen, stop)`."""

    start: int
    stop: int
    prefix: int
    seen: int


def pack(rows: list[Row], tokenizer: PreTrainedTokenizerFast, image_token: int) -> Packed:
    """Lays rows out as prefix and blocks, padded on the right to the longest.

    Args:
        rows: of a batch.
        tokenizer: the model's.
        image_token: id that stands for each token of an image.
    """
    layouts = [_layout(row, tokenizer, image_token) for row in rows]
    length = max(len(ids) for ids, _, _, _ in layouts)
    shape = (len(rows), length)
    ids = torch.full(shape, int(tokenizer.pad_token_id or 0))
    positions, block = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    labels = torch.full(shape, IGNORE)
    for r, layout in enumerate(layouts):
        for target, values in zip((ids, positions, block, labels), layout, strict=True):
            target[r, : len(values)] = torch.tensor(values)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    # a token sees the prefix and its own block; padding sees itself, so that no row is empty
    same = (block[:, :, None] == block[:, None, :]) | (block[:, None, :] == 0)
    visible = causal & same | torch.eye(length, dtype=torch.bool)
    mask = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
    kinds = [
        row.blocks[number - 1].kind
        for row, layout in zip(rows, layouts, strict=True)
        for number, label in zip(layout[2], layout[3], strict=True)
        if label != IGNORE
    ]
    return Packed(ids, positions, labels, mask[:, None], kinds, _spans(block))


def _spans(block: Tensor, size: int = 256) -> list[Span]:
    """Cuts the block numbers (B, L) of a batch, where 0 is the prefix and -1 padding."""
    # queries before the shortest prefix's end are plainly causal; behind it, runs of `size`
    prefixes, spans = (block == 0).sum(1), []
    longest = int(prefixes.max())
    for start in range(int(prefixes.min()), block.shape[1], size):
        # where the block of each row's first query begins
        begun = (block == block[:, start, None]).int().argmax(1)
        spans.append(
            Span(start, min(start + size, block.shape[1]), longest, max(longest, int(begun.min())))
        )
    return spans


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor,
    scaling: float, spans: list[Span], dropout: float = 0.0, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attends over packed rows without most of the pairs that the mask forbids, as an attention
    function of transformers.

    Args:
        module: the attention layer; not read.
        query: (B, H, L, d).
        key: (B, H, L, d).
        value: (B, H, L, d).
        attention_mask: (B, 1, L, L), additive.
        scaling: factor of the logits.
        spans: which keys runs of queries can see; queries before the first one are causal.
        dropout: not applied.

    Returns:
        Outputs (B, L, H, d), and None in place of attention weights.
    """
    common = spans[0].start
    first, keys, values = (part[:, :, :common] for part in (query, key, value))
    outputs = [scaled_dot_product_attention(first, keys, values, is_causal=True, scale=scaling)]
    for start, stop, prefix, seen in spans:
        keys, values, mask = (
            # keys of the prefix, and those from the first block of the run on
            torch.cat([part[..., :prefix, :], part[..., seen:stop, :]], -2)
            for part in (key, value, attention_mask[:, :, start:stop].mT)
        )
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, start:stop], keys, values, mask.mT.to(query.dtype), scale=scaling
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2), None


def attend_packed(decoder: PreTrainedModel) -> None:
    """Makes a decoder attend by `attend`, which transformers then knows as `packed`."""
    AttentionInterface.register("packed", attend)
    decoder.set_attn_implementation("packed")


def _layout(
    row: Row, tokenizer: PreTrainedTokenizerFast, image_token: int
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Returns ids, positions, block numbers (0 = prefix) and next-token labels of one row.

    Args:
        row: to lay out.
        tokenizer: the model's.
        image_token: id of the placeholder.
    """
    ids: list[int] = tokenizer(row.before, add_special_tokens=False).input_ids
    positions = list(range(len(ids)))
    if row.image is not None:
        newline: list[int] = tokenizer("\n").input_ids
        indices, size = row.token_indices, row.image_size
        if indices is None:
            indices, size = torch.arange(len(row.image)), len(row.image)
        begin, end = len(ids), len(ids) + size
        ids = [*ids, *[image_token] * len(row.image), *newline]
        # an image's tokens have the positions of the whole image, though some are left out
        positions += [*(begin + indices).tolist(), *range(end, end + len(newline))]
    block, labels = [0] * len(ids), [IGNORE] * len(ids)
    start = positions[-1] + 1 if positions else 0
    for number, question in enumerate(row.blocks, 1):
        prompt_ids: list[int] = tokenizer(question.prompt).input_ids
        answer_ids: list[int] = [*tokenizer(question.answer).input_ids, tokenizer.eos_token_id]
        ids += prompt_ids + answer_ids
        # every block begins where the prefix ends
        positions += range(start, start + len(prompt_ids) + len(answer_ids))
        block += [number] * (len(prompt_ids) + len(answer_ids))
        labels += [IGNORE] * (len(prompt_ids) - 1) + answer_ids + [IGNORE]
    return ids, positions, block, labels


def loss_of(
    model: LlavaForConditionalGeneration,
    batch: Packed,
    images: list[Tensor],
    encode: ImageEncoder,
    bf16: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """Returns the mean cross-entropy of the answers' tokens and their accuracy by kind of question.

    Accuracy is the share that argmax gets right; end tokens do not count in it.

    Args:
        model: the embedded LLaVA; its decoder attends by `attend`.
        batch: of packed rows.
        images: what each row with an image gives `encode`, in order.
        encode: makes image tokens of them.
        bf16: whether the decoder runs in mixed precision.
    """
    embeds = model.get_input_embeddings()(batch.ids)
    shown = batch.ids == model.config.image_token_id
    if images:
        embeds = embeds.masked_scatter(shown.unsqueeze(-1), encode(images))
    decoder = model.model.language_model
    with torch.autocast(embeds.device.type, torch.bfloat16, enabled=bf16):
        hidden_states = decoder(
            inputs_embeds=embeds, attention_mask=batch.mask, position_ids=batch.positions,
            use_cache=False, spans=batch.spans,
        ).last_hidden_state  # fmt: skip
    is_answer = batch.labels != IGNORE
    logits, labels = model.lm_head(hidden_states[is_answer].float()), batch.labels[is_answer]
    words = labels != model.config.text_config.eos_token_id
    right: dict[str, list[bool]] = defaultdict(list)
    for kind, word, hit in zip(
        batch.kinds, words.tolist(), logits.argmax(-1) == labels, strict=True
    ):
        if word:
            right[kind].append(bool(hit))
    return cross_entropy(logits, labels), {kind: fmean(hits) for kind, hits in right.items()}


def projected(model: LlavaForConditionalGeneration) -> ImageEncoder:
    """Returns the encoder that passes tower features through the projector."""

    def encode(images: list[Tensor]) -> Tensor:
        tokens: Tensor = model.model.multi_modal_projector(torch.cat(images).float())
        return tokens

    return encode


def vision_transformer(model: LlavaForConditionalGeneration) -> nn.Module:
    """Returns the vision transformer inside a LLaVA, with or without its wrapper."""
    tower = model.model.vision_tower
    inner: nn.Module = getattr(tower, "vision_model", tower)
    return inner


def train_language(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    rows: Callable[[int], list[Row]],
    steps: int,
    rate: float,
    encode: ImageEncoder,
    modules: list[nn.Module],
    say: Say,
    levels: int = 1,
    bf16: bool = False,
    promote: float = 0.93,
) -> None:
    """Trains `modules` for `steps` batches, the rate falling linearly over the last 40 %.

    The level of difficulty rises when the running share of right answer tokens, averaged over the
    kinds of question about images, passes `promote`, and at the latest with an equal share of the
    steps.

    Args:
        model: the embedded LLaVA.
        tokenizer: the model's.
        rows: draws a batch for a level, from 0.
        steps: of the optimizers.
        rate: peak learning rate of the hidden matrices.
        encode: makes image tokens of what rows hold as images.
        modules: what trains.
        say: takes level, loss and shares every 50 steps.
        levels: how many.
        bf16: whether the decoder runs in mixed precision.
        promote: share of right answer tokens that ends a level.
    """
    steppers = optimizers(modules, rate, bf16)
    running: dict[str, float] = {}
    level, entered = 0, 0
    decoder = model.model.language_model
    usual = decoder.config._attn_implementation
    attend_packed(decoder)
    for step in range(steps):
        warm, left = min(1.0, (step + 1) / 20), min(1.0, (steps - step) / (0.4 * steps))
        for stepper, peak in zip(steppers, (rate, rate / 2), strict=True):
            set_rate([stepper], peak * warm * max(0.05, left))
        batch = rows(level)
        loss, right = _backward(model, tokenizer, batch, encode, bf16)
        nn.utils.clip_grad_norm_([p for m in modules for p in m.parameters()], 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        for kind, share in right.items():
            running[kind] = running.get(kind, 0.5) + (share - running.get(kind, 0.5)) * 0.04
        if step % 50 == 0 or step == steps - 1:
            say(step, level=level, loss=loss, **dict(sorted(running.items())))
        if level == levels - 1:
            continue
        seen = {block.kind for row in batch if row.image is not None for block in row.blocks}
        ready = fmean(running[kind] for kind in seen) > promote and step - entered > 60
        if ready or step >= steps * (level + 1) // levels:
            level, entered, running = level + 1, step, {}
    decoder.set_attn_implementation(usual)


def _backward(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    batch: list[Row],
    encode: ImageEncoder,
    bf16: bool,
) -> tuple[float, dict[str, float]]:
    """Adds the gradients of a batch, and returns its loss and the shares of right answers.

    Rows without an image are not padded to those with.

    Args:
        model: that is trained.
        tokenizer: the model's.
        batch: its rows.
        encode: from images to their tokens.
        bf16: whether the forward is in bf16.
    """
    pictured = [row for row in batch if row.image is not None]
    parts = [part for part in (pictured, [row for row in batch if row.image is None]) if part]
    packs = [pack(part, tokenizer, model.config.image_token_id) for part in parts]
    counts = [len(packed.kinds) for packed in packs]
    whole, shares = 0.0, dict[str, float]()
    for part, packed, count in zip(parts, packs, counts, strict=True):
        images = [row.image for row in part if row.image is not None]
        loss, right = loss_of(model, packed, images, encode, bf16)
        loss = loss * (count / sum(counts))
        loss.backward()
        whole += loss.item()
        shares |= right
    return whole, shares
