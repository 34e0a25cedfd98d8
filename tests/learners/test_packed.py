"""Rows packed from several questions: each answers as it does alone, with learners of every kind."""

import pytest
import torch

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import family_of

IMAGE, TOKENS = 5, 16


@pytest.fixture
def packed():
    """A prefix with an image, two question blocks that see it and not each other, and padding."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(6, 64, (14,), generator=generator)
    prefix = torch.cat([words[:4], torch.full((TOKENS,), IMAGE), words[4:5]])
    blocks = [words[5:9], words[9:14]]
    ids = torch.cat([prefix, *blocks, torch.zeros(2, dtype=torch.long)])
    start, length = len(prefix), len(ids)
    block = torch.tensor([0] * start + [1] * 4 + [2] * 5 + [-1] * 2)
    positions = torch.cat([torch.arange(start), *(start + torch.arange(len(b)) for b in blocks)])
    positions = torch.cat([positions, torch.zeros(2, dtype=torch.long)])
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = causal & ((block[:, None] == block) | (block == 0)) | torch.eye(length, dtype=torch.bool)
    mask = torch.zeros(length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
    rows = [torch.cat([prefix, b]) for b in blocks]
    inputs = {
        "input_ids": ids[None],
        "position_ids": positions[None],
        "attention_mask": mask[None, None],
        "use_cache": False,
    }
    return inputs, rows, [slice(start, start + 4), slice(start + 4, start + 9)], start


@pytest.mark.parametrize(
    "options",
    [{}, {"router": "sum"}, {"router": "none"}, {"visual_mask": "all"}, {"skip_text": 2}],
    ids=str,
)
@pytest.mark.parametrize("boolean", [False, True])
def test_a_packed_question_has_the_logits_it_has_alone(options, boolean, packed, winged):
    model = winged(**options)
    inputs, rows, places, start = packed
    features = torch.randn(TOKENS, 32, generator=torch.Generator().manual_seed(1))
    if boolean:
        inputs["attention_mask"] = inputs["attention_mask"] == 0
    with torch.no_grad():
        together = model(**inputs, mm_encoder_outputs=family_of(model).output([features])).logits[0]
        for row, place in zip(rows, places, strict=True):
            alone = model(
                input_ids=row[None], mm_encoder_outputs=family_of(model).output([features])
            ).logits
            torch.testing.assert_close(together[place], alone[0, start:], atol=2e-4, rtol=1e-4)


def test_packed_rows_need_positions_and_no_cache(packed, winged):
    model, inputs = winged(), packed[0]
    features = family_of(model).output([torch.zeros(TOKENS, 32)])
    with pytest.raises(InputError, match="need position_ids"):
        model(**inputs | {"position_ids": None}, mm_encoder_outputs=features)
    with pytest.raises(InputError, match="2D attention mask"):
        model(**inputs | {"use_cache": True}, mm_encoder_outputs=features)
