"""The embedded CLIP: what is packaged, and how it is trained."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm_prune.benchmarks.embedded_models.clip import (
    STATE,
    ClipRecipe,
    Pretraining,
    contrastive,
    domain_prompts,
    pairs,
)
from vlm_prune.benchmarks.embedded_models.clip_card import measure_domain, right_images, write_card
from vlm_prune.benchmarks.embedded_models.packaged import train_base
from vlm_prune.continual.clip import load_clip
from vlm_prune.continual.metrics import mean_accuracy
from vlm_prune.continual.streams.packaged import DOMAINS, task
from vlm_prune.continual.tiny import clip_checkpoint_path
from vlm_prune.continual.tiny.config import CONTEXT, WEIGHTS
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.folder import OutputFolder

SMALL = ClipRecipe(
    steps=6, stop=6, batch=16, warmup=2, per_class=1, width=32, layers=1, save_every=3
)


@pytest.fixture(scope="module")
def packaged():
    return load_clip("tiny")


@pytest.fixture(scope="module")
def data():
    return pairs(1)


def test_packaged_weights_are_small_and_in_half_precision(packaged):
    weights = load_file(clip_checkpoint_path() / WEIGHTS)
    assert {t.dtype for t in weights.values()} == {torch.float16}
    assert sum(p.numel() for p in packaged.model.parameters()) < 8e6
    assert sum(f.stat().st_size for f in clip_checkpoint_path().iterdir()) < 16e6
    assert (clip_checkpoint_path() / "log.jsonl").read_text().count("\n") > 50


def test_no_prompt_is_cut_and_each_ends_with_the_highest_token(packaged):
    tokens = packaged.tokenize(domain_prompts())
    assert tokens.shape[1] == CONTEXT
    assert (tokens.max(1).values == tokens.max()).all() and (tokens[:, -1] == 0).all()
    assert len({tuple(row) for row in tokens.tolist()}) == len(set(domain_prompts()))


@pytest.mark.parametrize(("name", "least"), [("colours", 0.3), ("symbols", 0.3), ("scenes", 0.85)])
def test_zero_shot_is_above_chance(packaged, name, least):
    one = task(name)
    assert mean_accuracy(right_images(packaged, [one.test[k] for k in range(96)], one))[1] > least


def card_rows():
    """Of each domain its chance, and value, low and high of the other columns, from the card."""
    rows = {}
    for line in (clip_checkpoint_path() / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if cells[0] in DOMAINS:
            figures = [[float(n) for n in re.findall(r"-?[\d.]+", cell)] for cell in cells[3:]]
            rows[cells[0]] = float(cells[2]), *figures
    return rows


@pytest.mark.slow
def test_zero_shot_is_above_chance_and_below_fine_tuning_in_every_domain():
    rows = card_rows()
    assert len(rows) == 9
    for name, (chance, zero_shot, _, _, gain) in rows.items():
        if name != "scenes":
            assert zero_shot[1] > chance and gain[1] > 0, name


@pytest.mark.slow
def test_card_says_what_is_measured(packaged):
    found, row = measure_domain(packaged, task("colours")), card_rows()["colours"]
    wanted = [100 * f[0] for f in (found.zero_shot, found.known, found.tuned, found.gain)]
    assert [figure[0] for figure in row[1:]] == pytest.approx(wanted, abs=1.5)


def test_a_killed_run_ends_like_one_without_a_break(tmp_path, data):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    Pretraining(whole, SMALL, data).run()
    Pretraining(broken, SMALL, data).run(until=5)  # the state is that of step 3
    Pretraining(broken, SMALL, data).run()
    one, two = (load_file(folder / WEIGHTS) for folder in (whole, broken))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0)
    steps = [json.loads(line)["step"] for line in (broken / "log.jsonl").read_text().splitlines()]
    assert steps == [0, 5]


def test_a_folder_holds_one_run(tmp_path, data):
    Pretraining(tmp_path, SMALL, data).run(until=1)
    with pytest.raises(InputError, match="holds a run with another"):
        Pretraining(tmp_path, ClipRecipe(steps=7), data)


def test_damaged_state_is_named(tmp_path, data):
    Pretraining(tmp_path, SMALL, data).run(until=5)
    path = tmp_path / STATE
    tensors = load_file(path)
    first = next(name for name in tensors if name.startswith("model.") and tensors[name].ndim > 1)
    for changed in (
        {n: t for n, t in tensors.items() if n != first},
        tensors | {"x": tensors[first].clone()},
        tensors | {first: tensors[first][:-1].clone()},
        tensors | {"optimizer.0|exp_avg": torch.ones(3)},
        None,
    ):
        if changed is None:
            path.write_bytes(path.read_bytes()[:99])
        else:
            save_file(changed, path)
        with pytest.raises(InputError, match=str(path)) as caught:
            Pretraining(tmp_path, SMALL, data)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", ["/", ""])
def test_a_training_writes_to_a_folder_of_its_own(folder, tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no folder of its own"):
        Pretraining(Path(folder), SMALL, data)
    with pytest.raises(InputError, match="no folder of its own"):
        train_base(Path(folder), steps=1)
    assert not any(tmp_path.iterdir())


def test_two_trainings_do_not_share_a_folder(tmp_path, data):
    first = Pretraining(tmp_path, SMALL, data)
    with OutputFolder(tmp_path), pytest.raises(InputError, match="another run writes to"):
        first.run()


def test_training_learns(tmp_path, data):
    recipe = ClipRecipe(
        steps=25, stop=25, batch=32, warmup=2, per_class=1, width=32, layers=1, shift=0
    )
    Pretraining(tmp_path, recipe, data).run()
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < losses[0] - 0.3


def test_card_of_a_model_just_trained(tmp_path, data):
    Pretraining(tmp_path, SMALL, data).run()
    figures = measure_domain(load_clip(str(tmp_path)), task("words"), steps=1)
    names = "digits letters words symbols shapes colours textures photographs scenes"
    write_card(tmp_path, dict.fromkeys(names.split(), figures))
    card = (tmp_path / "README.md").read_text()
    assert (
        sum(line.startswith(f"| {n} |") for n in names.split() for line in card.splitlines()) == 9
    )


def test_contrastive_loss_by_hand():
    # two pictures share caption 0, one has caption 1
    logits, own = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0, 1])
    rows, columns = logits.log_softmax(1), logits.log_softmax(0)
    to_text = -(rows[0, 0] + rows[1, 0] + rows[2, 1]) / 3
    to_image = -((columns[0, 0] + columns[1, 0]) / 2 + columns[2, 1]) / 2
    torch.testing.assert_close(contrastive(logits, own), (to_text + to_image) / 2)
