"""Recycled Attention step by step, against a loop, and in generation."""

from types import SimpleNamespace

import pytest
import torch
from tiny_families import Tiny

from vlm_prune.pruning.attention import Recycled
from vlm_prune.vlm.sparse_attention import AttentionCall

H, G, D = 4, 2, 8


class Cache:
    """What a set of keys belongs to."""


class Layer:
    """Queries, keys and values of a layer, and calls on the first so many of its tokens."""

    number = 0

    def __init__(self, batch=2, tokens=40, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.query, self.key, self.value = (
            torch.randn(batch, count, tokens, D, generator=draw) for count in (H, G, G)
        )
        self.cache = Cache()

    def call(self, tokens, prefill=False, valid=None):
        rows = slice(0 if prefill else tokens - 1, tokens)
        valid = None if valid is None else valid[:, :tokens]
        return AttentionCall(
            self.query[:, :, rows], self.key[:, :, :tokens], self.value[:, :, :tokens], valid,
            0.5, self.number, (0, 0), None, self.cache,
        )  # fmt: skip

    def weights(self, row, head, tokens, valid=None):
        scores = self.key[row, head * G // H, :tokens] @ self.query[row, head, tokens - 1] * 0.5
        if valid is not None:
            scores[~valid[row, :tokens]] = -torch.inf
        return scores.softmax(0)

    def dense(self, tokens, valid=None):
        return torch.stack(
            [
                torch.stack(
                    [
                        self.weights(row, head, tokens, valid)
                        @ self.value[row, head * G // H, :tokens]
                        for head in range(H)
                    ]
                )
                for row in range(len(self.query))
            ]
        )[:, None]


def best(layer, row, group, tokens, count, valid=None):
    """Keys that a row's last token pays most, best first."""
    paid = torch.stack([layer.weights(row, 2 * group + n, tokens, valid) for n in range(2)]).amax(0)
    return paid.argsort(descending=True)[:count].tolist()


@pytest.mark.parametrize("padded", [False, True])
def test_steps_equal_a_loop(padded):
    layer, prompt, count, refresh = Layer(), 20, 6, 4
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, :16] = not padded
    run = Recycled(density=None, keep=count, refresh=refresh, minimum=1).run()
    given = valid if padded else None
    assert run.prefill(layer.call(prompt, True, given)) is None
    sets = {
        (row, group): best(layer, row, group, prompt, count, valid)
        for row in range(2)
        for group in range(G)
    }
    steps = 0
    for tokens in range(prompt + 1, 34):
        ours = run.decode(layer.call(tokens, valid=given))
        if steps == refresh - 1:
            torch.testing.assert_close(ours, layer.dense(tokens, valid), atol=1e-5, rtol=1e-5)
            sets = {key: best(layer, *key, tokens, count, valid) for key in sets}
            steps = 0
            continue
        steps += 1
        for (row, group), keys in sets.items():
            keys[-steps] = tokens - 1
            real = [index for index in keys if valid[row, index]]
            for head in (2 * group, 2 * group + 1):
                scores = layer.key[row, group, real] @ layer.query[row, head, tokens - 1] * 0.5
                right = scores.softmax(0) @ layer.value[row, group, real]
                torch.testing.assert_close(ours[row, 0, head], right, atol=1e-5, rtol=1e-5)
    assert run.trace.decode_density < 0.5


def test_a_key_that_becomes_important_is_found_at_the_next_full_step():
    layer = Layer()
    run = Recycled(density=0.2, refresh=5, minimum=1).run()
    run.prefill(layer.call(20, True))
    needle = int(min(set(range(20)) - set(best(layer, 0, 0, 20, 4))))
    layer.query[0, 0, 20:] = 20 * layer.key[0, 0, needle]
    errors = []
    for tokens in range(21, 32):
        ours = run.decode(layer.call(tokens))
        errors.append(float((ours[0, 0, 0] - layer.dense(tokens)[0, 0, 0]).abs().max()))
    assert max(errors[:4]) > 0.1 and max(errors[4:9]) < 0.02


def test_moved_rows_lost_tokens_and_other_caches_get_a_full_step():
    for change in ("moved", "cropped", "another"):
        layer = Layer()
        run = Recycled(density=0.2, minimum=1).run()
        run.prefill(layer.call(20, True))
        assert not torch.allclose(run.decode(layer.call(21)), layer.dense(21), atol=1e-3)
        tokens = 22
        if change == "moved":
            for tensor in (layer.query, layer.key, layer.value):
                tensor[:] = tensor.flip(0)
        elif change == "cropped":
            tokens = 18
        else:
            layer.cache = Cache()
        torch.testing.assert_close(run.decode(layer.call(tokens)), layer.dense(tokens))
    assert len(run.sets) == 1  # those of a cache go with it


def test_rows_that_moved_are_told_where_keys_know_what_came_before():
    """Keys of the first layer are those of tokens alone: rows that end alike look alike there."""
    layers = first, second = Layer(), Layer(seed=1)
    second.number, second.cache = 1, first.cache
    first.key[1, :, 20] = first.key[0, :, 20]
    run = Recycled(density=0.2, minimum=1).run()
    for layer in layers:
        run.prefill(layer.call(20, True))
    for tokens in (21, 22):
        held = [SimpleNamespace(keys=layer.key[:, :, : tokens - 1]) for layer in layers]
        first.cache.layers = held
        found = [run.decode(layer.call(tokens)) for layer in layers]
        right = [layer.dense(tokens) for layer in layers]
        full = [torch.allclose(*pair, atol=1e-5) for pair in zip(found, right, strict=True)]
        assert full == [tokens == 22] * 2
        for layer in layers:
            for tensor in (layer.query, layer.key, layer.value):
                tensor[:] = tensor.flip(0)


@pytest.fixture(scope="module")
def llava():
    return Tiny("llava")


def test_generation(llava):
    model = llava.model
    rows = [[([0, 1, 2], "Is there a 7?")], [([1], "What color is the star?")]]

    def answered(method, inputs, **more):
        with torch.no_grad(), method(model) as trace:
            out = model.generate(
                **inputs, max_new_tokens=8, min_new_tokens=8, return_dict_in_generate=True,
                output_logits=True, do_sample=False, **more,
            )  # fmt: skip
        return torch.stack(out.logits), trace

    inputs = llava.inputs(rows)
    dense, trace = answered(Recycled(density=1.0, minimum=1), inputs)
    assert trace.decode_density == 1
    full, trace = answered(Recycled(density=0.3, refresh=1, minimum=1), inputs)
    torch.testing.assert_close(full, dense, atol=1e-5, rtol=1e-4)
    few = Recycled(density=None, keep=8, refresh=3, minimum=1)
    ours, trace = answered(few, inputs)
    assert 0.2 < trace.decode_density < 0.6
    assert torch.equal(ours[0], dense[0]) and (ours[1:] - dense[1:]).abs().max() > 1e-3
    for row, turns in enumerate(rows):
        alone, _ = answered(few, llava.inputs([turns]))
        same = (ours[:, row].argmax(-1) == alone[:, 0].argmax(-1)).cummin(0).values
        torch.testing.assert_close(ours[:, row][same], alone[:, 0][same], atol=2e-5, rtol=1e-4)
    beams, _ = answered(Recycled(density=1.0, minimum=1), inputs, num_beams=3)
    ours, _ = answered(Recycled(density=0.5, refresh=1, minimum=1), inputs, num_beams=3)
    torch.testing.assert_close(ours, beams, atol=1e-5, rtol=1e-4)
