"""Wings on every model family: it works, or is refused at once, and leaves nothing behind."""

import pytest
import torch
from shaken import shake
from tiny_families import snapshot

from vlm_prune.learners import WingsConfig, attach, detach
from vlm_prune.learners import model as wings
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import family_of

ROWS = [
    [([0], "Is there a 7?")],
    [([], "What color is the star?")],
    [([1], "a"), ([], "red"), ([0], "Is there a 7?")],
]
CONFIGS = {
    "router": {},
    "sum": {"router": "sum"},
    "visual": {"modalities": ("visual",)},
    "sequential": {"query": "sequential"},
    "one layer": {"layers": (1,)},
}


def refused(tiny):
    """Whether learners do not go with the family."""
    return family_of(tiny.model).mrope or bool(family_of(tiny.model).both_ways)


@pytest.fixture
def plain(tiny):
    """A model that has run before, so that what a first call leaves is there."""
    inputs = tiny.inputs(ROWS)
    with torch.inference_mode():
        logits = tiny.model(**inputs).logits
    before = snapshot(tiny.model)
    yield tiny, inputs, logits
    assert snapshot(tiny.model) == before


def config(name):
    return WingsConfig(rank=4, max_positions=512, **CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_untrained_learners_change_nothing_or_are_refused(plain, name):
    tiny, inputs, logits = plain
    if refused(tiny):
        with pytest.raises(InputError, match=f"{tiny.name} models (have three|attend|lack)"):
            attach(tiny.model, config(name))
        return
    attach(tiny.model, config(name))
    try:
        with torch.inference_mode():
            assert torch.equal(tiny.model(**inputs).logits, logits)
    finally:
        detach(tiny.model)
    with torch.inference_mode():
        assert torch.equal(tiny.model(**inputs).logits, logits)


@pytest.mark.parametrize("name", ["router", "sequential"])
def test_rows_and_cached_steps_agree(plain, name):
    """Learners that do something: a row gives what it gives alone, a step what a full forward does."""
    tiny, inputs, logits = plain
    if refused(tiny):
        pytest.skip("refused")
    attach(tiny.model, config(name))
    try:
        shake(tiny.model)
        with torch.inference_mode():
            ours = tiny.model(**inputs).logits
            new = tiny.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
            for number, turns in enumerate(ROWS):
                alone = tiny.inputs([turns])
                length = alone["input_ids"].shape[1]
                row = tiny.model(**alone).logits[0]
                assert torch.allclose(row, ours[number, -length:], atol=2e-4)
                steps = tiny.model.generate(**alone, max_new_tokens=4, min_new_tokens=4)[0, length:]
                assert torch.equal(steps, new[number, -4:])
                whole = tiny.inputs([turns])
                for _ in range(4):
                    token = tiny.model(**whole, use_cache=False).logits[:, -1]
                    token[:, tiny.model.generation_config.eos_token_id] = -torch.inf
                    for key, fill in (
                        ("input_ids", token.argmax(-1)[:, None]),
                        ("attention_mask", 1),
                    ):
                        whole[key] = torch.nn.functional.pad(whole[key], (0, 1), value=0)
                        whole[key][:, -1:] = fill
                assert torch.equal(whole["input_ids"][0, length:], steps)
        assert not torch.allclose(ours, logits, atol=1e-3)
    finally:
        detach(tiny.model)


@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_an_attach_that_fails_leaves_nothing(plain, monkeypatch, fails_at):
    """While learners are made, and while they are put in."""
    tiny, *_ = plain
    if refused(tiny):
        pytest.skip("refused")
    attached, layer = [], wings.WingsLayer

    def failing(*arguments):
        attached.append(layer(*arguments))
        if len(attached) == fails_at:
            raise MemoryError
        return attached[-1]

    monkeypatch.setattr(wings, "WingsLayer", failing)
    with pytest.raises(MemoryError):
        attach(tiny.model, WingsConfig(rank=4))
    monkeypatch.undo()
    attention = family_of(tiny.model).decoder.layers[fails_at - 1].self_attn

    def refuse(*_, **__):
        raise RuntimeError("no hook")

    monkeypatch.setattr(attention, "register_forward_hook", refuse)
    with pytest.raises(RuntimeError, match="no hook"):
        attach(tiny.model, WingsConfig(rank=4, query="sequential"))
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 33}, "rank 33 is above the model's width"),
        ({"rank": 4, "layers": (9,)}, "layer"),
    ],
)
def test_learners_that_do_not_fit_are_refused_at_once(plain, options, message):
    tiny, *_ = plain
    with pytest.raises(InputError, match="Wings needs" if refused(tiny) else message):
        attach(tiny.model, WingsConfig(**options))
