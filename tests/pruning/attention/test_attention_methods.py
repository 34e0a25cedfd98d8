"""What methods of sparse attention choose, against loops over heads, rows and keys from their equations."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from attention_cases import BLOCK, PREFILL, RULES, TAIL, short
from torch.utils._python_dispatch import TorchDispatchMode

from vlm_prune.pruning.attention import build_attention
from vlm_prune.pruning.attention.base import kept_mass
from vlm_prune.pruning.attention.blocks import body_length
from vlm_prune.pruning.attention.inputs import AttentionInputs
from vlm_prune.pruning.attention.sale import ThresholdSearch
from vlm_prune.vlm.common.errors import InputError

H, G, D, TOKENS = 4, 2, 16, 6 * BLOCK + 7
SCALE = 0.4


def inputs(tokens=TOKENS, seed=0):
    draw = torch.Generator().manual_seed(seed)
    length = body_length(tokens, TAIL, BLOCK)
    query, key = (torch.randn(count, length, D, generator=draw) for count in (H, G))
    # text, three images of eleven tokens, and more text
    frames = torch.arange(length) // 11
    frames[frames > 3] = 0
    return AttentionInputs(query, key, SCALE, 0, tokens, rotary(length), frames=frames - 1)


def rotary(length):
    """Turns at one position for each token: fast ones turn more than once in a block."""
    angles = torch.arange(length)[:, None] * 100.0 ** (-torch.arange(D // 2) / (D // 2))
    angles = torch.cat([angles, angles], 1)
    return torch.stack([angles.cos(), angles.sin()])


def product(given, head, row, column):
    return float(given.query[head, row] @ given.key[head * G // H, column]) * SCALE


def blocks_of(given):
    return given.length // BLOCK


def local_loop(given):
    keep = torch.zeros(1, blocks_of(given), blocks_of(given), dtype=torch.bool)
    for i in range(blocks_of(given)):
        for j in range(i):
            keep[0, i, j] = i - j < 2  # a window of 16 tokens
    return keep


def power_loop(given):
    keep = torch.zeros(1, blocks_of(given), blocks_of(given), dtype=torch.bool)
    for i in range(blocks_of(given)):
        for j in range(i):
            keep[0, i, j] = math.log2(i - j) == int(math.log2(i - j))
    return keep


def s2_loop(given):
    keep = torch.zeros(G, blocks_of(given), blocks_of(given), dtype=torch.bool)
    for g in range(G):
        for i in range(blocks_of(given)):
            for j in range(i):
                keep[g, i, j] = (j + g * 1) % 3 == 0
    return keep


def largest(weights, share):
    """The fewest weights that sum up to a share, as their indices."""
    kept, total = [], 0.0
    for index in sorted(range(len(weights)), key=lambda index: -weights[index]):
        if total >= share * sum(weights):
            break
        kept.append(index)
        total += weights[index]
    return kept


def pooled_loop(given):
    keep = torch.zeros(H, blocks_of(given), blocks_of(given), dtype=torch.bool)
    for h in range(H):
        for i in range(blocks_of(given)):
            own = given.query[h, i * BLOCK : (i + 1) * BLOCK].mean(0)
            keys = [
                given.key[h * G // H, j * BLOCK : (j + 1) * BLOCK].mean(0) for j in range(i + 1)
            ]
            weights = torch.tensor([float(own @ key) * SCALE for key in keys]).softmax(0)
            keep[h, i, largest(weights.tolist(), 0.7)] = True
    return keep


def xattention_sums(given, stride=4):
    """What each block of queries pays each block of keys, by the antidiagonals of squares."""
    per_block, blocks = BLOCK // stride, blocks_of(given)
    found = torch.zeros(H, blocks, blocks)
    for h, i in itertools.product(range(H), range(blocks)):
        for square in range(i * per_block, (i + 1) * per_block):
            logits = [
                sum(
                    product(given, h, square * stride + stride - 1 - t, other * stride + t)
                    for t in range(stride)
                )
                / stride
                for other in range(square + 1)
            ]
            for other, weight in enumerate(torch.tensor(logits).softmax(0).tolist()):
                found[h, i, other // per_block] += weight
    return found


def xattention_loop(given):
    sums = xattention_sums(given)
    keep = torch.zeros(sums.shape, dtype=torch.bool)
    for h, i in itertools.product(range(H), range(blocks_of(given))):
        keep[h, i, largest(sums[h, i, : i + 1].tolist(), 0.7)] = True
    return keep


def anchor_loop(given, step=2, theta=2.5):
    group, blocks = step * BLOCK, blocks_of(given)
    keep = torch.zeros(H, -(-blocks // step), given.length, dtype=torch.bool)
    for h in range(H):
        for number in range(keep.shape[1]):
            start = number * group
            for block in range(number * step, min(blocks, (number + 1) * step)):
                rows = range(block * BLOCK, (block + 1) * BLOCK)
                anchors = []
                for row in rows:
                    near = {*range(min(BLOCK, row + 1)), *range(start, row + 1)}
                    anchors.append(max(product(given, h, row, column) for column in near))
                anchor = sum(anchors) / BLOCK
                mean = given.query[h, rows.start : rows.stop].mean(0)
                for column in range(start):
                    near = float(mean @ given.key[h * G // H, column]) * SCALE
                    keep[h, number, column] |= near + theta >= anchor
    return keep


def four_bits(vector):
    scale = float(vector.abs().max()) / 7
    return torch.tensor([round(float(x) / scale) * scale for x in vector])


def sale_loop(given, threshold=0.05, heads=range(H)):
    rows, columns = BLOCK // 2, BLOCK // 4
    keep = torch.zeros(H, given.length // rows, given.length // columns, dtype=torch.bool)
    for h in heads:
        key = given.key[h * G // H]
        key = key - key.mean(0)
        query = given.query[h] * SCALE
        mean = query.mean(0)
        for row in range(given.length):
            block = row // rows
            begin = max(0, block * rows - BLOCK)
            near = {*range(min(columns, row + 1)), *range(begin, row + 1)}
            total = sum(math.exp(float(query[row] @ key[column])) for column in near)
            coarse = four_bits(query[row] - mean)
            for column in range(block * rows // BLOCK * BLOCK):
                paid = math.exp(float(coarse @ four_bits(key[column]) + mean @ key[column]))
                window = (column // columns + 1) * columns > block * rows - BLOCK
                keep[h, block, column // columns] |= paid >= threshold * total or window
    return keep


def prism_loop(given, mass=0.7):
    keep = torch.zeros(H, blocks_of(given), blocks_of(given), dtype=torch.bool)
    turns = torch.complex(*given.rotary[..., : D // 2])
    left = torch.stack([block.mean(0).abs() for block in turns.split(BLOCK)]).mean(0)
    slow = [pair for pair in range(D // 2) if left[pair] > 0.5]
    fast = [pair for pair in range(D // 2) if left[pair] <= 0.5]
    assert 0 < len(slow) < D // 2
    for band in (fast, slow):
        dims = sorted(pair + half for pair in band for half in (0, D // 2))
        for h in range(H):
            means = [
                torch.stack([block.mean(0) for block in part.split(BLOCK)])
                for part in (given.query[h], given.key[h * G // H])
            ]
            rms = [
                mean[:, dims].square().mean().sqrt() / mean.square().mean().sqrt() for mean in means
            ]
            temperature = (len(dims) / D) ** 0.5 * rms[0] * rms[1]
            for i in range(blocks_of(given)):
                logits = [
                    float(means[0][i, dims] @ means[1][j, dims])
                    * SCALE
                    * D**0.5
                    / len(dims) ** 0.5
                    / temperature
                    for j in range(i + 1)
                ]
                weights = torch.tensor(logits).softmax(0).tolist()
                keep[h, i, largest(weights, mass)] = True
    return keep


def hip_loop(given, masks=H, count=7):
    rows = BLOCK // 2
    keep = torch.zeros(masks, given.length // rows, given.length, dtype=torch.bool)
    for mask in range(masks):
        heads = range(mask * H // masks, (mask + 1) * H // masks)
        for block in range(keep.shape[1]):
            end = block * rows // BLOCK * BLOCK

            def score(unit, heads=heads, block=block):
                return max(
                    product(given, h, row, unit)
                    for h in heads
                    for row in range(block * rows, (block + 1) * rows, 2)
                )

            size = max(0, end - BLOCK)
            bounds = [BLOCK + size * n // count for n in range(count + 1)]
            ranges = list(itertools.pairwise(bounds))
            while any(stop - start > 1 for start, stop in ranges):
                halves = [(start, (start + stop + 1) // 2) for start, stop in ranges]
                halves += [((start + stop + 1) // 2, stop) for start, stop in ranges]
                halves = [half for half in halves if half[0] < half[1]]
                ranges = sorted(halves, key=lambda half: -score(half[0]))[:count]
            for start, stop in ranges:
                keep[mask, block, start:stop] = True
    return keep


def dhsa_loop(given, count=2):
    keep = torch.zeros(1, blocks_of(given), blocks_of(given), dtype=torch.bool)
    frames = given.frames.tolist()
    chunks, text = [], 0
    for token, frame in enumerate(frames):
        text = text + 1 if frame < 0 and token and frames[token - 1] < 0 else 0
        if not token or frame != frames[token - 1] or (frame < 0 and text % BLOCK == 0):
            chunks.append([])
        chunks[-1].append(token)
    for i in range(blocks_of(given)):
        paid = []
        for chunk in chunks:
            each = []
            for h in range(H):
                query = given.query[h, i * BLOCK : (i + 1) * BLOCK].mean(0) * BLOCK**0.5
                key = given.key[h * G // H, chunk].mean(0) * len(chunk) ** 0.5
                each.append(float(query @ key) * SCALE)
            paid.append(1e9 if chunk[-1] >= i * BLOCK else sum(each) / H)
        token_scores = [value for chunk, value in zip(chunks, paid, strict=True) for _ in chunk]
        means = [sum(token_scores[j * BLOCK : (j + 1) * BLOCK]) / BLOCK for j in range(i)]
        for j in sorted(range(i), key=lambda j: -means[j])[:count]:
            keep[0, i, j] = True
    return keep


def own_frame_loop(given):
    keep = torch.zeros(1, blocks_of(given), blocks_of(given), dtype=torch.bool)
    frames, so_far = [], -1
    for frame in given.frames.tolist():  # text goes with the image before it
        so_far = max(so_far, frame)
        frames.append(so_far)
    for i in range(blocks_of(given)):
        own = {*frames[i * BLOCK : (i + 1) * BLOCK]}
        wanted = own | {min(own) - 1}
        for j in range(i):
            keep[0, i, j] = any(frame in wanted for frame in frames[j * BLOCK : (j + 1) * BLOCK])
    return keep


def seer_loop(given, threshold=0.25):
    """Gates of a layer on queries and keys that are turned back, token by token."""
    query_map, key_map = short("seer").gates(given)
    turns = torch.complex(*given.rotary[..., : D // 2])

    def turned(vector, turn):
        pairs = torch.complex(vector[: D // 2], vector[D // 2 :]) * turn
        return torch.cat([pairs.real, pairs.imag])

    keep = torch.zeros(G, blocks_of(given), blocks_of(given), dtype=torch.bool)
    for g in range(G):
        reads, tells = [], []
        for i in range(blocks_of(given)):
            tokens = range(i * BLOCK, (i + 1) * BLOCK)
            own = [
                turned(given.query[h, token], turns[token].conj())
                for h in range(H) if h * G // H == g for token in tokens
            ]  # fmt: skip
            keys = torch.stack(
                [turned(given.key[g, token], turns[token].conj()) for token in tokens]
            )
            pooled = torch.cat([keys.max(0).values, keys.min(0).values, keys.mean(0)])
            middle = turns[i * BLOCK + BLOCK // 2]
            reads.append(turned(torch.stack(own).mean(0) @ query_map[g], middle))
            tells.append(turned(pooled @ key_map[g], middle))
        for i in range(blocks_of(given)):
            logits = torch.tensor([float(reads[i] @ tells[j]) / D**0.5 for j in range(i + 1)])
            keep[g, i, : i + 1] = logits.softmax(0) > threshold
    return keep


LOOPS = {
    "seer": seer_loop,
    "own-frame": own_frame_loop,
    "dhsa": dhsa_loop,
    "prism": prism_loop,
    "hip": hip_loop,
    "local": local_loop,
    "power": power_loop,
    "s2": s2_loop,
    "pooled": pooled_loop,
    "xattention": xattention_loop,
    "anchor": anchor_loop,
    "sale": sale_loop,
}


@pytest.mark.parametrize("name", RULES)
def test_the_rule_is_that_of_a_loop(name):
    for tokens in (TOKENS, 4 * BLOCK + TAIL):
        given = inputs(tokens)
        method = short(name, density=None, share="head")
        ours, loop = method.select(given), LOOPS[name](given)
        candidates = ours.geometry.candidates(given.length)
        assert 0 < (loop & candidates).sum() < len(loop) * candidates.sum()
        assert torch.equal(ours.keep, loop & candidates)
        shared = short(name, density=None).select(given).keep
        if name == "hip":  # heads that share a mask search together
            loop = hip_loop(given, G)
        elif len(loop) == H:
            loop = loop.unflatten(0, (G, -1)).any(1)
        assert torch.equal(shared, loop & candidates)


@pytest.mark.parametrize("share", ["group", "head"])
@pytest.mark.parametrize("name", PREFILL)
def test_a_density_is_met_beside_what_all_compute(name, share):
    method = short(name, density=0.5, share=share)
    given = inputs(tokens=404)
    given = replace(given, frames=torch.arange(given.length) // 11)
    kept = method.select(given).forced(given.length)
    tail = 404 * 405 // 2 - given.length * (given.length + 1) // 2
    found = float(kept.products(given.length) + tail) / (404 * 405 / 2)
    assert found == pytest.approx(0.5, abs=0.04)
    assert len(kept.keep) in ({1, G, H} if share == "head" else {1, G})


@pytest.mark.parametrize("density", [None, 0.8])
@pytest.mark.parametrize("name", PREFILL)
def test_masks_do_not_depend_on_later_blocks(name, density):
    if density is None and name not in RULES:
        return
    method, given, other = short(name, density=density), inputs(), inputs(seed=1)
    geometry = method.geometry(given)
    # the first token that differs begins the last local region
    first = (given.length - 1) // geometry.local * geometry.local
    query, key = given.query.clone(), given.key.clone()
    query[:, first:], key[:, first:] = other.query[:, first:], other.key[:, first:]
    changed = replace(given, query=query, key=key)
    ours, theirs = (
        method.select(case).keep[:, : first // geometry.rows] for case in (given, changed)
    )
    assert ours.any()
    # SALE's mean query and mean key are those of the whole prompt
    assert torch.equal(ours, theirs) or name == "sale"


@pytest.mark.parametrize("name", PREFILL)
def test_an_estimate_in_parts_is_the_same_and_holds_no_square(name):
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **kwargs or {})
            for tensor in found if isinstance(found, tuple | list) else [found]:
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.untyped_storage().nbytes() // tensor.itemsize)
            return found

    given = inputs(tokens=1188)
    method = short(name, density=0.3, block=32)
    whole = method.select(given).keep
    with Largest() as largest:
        parts = method.select(replace(given, most=1 << 14)).keep
    assert torch.equal(whole, parts)
    assert largest.size < 1188**2 // 8


@pytest.mark.parametrize("most", [1 << 19, 1 << 6])
def test_xattention_at_a_density_keeps_the_blocks_of_a_loop(most):
    # nineteen blocks: estimated three at a time, or one, the last time fewer
    given = replace(inputs(19 * BLOCK + TAIL), most=most)
    sums = xattention_sums(given).unflatten(0, (G, -1)).mean(1)
    ours = short("xattention", density=0.5).select(given).keep
    for g, i in itertools.product(range(G), range(blocks_of(given))):
        kept = ours[g, i].nonzero()[:, 0].tolist()
        ranked = sorted(range(1, i), key=lambda j: -float(sums[g, i, j]))
        assert kept == sorted(ranked[: len(kept)])
    assert ours.sum() > 19


def test_xattention_with_a_stride_of_one_sums_attention_itself():
    given = inputs()
    ours = short("xattention", stride=1).weights(given)
    for h in range(H):
        scores = given.query[h] @ given.key[h * G // H].T * SCALE
        mask = torch.ones(given.length, given.length).tril().bool()
        attention = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        sums = attention.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).sum((1, 3)) / BLOCK
        torch.testing.assert_close(ours[h], sums, atol=1e-5, rtol=1e-5)


def test_the_oracle_keeps_the_blocks_that_attention_pays_most():
    given = inputs()
    blocks, causal = blocks_of(given), torch.ones(given.length, given.length).tril().bool()
    sums = torch.zeros(H, blocks, blocks)
    for h in range(H):
        scores = given.query[h] @ given.key[h * G // H].T * SCALE
        attention = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        for i, j in itertools.product(range(blocks), range(blocks)):
            tile = attention[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            sums[h, i, j] = tile.sum() / BLOCK
    oracle = short("oracle", density=0.7, share="head")
    torch.testing.assert_close(oracle.scores(given), sums, atol=1e-6, rtol=1e-4)
    shared = short("oracle", density=0.7).scores(given)
    torch.testing.assert_close(shared, sums.unflatten(0, (G, -1)).mean(1), atol=1e-6, rtol=1e-4)
    # no other choice of as many blocks gets more
    kept = {
        name: float((sums * short(name, density=0.7, share="head").select(given).keep).sum())
        for name in ("oracle", "pooled", "random-blocks")
    }
    assert kept["oracle"] > kept["pooled"] > kept["random-blocks"] > 0


def test_sale_s_thresholds_are_halved_until_a_head_is_near_dense_attention():
    draw = torch.Generator().manual_seed(5)
    prompts = [inputs(seed=3), inputs(3 * BLOCK + TAIL, seed=4)]
    start, bound, least = 0.3, 0.9, 0.08
    method = short("sale", density=None, share="head", threshold=1.0)
    search = ThresholdSearch(method, bound=bound, start=start, least=least)
    right, sizes = [start] * H, torch.tensor([1.5, 6.0])[:, None, None]
    for given in prompts:
        value = torch.randn(G, given.tokens, D, generator=draw) * sizes
        causal = torch.ones(given.length, given.length).tril().bool()
        dense = torch.zeros(H, given.tokens, D)
        for h in range(H):
            scores = given.query[h] @ given.key[h * G // H].T * SCALE
            own = value[h * G // H, : given.length]
            dense[h, : given.length] = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ own
            while right[h]:
                blocks = sale_loop(given, right[h], [h])[h]
                seen = torch.zeros_like(causal)
                for row in range(given.length):
                    region = row // BLOCK * BLOCK
                    for column in range(row + 1):
                        kept = bool(blocks[row // (BLOCK // 2), column // (BLOCK // 4)])
                        seen[row, column] = column >= region or column < BLOCK or kept
                sparse = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ own
                off = float((sparse - dense[h, : given.length]).abs().sum())
                if off < bound * given.tokens:
                    break
                right[h] = right[h] / 2 if right[h] / 2 > least else 0.0
        search.lower(given, value, dense)
    assert search.thresholds[0].tolist() == pytest.approx(right)
    assert 0 in right and start in right and len({*right}) > 2


def test_dhsa_s_chunks_of_a_block_are_mean_pooling():
    given = replace(inputs(), frames=None)
    scores = build_attention("dhsa", block=BLOCK).scores(given)
    query, key = given.block_means(BLOCK)
    pooled = (query.mean(1) @ key.transpose(1, 2)).mean(0) * SCALE * BLOCK
    before = torch.ones_like(pooled).tril(-1).bool()
    torch.testing.assert_close(scores[0][before], pooled[before], atol=1e-5, rtol=1e-4)


def test_prism_s_bands_follow_from_real_positions():
    """Of Qwen2.5-VL's pairs, sections of 16, 24 and 24 that turn with time, row and column, no block of
    128 tokens of 12 x 22 frames washes any out; at one position for each token it does."""
    length, pairs, frame = 128 * 33, 64, 12 * 22
    index = torch.arange(length)
    grid = [2 * (index // frame), index % frame // 22, index % 22]
    frequencies = 1e6 ** (-torch.arange(pairs) / pairs)
    sections = [0] * 16 + [1] * 24 + [2] * 24
    rows = {
        "in line": index[:, None] * frequencies,
        "in a grid": torch.stack(
            [grid[kind] * f for kind, f in zip(sections, frequencies, strict=True)], 1
        ),
    }
    found = {}
    for name, angles in rows.items():
        angles = angles.repeat(1, 2).float()
        rotary = torch.stack([angles.cos(), angles.sin()])
        given = AttentionInputs(
            torch.zeros(1, length, 128), torch.zeros(1, length, 128), 1, 0, length, rotary
        )
        found[name] = [len(band) // 2 for band in build_attention("prism").split(given)]
    assert found == {"in line": [17, 47], "in a grid": [64]}
    paper = build_attention("prism", bands="paper").split(given)
    assert [band[: len(band) // 2].tolist() for band in paper] == [[*range(32)], [*range(16, 64)]]


def test_sale_with_exact_products_keeps_nearly_the_same():
    given = inputs(tokens=400)
    coarse, exact = (
        short("sale", density=None, share="head", bits=bits, threshold=0.02).select(given).keep
        for bits in (4, 0)
    )
    assert (coarse != exact).sum() < 0.1 * exact.sum()


def test_kept_mass_is_the_fewest_weights():
    weights = torch.tensor([[0.1, 0.6, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
    expected = torch.tensor([[False, True, True, False], [True, True, True, False]])
    assert torch.equal(kept_mass(weights, 0.7), expected)


def test_s2_s_strided_blocks_take_half_of_what_may_be_kept():
    given = inputs(tokens=404)
    method, blocks = short("s2", density=0.3, stride=1), blocks_of(given)
    # without the first block, which all rows see, and a row's own
    may = [(i, j) for i in range(blocks) for j in range(1, i)]
    for part in (3, 5):
        found = method.pattern(given, len(may) * BLOCK / part)
        expected = torch.zeros(G, blocks, blocks, dtype=torch.bool)
        for g in range(G):
            for i, j in may:
                expected[g, i, j] = (j + g * part) % (2 * part) == 0
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("local", {"density": 0.0}, "density 0.0 is no share"),
        ("local", {"density": 2}, "density 2 is no share"),
        ("local", {"density": "half"}, "density 'half' is no share"),
        ("local", {"block": 0}, "block 0 is no whole number from 1 on"),
        ("local", {"minimum": -1}, "minimum -1 is no whole number from 0 on"),
        ("local", {"share": "heads"}, "did you mean 'head'"),
        ("local", {"executor": "gahter"}, "did you mean 'gather'"),
        ("local", {"executor": "flex", "block": 100}, "power of two, not 100"),
        ("local", {"windows": 3}, "did you mean 'window'"),
        ("anchor", {"theta": math.nan}, "theta nan is no finite number"),
        ("anchor", {"theta": math.inf}, "theta inf is no finite number"),
        ("anchor", {"executor": "flex"}, "give executor gather"),
        ("xattention", {"stride": 3}, "stride 3 does not divide blocks of 128"),
        ("random-blocks", {"density": None}, "has no rule but a density"),
        ("sale", {"block": 6}, "no multiple of 4"),
        ("sale", {"bits": 1}, "one bit holds no product"),
        ("sale", {"row_step": 65}, "row_step 65 is above"),
        ("recycled", {"refresh": 0}, "refresh 0 is no whole number"),
        ("prism", {"bands": "papers"}, "did you mean 'paper'"),
        ("hip", {"block": 24}, "no multiple of it"),
        ("xatention", {}, "did you mean 'xattention'"),
    ],
)
def test_wrong_hyperparameters_are_said_in_one_line(name, wrong, says):
    with pytest.raises(InputError, match=says) as error:
        build_attention(name, **wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["local", "power", "s2"])
def test_patterns_do_not_depend_on_precision(name):
    """Numbers of blocks above 256 are none of bfloat16."""
    given, method = inputs(tokens=300 * BLOCK + TAIL), short(name, density=0.1)
    half = replace(given, query=given.query.bfloat16(), key=given.key.bfloat16())
    assert torch.equal(method.select(half).keep, method.select(given).keep)


@pytest.mark.parametrize("name", PREFILL)
def test_half_precision_chooses_nearly_the_same(name):
    given = inputs(tokens=404)
    half = replace(given, query=given.query.bfloat16(), key=given.key.bfloat16())
    method = short(name, density=0.5)
    ours, theirs = (method.select(case).keep for case in (half, given))
    # in HiP's search one range that is lost takes all of its units with it
    assert (ours != theirs).sum() <= (0.25 if name == "hip" else 0.05) * theirs.sum()
