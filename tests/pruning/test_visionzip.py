"""VisionZip against a slow loop written from the paper, and its keys against the tower's own."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from vlm_prune.pruning.received import in_tower
from vlm_prune.pruning.visionzip import VisionZip
from vlm_prune.vlm.common.errors import InputError


@pytest.mark.parametrize(("budget", "merged"), [(64, 10), (128, 20), (192, 30), (1, 0)])
def test_reduce_equals_the_papers_loop(budget, merged, vision):
    kept = VisionZip(budget=budget).reduce(vision)
    attention, keys = in_tower(vision, "cls"), vision.keys()
    for image in range(2):
        ranked = sorted(range(576), key=lambda i: -float(attention[image, i]))
        dominant, rest = ranked[: budget - merged], sorted(ranked[budget - merged :])
        expected = {i: vision.projected[image, i] for i in dominant}
        targets = [rest[j * (len(rest) // merged)] for j in range(merged)]
        groups = {t: [t] for t in targets}
        for i in rest:
            if merged and i not in groups:
                similar = cosine_similarity(keys[image, i], keys[image, targets])
                groups[targets[int(similar.argmax())]].append(i)
        for target, members in groups.items():
            mean = vision.features[image, members].mean(0)
            expected[target] = vision.projector(mean)
        assert kept.indices[image].tolist() == sorted(expected)
        stacked = torch.stack([expected[i] for i in sorted(expected)])
        torch.testing.assert_close(kept.features[image], stacked, atol=1e-5, rtol=1e-4)


def test_the_released_rule_equals_a_loop(vision):
    """Keys averaged over heads say whom a token joins; the joined ones' mean is added to the start."""
    budget, merged = 64, 10
    kept = VisionZip(budget=budget, released=True).reduce(vision)
    plain = VisionZip(budget=budget).reduce(vision)
    attention, keys = in_tower(vision, "cls"), vision.query_key()[1]
    for image in range(2):
        ranked = sorted(range(576), key=lambda i: -float(attention[image, i]))
        dominant, rest = ranked[: budget - merged], sorted(ranked[budget - merged :])
        targets = [rest[j * (len(rest) // merged)] for j in range(merged)]
        mean_key = [sum(head[1 + i] for head in keys[image]) / len(keys[image]) for i in range(576)]
        joined = {target: [] for target in targets}
        for i in rest:
            if i not in joined:
                similar = [float(cosine_similarity(mean_key[i], mean_key[t], 0)) for t in targets]
                joined[targets[similar.index(max(similar))]].append(i)
        expected = {i: vision.projected[image, i] for i in dominant}
        for target, members in joined.items():
            token = vision.features[image, target]
            if members:
                token = token + vision.features[image, members].mean(0)
            expected[target] = vision.projector(token)
        assert kept.indices[image].tolist() == sorted(expected) == plain.indices[image].tolist()
        stacked = torch.stack([expected[i] for i in sorted(expected)])
        torch.testing.assert_close(kept.features[image], stacked, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(kept.features[image], plain.features[image], atol=1e-3)


def test_keys_are_those_of_the_feature_layer(llava, images, make_inputs, vision):
    """Their products with the layer's queries give the attention that the tower reports."""
    pixels = make_inputs([(2, "Is there a 7?")], images)["pixel_values"]
    seen = []
    layer = llava.model.vision_tower.encoder.layers[-2]
    hook = layer.self_attn.k_proj.register_forward_hook(lambda *call: seen.append(call[2]))
    try:
        with torch.no_grad():
            llava.model.vision_tower(pixels)
    finally:
        hook.remove()
    torch.testing.assert_close(vision.keys(), seen[0][:, 1:])


def test_a_share_of_one_is_refused():
    with pytest.raises(InputError, match="contextual"):
        VisionZip(contextual=1)
