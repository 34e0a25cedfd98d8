"""Every command that loads a model loads it in each way that this machine can, or says why it cannot."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_families import Tiny

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
COMMANDS = ("schedule", "search", "map", "demo")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder with a LLaVA and one with LoRA weights for it."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("loading")
    tiny = Tiny("llava")
    tiny.model.save_pretrained(folder / "model")
    tiny.processor.save_pretrained(folder / "model")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], base_model_name_or_path=str(folder / "model")
    )
    peft.get_peft_model(tiny.model, config).save_pretrained(folder / "lora")
    return folder


def command(name, folder, tmp_path):
    """The command line of a short run."""
    command = [name, "--model", folder / "model"]
    if name == "schedule":
        return [
            *command,
            "--data",
            "attribute",
            "--limit",
            "2",
            "--budget",
            "0.5",
            "--output",
            tmp_path / "out",
        ]
    if name == "search":
        return [
            *command,
            "--budget",
            "26",
            "--tasks",
            "attribute",
            "--limit",
            "2",
            "--output",
            tmp_path / "out",
            "--definitions",
            tmp_path / "best.json",
        ]
    if name == "demo":
        return [*command, "--port", "65000"]
    (tmp_path / "images").mkdir(exist_ok=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "images" / "a.png")
    return [
        *command,
        "--input",
        tmp_path / "images",
        "--prompt",
        "red?",
        "--output",
        tmp_path / "out.parquet",
    ]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--device-map", "balanced", "unknown device map 'balanced'"),
        ("--quantization", "4bit", "did you mean 'bnb-4bit'"),
        ("--attn", "flash", "unknown attention 'flash'"),
        ("--attn", "flash_attention_2", "FlashAttention2"),
        ("--adapter", "nowhere", "nowhere"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    run, adapter, tmp_path, monkeypatch, name, option, value, message
):
    if name == "map":  # what a model of the pool is refused for is the pool's refusal
        from vlm_prune.benchmarks.batch import pipeline

        def refused(config, *_):
            answerer = pipeline.Answerer(config, "cpu")
            raise pipeline.InputError(answerer.refused)

        monkeypatch.setattr(pipeline, "map_images", refused)
    code, _, err = run(*command(name, adapter, tmp_path), option, value)
    assert code == 2, err
    assert message in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "options",
    [
        ("--attn", "eager"),
        ("--device-map", "auto"),
        ("--quantization", "torchao-int8"),
        ("--adapter", "lora"),
    ],
    ids=lambda options: options[0],
)
def test_a_schedule_of_a_model_loaded_in_each_way(run, adapter, tmp_path, options):
    if "torchao-int8" in options:
        pytest.importorskip("torchao")
    option, value = options
    value = adapter / value if value == "lora" else value
    code, _, err = run(*command("schedule", adapter, tmp_path), option, value)
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "schedule.json").read_text())["layers"] == 4


@pytest.mark.parametrize("name", ["search", "map", "demo"])
def test_options_reach_the_loader(run, adapter, tmp_path, monkeypatch, name):
    """The model is made as asked, up to where the command goes on with it."""
    seen = {}

    def noted(*args, **options):
        seen.update(options)
        raise InputError("as far as this")

    from vlm_prune.benchmarks.batch import pipeline
    from vlm_prune.benchmarks.report import demo
    from vlm_prune.vlm import load
    from vlm_prune.vlm.common.errors import InputError

    for module in (load, pipeline, demo):
        monkeypatch.setattr(module, "load", noted)
    monkeypatch.setattr(
        pipeline, "map_images", lambda config, *_: pipeline.Answerer(config, "cpu") and (0, 0)
    )
    options = {
        "device_map": "auto",
        "quantization": "torchao-int8",
        "attn": "eager",
        "adapter": "lora",
    }
    given = [
        part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)
    ]
    run(
        *command(name, adapter, tmp_path)[:-2]
        if name == "demo"
        else command(name, adapter, tmp_path),
        *given,
    )
    assert seen == options


def test_vllm_has_options_of_its_own(run, adapter, tmp_path):
    code, _, err = run(*command("map", adapter, tmp_path), "--engine", "vllm", "--attn", "eager")
    assert code == 2 and "are for --engine hf" in err
