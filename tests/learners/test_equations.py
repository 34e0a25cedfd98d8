"""Learners and router against a slow loop from the equations of Wings (4 and 5)."""

import math

import pytest
import torch

from vlm_prune.learners.model import wings_layers
from vlm_prune.learners.rotary import rotated, rotation_matrix


def low_rank(module):
    """W_a W_b of a map x -> x W_a W_b, (D, D)."""
    return module.down.weight.double().T @ module.up.weight.double().T


def rotate(head, position, frequencies):
    """Turn the pair (i, i + d / 2) of a head (d,) by the position times its frequency."""
    half, turned = len(head) // 2, head.clone()
    for i, frequency in enumerate(frequencies.tolist()):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        turned[i] = head[i] * cos - head[half + i] * sin
        turned[half + i] = head[half + i] * cos + head[i] * sin
    return turned


def learner(module, hidden_states, features, positions, keys, frequencies):
    """Every token's attention over the tokens `keys` up to its own; (S, D)."""
    identity = torch.eye(hidden_states.shape[1], dtype=torch.float64)
    query = hidden_states @ (identity + low_rank(module.query))
    key = features @ (identity + low_rank(module.key))
    value = features @ (identity + low_rank(module.value))
    width, out = module.head_dim, torch.zeros_like(hidden_states)
    for token in range(len(hidden_states)):
        visible = [k for k in keys if positions[k] <= positions[token]]
        for start in range(0, hidden_states.shape[1], width):
            part = slice(start, start + width)
            if not visible:
                continue
            own = rotate(query[token, part], positions[token], frequencies)
            scores = [
                float(own @ rotate(key[k, part], positions[k], frequencies)) / math.sqrt(width)
                for k in visible
            ]
            weights = [math.exp(score - max(scores)) for score in scores]
            for k, weight in zip(visible, weights, strict=True):
                out[token, part] += weight / sum(weights) * value[k, part]
    return out @ low_rank(module.output)


def test_rotation_in_place_has_the_same_bits_as_the_one_that_takes_gradients():
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(2, 5, 3, 8, generator=generator)
    angles = torch.randn(2, 5, 4, generator=generator).repeat(1, 1, 2)
    tables, kept = (angles.cos(), angles.sin()), heads.clone()
    taken = rotated(heads.clone().requires_grad_(), tables)
    assert taken.requires_grad and torch.equal(rotated(heads, tables), taken)
    assert torch.equal(heads, kept)


def test_the_matrix_of_a_rotation_turns_one_token_as_the_tables_do():
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(2, 1, 3, 8, generator=generator)
    for rows in (1, 2):
        # halves that differ, as they do where positions have several axes
        tables = tuple(torch.randn(2, rows, 1, 8, generator=generator))
        torch.testing.assert_close(rotated(heads, rotation_matrix(*tables)), rotated(heads, tables))


@torch.no_grad()
@pytest.mark.parametrize("rows", [[(1, 4)], [(0, 7)], [(2, 3)]], ids=["image", "text", "two"])
def test_attention_of_a_layer_with_learners_equals_the_equations(rows, llava, winged, prompts):
    """Att + sum over m of w_m Learner_m(h, x_m), w the softmax of W a^T, a the mean over heads."""
    model, inputs, seen = winged(), prompts(rows), {}
    model.set_attn_implementation("eager")
    decoder = model.model.language_model
    attention = decoder.layers[1].self_attn

    def note_features(_, args, kwargs):
        seen["features"] = kwargs["inputs_embeds"][0].double()

    def note_hidden(_, args, kwargs):
        seen["hidden_states"] = (args[0] if args else kwargs["hidden_states"])[0].double()

    def note_main(_, args, output):
        seen["main"] = output[0].double()

    def note_output(_, args, output):
        seen["output"], seen["maps"] = output[0][0].double(), output[1][0].double()

    hooks = [
        decoder.register_forward_pre_hook(note_features, with_kwargs=True),
        attention.register_forward_pre_hook(note_hidden, with_kwargs=True),
        attention.o_proj.register_forward_hook(note_main),
        attention.register_forward_hook(note_output),
    ]
    with torch.no_grad():
        model(**inputs, output_attentions=True)
    for hook in hooks:
        hook.remove()
    layer, frequencies = wings_layers(model)[1], decoder.rotary_emb.inv_freq
    shown = inputs["input_ids"][0] == model.config.image_token_id
    tokens, expected = range(len(shown)), seen["main"].clone()
    of = {"visual": [t for t in tokens if shown[t]], "textual": [t for t in tokens if not shown[t]]}
    learned = {
        name: learner(
            module, seen["hidden_states"], seen["features"], tokens, of[name], frequencies
        )
        for name, module in layer.learners.items()
    }
    for token in tokens:
        row = seen["maps"][:, token].mean(0)
        logits = [float(row @ column) for column in layer.router.weight[: len(row)].double().T]
        for number, name in enumerate(layer.learners):
            weight = math.exp(logits[number]) / sum(map(math.exp, logits))
            expected[token] += weight * learned[name][token]
    assert (expected - seen["main"]).abs().max() > 1e-2
    torch.testing.assert_close(seen["output"], expected, atol=2e-5, rtol=1e-4)
