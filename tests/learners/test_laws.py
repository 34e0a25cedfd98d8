"""Layer-level attention weights against the maps of eager attention."""

import pytest
import torch

from vlm_prune.learners.laws import answer_queries, attention_shift, laws, plot_curves, segments

ROWS = [(1, 5), (1, 9), (0, 6)]


@pytest.mark.parametrize("first_token", [True, False])
@pytest.mark.parametrize("answers", [True, False])
def test_curves_equal_sums_over_attention_maps(first_token, answers, llava, prompts):
    inputs = prompts(ROWS)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = 7
    queries = answer_queries(labels) if answers else None
    ours = laws(llava, inputs, queries, first_token)
    llava.set_attn_implementation("eager")
    with torch.no_grad():
        maps = llava(**inputs, output_attentions=True).attentions
    for row, (images, text) in enumerate(ROWS[:2]):
        start = inputs["input_ids"].shape[1] - 2 * text - 16 * images
        image = start + text
        rows = slice(-4, -1) if answers else slice(start, None)
        for layer, weights in enumerate(maps):
            seen = weights[row, :, rows].mean((0, 1))
            expected = torch.stack(
                [
                    seen[start + (not first_token) : image].sum(),
                    seen[image : image + 16].sum(),
                    seen[image + 16 :].sum(),
                ]
            )
            torch.testing.assert_close(ours[row, :, layer], expected)
    assert not ours[2].any()
    if first_token:
        torch.testing.assert_close(ours[:2].sum(1), torch.ones(2, 3))


def test_the_main_branch_of_a_model_with_learners_is_read(winged, prompts):
    inputs = prompts(ROWS)
    model = winged()
    curves = laws(model, inputs)
    torch.testing.assert_close(curves[:2].sum(1), torch.ones(2, 3))
    assert torch.equal(laws(model, inputs), curves)


def test_text_between_two_images_belongs_to_no_group():
    ids = torch.tensor([[0, 1, 5, 5, 1, 5, 1]])
    groups = segments(ids == 5, ids > 0)
    assert groups[0].argmax(-1).tolist() == [0, 0, 1, 1, 0, 1, 2]
    assert groups[0].sum(-1).tolist() == [0, 1, 1, 1, 0, 1, 1]


def test_attention_shift_is_one_minus_the_correlation():
    torch.manual_seed(0)
    curves = torch.rand(5, 3, 7)
    for row, score in zip(curves, attention_shift(curves), strict=True):
        expected = 1 - torch.corrcoef(row[[0, 2]])[0, 1]
        torch.testing.assert_close(score, expected)
    curves[:, 2] = 2 * curves[:, 0] + 1
    torch.testing.assert_close(attention_shift(curves), torch.zeros(5), atol=1e-6, rtol=0)
    curves[0, 2] = 0.5
    assert attention_shift(curves).isnan().tolist() == [True] + [False] * 4


def test_the_plot_is_a_picture(tmp_path):
    from PIL import Image

    pytest.importorskip("matplotlib")
    plot_curves([torch.rand(2, 3, 4), torch.rand(1, 3, 4)], tmp_path / "laws.png")
    with Image.open(tmp_path / "laws.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 3
