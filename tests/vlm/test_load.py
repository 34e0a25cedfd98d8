"""Checkpoints as strangers make them: no code runs, and what is wrong with one is said in one line."""

import json
import shutil
from contextlib import suppress

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_families import Tiny
from transformers import AutoModelForImageTextToText

from vlm_prune.pruning.pipeline import PrunedVLM
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.load import QUANTIZATIONS, _check_quantized, family_type, load, load_language

ON_DISK = {
    "model.vision_tower": "cpu",
    "model.multi_modal_projector": "disk",
    "model.language_model": "disk",
    "lm_head": "cpu",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a whole LLaVA."""
    folder = tmp_path_factory.mktemp("whole")
    tiny = Tiny("llava")
    tiny.model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it that a test may damage."""
    return shutil.copytree(saved, tmp_path / "model")


def change(folder, name, **values):
    """Set keys in a JSON file, `part__key` inside of `part`; it is made if it is missing."""
    path = folder / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    for key, value in values.items():
        part, _, inner = key.rpartition("__")
        (content[part] if part else content)[inner] = value
    path.write_text(json.dumps(content))


def refused(name, load=load, **options):
    """The one line with which a checkpoint is refused."""
    with pytest.raises(InputError) as caught:
        load(str(name), **options)
    line = str(caught.value)
    assert "\n" not in line and line.startswith("cannot load")
    return line


def test_every_family_comes_back_as_it_was_saved(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    model, processor = load(str(tmp_path))
    before, after = tiny.model.state_dict(), model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert type(model) is type(tiny.model) and type(processor) is type(tiny.processor)
    assert model.name_or_path == model.config.name_or_path == str(tmp_path)
    messages = [{"role": "user", "content": [{"type": "text", "text": "Is there a 7?"}]}]
    chats = [p.apply_chat_template(messages) for p in (processor, tiny.processor)]
    assert chats[0] == chats[1]
    assert processor.tokenizer(chats[0]).input_ids == tiny.processor.tokenizer(chats[1]).input_ids


def test_every_family_without_one_of_its_tensors_is_refused(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for parts in (("vision", "visual"), ("layers.2",)):
        cut = next(name for name in weights if any(part in name for part in parts))
        rest = {name: tensor for name, tensor in weights.items() if name != cut}
        save_file(rest, tmp_path / "model.safetensors", {"format": "pt"})
        assert "the weights lack tensors of the configuration (1, first" in refused(tmp_path)


MAP = {
    name: f"evil.{name}"
    for name in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor",
                 "AutoImageProcessor", "AutoVideoProcessor")
} | {"AutoTokenizer": ["evil.Slow", "evil.Fast"]}  # fmt: skip
CODE = {
    "model": [("config.json", {"auto_map": MAP})],
    "unknown model": [("config.json", {"auto_map": MAP, "model_type": "evil"})],
    "tower": [("config.json", {"vision_config__auto_map": MAP})],
    "tower that no class is for": [
        ("config.json", {"vision_config__auto_map": MAP, "vision_config__model_type": "clip_text_model"})
    ],
    "decoder": [("config.json", {"text_config__auto_map": MAP})],
    "attention": [("config.json", {"_attn_implementation": "evil/kernel"})],
    "attention of the decoder": [("config.json", {"text_config__attn_implementation": "evil/kernel"})],
    "experts": [("config.json", {"experts_implementation": "evil/kernel"})],
    "processor": [("processor_config.json", {"auto_map": MAP})],
    "processor without a class": [
        ("processor_config.json", {"auto_map": MAP, "processor_class": None}),
        ("tokenizer_config.json", {"auto_map": MAP, "processor_class": None}),
    ],
    "image processor": [("preprocessor_config.json", {"auto_map": MAP, "image_processor_type": "EvilImageProcessor"})],
    "image processor of a processor": [
        ("processor_config.json", {"image_processor__auto_map": MAP, "image_processor__image_processor_type": "EvilImageProcessor"})
    ],
    "tokenizer": [("tokenizer_config.json", {"auto_map": MAP, "tokenizer_class": "EvilTokenizer"})],
    "tokenizer that asks to be trusted": [
        ("tokenizer_config.json", {"auto_map": MAP, "trust_remote_code": True, "tokenizer_class": "EvilTokenizer"})
    ],
    "special tokens": [("special_tokens_map.json", {"auto_map": MAP})],
    "another model as tokenizer": [("tokenizer_config.json", {"tokenizer_class": "AutoModel"})],
    "another model as processor": [("processor_config.json", {"processor_class": "AutoProcessor"})],
    "audio tokenizer": [
        ("processor_config.json", {"audio_tokenizer": {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": "."}})
    ],
    "generation": [("generation_config.json", {"custom_generate": ".", "auto_map": MAP})],
    "timm": [("config.json", {"vision_config__model_type": "timm_backbone", "vision_config__backbone": "hf-hub:evil/model"})],
}  # fmt: skip


@pytest.fixture
def trapped(folder, tmp_path, monkeypatch):
    """The folder with code in it, and the marker that the code leaves, as does a question to the user."""
    marker = tmp_path / "marker"
    code = f"import pathlib\npathlib.Path({str(marker)!r}).write_text('ran')\nclass Slow: pass\nFast = Slow\n"
    for place in (folder, folder / "custom_generate"):
        place.mkdir(exist_ok=True)
        for name in ("evil.py", "generate.py", "__init__.py"):
            (place / name).write_text(code)
    monkeypatch.setattr("builtins.input", lambda *_: marker.write_text("prompts") and "y")
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code")
    )
    monkeypatch.chdir(folder)
    return folder, marker


@pytest.mark.parametrize("case", CODE)
@pytest.mark.parametrize("reader", [load, family_type])
def test_no_code_of_a_checkpoint_runs_and_nobody_is_asked(case, reader, trapped):
    folder, marker = trapped
    for name, values in CODE[case]:
        change(folder, name, **values)
    try:
        reader(str(folder))
    except InputError as error:
        assert "\n" not in str(error)
    assert not marker.exists()


def test_plain_transformers_asks_whether_to_run_the_same_code(trapped):
    folder, marker = trapped
    for name, values in CODE["unknown model"]:
        change(folder, name, **values)
    with suppress(Exception):  # what runs is no model
        AutoModelForImageTextToText.from_pretrained(folder)
    assert marker.exists()


def test_a_pickle_is_never_read(folder, tmp_path):
    """Weights, of the model or of an adapter beside it, that would run code when they are unpickled."""
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return (marker.write_text, ("ran",))

    torch.save({"weight": Evil()}, folder / "pytorch_model.bin")
    torch.save({"weight": Evil()}, folder / "adapter_model.bin")
    change(folder, "adapter_config.json", peft_type="LORA", base_model_name_or_path=str(folder))
    load(str(folder))
    change(folder, "config.json", transformers_weights="pytorch_model.bin")
    load(str(folder))
    (folder / "model.safetensors").unlink()
    assert "only pytorch_model.bin, a pickle, which is not read" in refused(folder)
    assert not marker.exists()


def test_weights_outside_of_the_folder_are_not_read(folder, saved):
    (folder / "model.safetensors").unlink()
    for name in (str(saved / "model.safetensors"), "../whole/model.safetensors", "x.bin", 3, None):
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "which is no safetensors file beside it" in refused(folder)


def test_shards_are_read_and_a_missing_one_is_named(folder, saved):
    whole, _ = load(str(saved))
    whole.save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    model, _ = load(str(folder))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True)
    )
    next(folder.glob("model-00002*")).unlink()
    assert "lacks model-00002" in refused(folder)


def damaged(edit):
    def apply(folder):
        path = folder / "model.safetensors"
        weights = load_file(path)
        save_file(edit(weights), path, {"format": "pt"})

    return apply


def without(*parts):
    return damaged(lambda w: {n: t for n, t in w.items() if not any(p in n for p in parts)})


def renamed(before, after):
    return damaged(lambda w: {name.replace(before, after): t for name, t in w.items()})


def filled(part, value):
    def edit(weights):
        name = next(name for name in weights if part in name)
        weights[name].view(-1)[-1] = value
        return weights

    return damaged(edit)


def setting(name="config.json", **values):
    return lambda folder: change(folder, name, **values)


def reshaped(weights):
    name = next(name for name in weights if "mlp.down_proj" in name)
    return weights | {name: weights[name][:, :-1].contiguous()}


LACK, HOLD = "the weights lack tensors", "which the configuration does not describe"
WRONG = {
    "no tower": (without("vision_tower"), LACK),
    "no projector": (without("multi_modal_projector"), LACK),
    "no layer": (without("layers.1."), LACK),
    "no head": (without("lm_head"), LACK),
    "no embeddings": (without("embed_tokens"), LACK),
    "no norm": (without("norm.weight"), LACK),
    "renamed": (renamed("self_attn", "attention"), LACK),
    "one more": (damaged(lambda w: w | {"extra.weight": torch.ones(2)}), HOLD),
    "fewer layers described": (setting(text_config__num_hidden_layers=2), HOLD),
    "more layers described": (setting(text_config__num_hidden_layers=5), LACK),
    "a shallower tower described": (setting(vision_config__num_hidden_layers=2), HOLD),
    "endless layers": (setting(text_config__num_hidden_layers=10**9), "is 1000000000, but the weights"),
    "a wider decoder": (setting(text_config__hidden_size=64), "where the configuration describes"),
    "a huge vocabulary": (setting(text_config__vocab_size=10**12), "weights, but"),
    "a huge picture": (setting(vision_config__image_size=10**7), "cannot load"),
    "another shape": (damaged(reshaped), "mlp.down_proj.weight' is"),
    "nan": (filled("q_proj", torch.nan), "q_proj.weight' has values that are not finite"),
    "inf in the tower": (filled("vision_tower", torch.inf), "values that are not finite"),
    "-inf in a norm": (filled("norm.weight", -torch.inf), "values that are not finite"),
    "std of 0": (setting("processor_config.json", image_processor__image_std=[0, 1, 1]), "image_std"),
    "std in words": (setting("processor_config.json", image_processor__image_std="no"), "image_std"),
    "mean without end": (
        setting("processor_config.json", image_processor__image_mean=[float("inf"), 0, 0]), "image_mean",
    ),
    "rescaled to nothing": (
        setting("processor_config.json", image_processor__rescale_factor=0), "rescale_factor",
    ),
    "pan and scan": (setting("processor_config.json", image_processor__do_pan_and_scan=True), "pan and scan"),
    "no chat template": (lambda f: (f / "chat_template.jinja").unlink(), "put a chat_template.jinja"),
    "a wrong chat template": (
        lambda f: (f / "chat_template.jinja").write_text("{% for %}"), "the chat template fails",
    ),
    "a chat template that reaches for Python": (
        lambda f: (f / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        "the chat template fails",
    ),
    "another image token": (setting(image_token_index=3), "is 4 in the tokenizer, 3 in config.json"),
    "no model": (setting(model_type=None), "is not supported; supported: llava"),
    "a list for a model": (setting(model_type=["llava"]), "is not supported; supported: llava"),
    "a model without pictures": (setting(model_type="llama"), "is not supported; supported: llava"),
    "a type": (setting(torch_dtype="float31", dtype="float31"), "cannot load"),
    "quantization": (setting(quantization_config="4 bit"), "cannot load"),
    "quantization by a library that is not here": (
        setting(quantization_config={"quant_method": "aqlm"}), "aqlm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_damaged_checkpoint_is_refused_in_one_line(case, folder):
    damage, message = WRONG[case]
    damage(folder)
    assert message in refused(folder)


FILES = (
    "config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json",
    "tokenizer.json", "model.safetensors",
)  # fmt: skip


def header(**tensor):
    """A safetensors file of one tensor and no data."""
    text = json.dumps({"x": {"dtype": "F32", **tensor}}).encode()
    return len(text).to_bytes(8, "little") + text


CONTENTS = {
    "empty": b"",
    "null": b"null",
    "list": b"[1, 2]",
    "text": b'"text"',
    "brackets": b"[" * 100_000,
    "objects": b'{"a":' * 100_000,
    "bytes": bytes(range(256)),
    "cut": None,
    "a header of 2^60 bytes": (1 << 60).to_bytes(8, "little") + b"{}",
    "a header of nothing": (0).to_bytes(8, "little"),
    "a header of brackets": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "tensors beyond the file": header(shape=[2**40], data_offsets=[0, 2**42]),
    "a shape without end": header(shape=[2**62, 2**62], data_offsets=[0, 0]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", CONTENTS)
def test_files_of_other_contents_are_refused_in_one_line(name, kind, folder):
    content = CONTENTS[kind]
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    refused(folder)


VALUES = (None, -1, 0, 10**30, 1.5, float("inf"), float("nan"), "text", "3", [], {}, True, "\ud800")


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "generation_config.json"])
def test_a_value_of_another_kind_loads_or_is_refused_in_one_line(name, saved, folder):
    """Each key of a file in turn takes an odd value: nothing but an `InputError` leaves the reader."""
    whole = json.loads((saved / name).read_text())
    places = [(whole, key) for key in whole]
    places += [(part, key) for part in whole.values() if isinstance(part, dict) for key in part]
    for number, (part, key) in enumerate(places):
        before = part[key]
        part[key] = value = VALUES[number % len(VALUES)]
        (folder / name).write_text(json.dumps(whole))
        try:
            load(str(folder))
        except InputError as error:
            assert "\n" not in str(error), (key, value)
        part[key] = before


@pytest.mark.parametrize("version", [4, 5])
def test_names_of_each_version_load(version, folder):
    """transformers 4 and 5 name LLaVA's parts apart; old files hold buffers beside the weights."""
    path = folder / "model.safetensors"
    weights, expected = load_file(path), load(str(folder))[0].state_dict()
    prefixes = (
        ("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower."), ("multi_modal", "model.multi_modal"),
    )  # fmt: skip
    assert all(name.startswith(tuple(old for old, _ in prefixes)) for name in weights)
    for old, new in prefixes if version == 5 else ():
        weights = {
            new + name.removeprefix(old) if name.startswith(old) else name: tensor
            for name, tensor in weights.items()
        }
    tower = next(name for name in weights if name.endswith("position_embedding.weight"))
    weights[tower.replace("position_embedding.weight", "position_ids")] = torch.arange(26)[None]
    layer = next(name for name in weights if name.endswith("layers.0.self_attn.q_proj.weight"))
    weights[layer.replace("q_proj.weight", "rotary_emb.inv_freq")] = torch.ones(8)
    save_file(weights, path, {"format": "pt"})
    state = load(str(folder))[0].state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_tied_weights_are_stored_once(saved, folder):
    change(folder, "config.json", tie_word_embeddings=True, text_config__tie_word_embeddings=True)
    without("lm_head")(folder)
    model, _ = load(str(folder))
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_weights_that_a_smaller_type_cannot_hold_are_refused(folder):
    filled("q_proj", 1e6)(folder)
    load(str(folder))
    assert "not finite" in refused(folder, dtype="float16")


def test_a_language_model_is_checked_as_well(folder, tmp_path):
    assert "sees images; give a text-only one" in refused(folder, load_language)
    model, processor = load(str(folder))
    text = tmp_path / "text"
    model.model.language_model.save_pretrained(text)
    processor.tokenizer.save_pretrained(text)
    assert LACK in refused(text, load_language)  # no head


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinny", "there is no such model; did you mean 'tiny'?"),
        (
            "nonsense",
            "there is no such model; give 'tiny', 'smol', 'tiny-video', a checkpoint folder, or owner/model",
        ),
        ("/nowhere/a/model", "there is no such model; give"),
        ("owner/model/more", "there is no such model; give"),
        ("", "it is no folder"),
        ("a\0b", "there is no such model"),
        ("x" * 5000, "cannot load"),
    ],
)
def test_wrong_names_are_refused_without_the_network(name, message, monkeypatch):
    def dialed(*_arguments, **_options):
        raise AssertionError("the network was tried")

    monkeypatch.setattr("huggingface_hub.snapshot_download", dialed)
    monkeypatch.setattr("socket.socket.connect", dialed)
    assert message in refused(name)
    assert message in refused(name, family_type)


def test_a_misspelled_folder_is_told_its_neighbor(folder):
    assert f"did you mean {str(folder)!r}?" in refused(folder.with_name("modle"))


def test_a_hub_name_is_read_from_the_cache(saved, tmp_path, monkeypatch):
    """Files lie in the cache as huggingface_hub lays them out; code beside them is not linked."""
    commit = "0" * 40
    repository = tmp_path / "models--owner--model"
    shutil.copytree(saved, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model, _ = load("owner/model")
    assert model.name_or_path == "owner/model"
    assert family_type("owner/model").__name__ == "Llava"
    assert "cannot load model 'owner/other'" in refused("owner/other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "unknown device 'gpu'; give auto, cpu, cuda"),
        ({"attn": "flash"}, "unknown attention 'flash'"),
        ({"quantization": "4bit"}, "unknown quantization '4bit'; did you mean 'bnb-4bit'?"),
        ({"device_map": "balanced"}, "unknown device map 'balanced'"),
        ({"device": "cuda:99"}, "there is no device 'cuda:99' here"),
        ({"device": "meta"}, "there is no device 'meta' here"),
        ({"device": ""}, "unknown device ''"),
        ({"dtype": "float31"}, "unknown dtype 'float31'; did you mean 'float32'?"),
    ],
)
def test_wrong_devices_and_types(options, message):
    with pytest.raises(InputError) as caught:
        load("tiny", **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture(scope="module")
def shown():
    """A LLaVA and a prompt with a picture."""
    tiny = Tiny("llava")
    return tiny, tiny.inputs([[([0], "Is there a 7?")]])


@pytest.mark.parametrize(
    ("options", "close"),
    [
        ({}, 0),
        ({"device": "auto", "attn": "sdpa"}, 0),
        ({"attn": "eager"}, 1e-4),
        pytest.param({"attn": "flex_attention"}, 1e-4, marks=pytest.mark.slow),  # compiles
        ({"device_map": "auto"}, 1e-5),
        ({"device_map": ON_DISK}, 1e-5),
        ({"quantization": "torchao-int8"}, 1.0),
        ({"quantization": "bnb-8bit"}, 1.0),
    ],
    ids=str,
)  # fmt: skip
def test_each_way_of_loading_answers_alike(options, close, saved, shown):
    """Attention kernels, CPU and disk, and integers; the projector is part of what is spread."""
    if library := QUANTIZATIONS.get(options.get("quantization", "")):
        pytest.importorskip(library)
    if "device_map" in options:
        pytest.importorskip("accelerate")
    tiny, inputs = shown
    model, _ = load(str(saved), **options)
    found = logits(model, inputs)
    assert (found - logits(tiny.model, inputs)).abs().max() <= close
    if "quantization" in options:
        assert not torch.equal(found, logits(tiny.model, inputs))
    if isinstance(options.get("device_map"), dict):
        assert all(p.is_meta for p in model.model.language_model.parameters())
    if "attn" in options:
        assert model.config._attn_implementation == options["attn"]


@pytest.mark.parametrize("name", ["divprune", "fastv"])
def test_prunedvlm_spreads_a_model(name, saved, shown):
    """It answers as the model in one place, also where its projector and decoder are on disk."""
    pytest.importorskip("accelerate")
    tiny, _ = shown
    whole = PrunedVLM.from_pretrained(str(saved), name, 4, device="cpu")
    prompts = (tiny.pictures[:2], ["red?", "Is there a 7?"])
    expected = whole.replies(*prompts, max_new_tokens=4)
    for device_map in ("auto", ON_DISK):
        spread = PrunedVLM.from_pretrained(str(saved), name, 4, device_map=device_map)
        assert spread.replies(*prompts, max_new_tokens=4) == expected
    assert any(p.is_meta for p in spread.model.parameters())
    with pytest.raises(InputError, match="unknown device map 'balanced'"):
        PrunedVLM.from_pretrained(str(saved), name, 4, device_map="balanced")


@pytest.mark.parametrize(
    "more",
    [{"attn": "eager"}, {"quantization": "torchao-int8"}, {"quantization": "bnb-8bit"}],
    ids=str,
)
def test_prunedvlm_loads_as_load_does(more, saved, shown):
    if library := QUANTIZATIONS.get(more.get("quantization", "")):
        pytest.importorskip(library)
    tiny, inputs = shown
    vlm = PrunedVLM.from_pretrained(str(saved), "divprune", 4, device="cpu", **more)
    model, _ = load(str(saved), device="cpu", **more)
    assert torch.equal(logits(vlm.model, inputs), logits(model, inputs))
    assert vlm.model.config._attn_implementation == model.config._attn_implementation
    assert vlm.replies(tiny.pictures[:1], ["red?"], max_new_tokens=2)[0].kept_tokens == 4
    with pytest.raises(InputError, match="unknown quantization 'int3'"):
        PrunedVLM.from_pretrained(str(saved), quantization="int3")


def test_layers_that_a_library_packs_but_cannot_compute_are_named(saved, monkeypatch):
    """As bitsandbytes on a CPU, whose 4-bit kernels take multiples of 32 outputs alone."""
    pytest.importorskip("torchao")

    def fail(self, given):
        raise AssertionError("N must be divisible by block_n")

    monkeypatch.setattr(torch.nn.Linear, "forward", fail)
    line = refused(saved, quantization="torchao-int8")
    assert "torchao-int8 cannot compute a layer of" in line and "divisible by block_n" in line


def test_the_embedded_model_runs_or_is_refused_in_four_bits():
    pytest.importorskip("bitsandbytes")
    try:
        vlm = PrunedVLM.from_pretrained("tiny", "divprune", device="cpu", quantization="bnb-4bit")
    except InputError as refusal:
        assert "bnb-4bit cannot compute a layer of" in str(refusal)
        assert "give another quantization" in str(refusal) and "\n" not in str(refusal)
    else:
        assert vlm.answer(Image.new("RGB", (336, 336)), "red?", max_new_tokens=2) is not None


def test_a_partly_quantized_model_says_how_much_is_left(saved, capsys):
    quantization = pytest.importorskip("torchao.quantization")
    model, _ = load(saved, "cpu")
    eight_bits = quantization.Int8WeightOnlyConfig()
    down = [name for name, _ in model.named_modules() if name.endswith("down_proj")]
    quantization.quantize_(model, eight_bits, lambda m, name: name in down)
    _check_quantized(model, "torchao-int8")
    inner = sum(isinstance(m, torch.nn.Linear) for m in model.modules()) - 1
    said = f"torchao-int8: {inner - len(down)} of {inner} linear layers stay in float32, as the library"
    assert said in capsys.readouterr().err
    quantization.quantize_(
        model, eight_bits,
        lambda m, name: isinstance(m, torch.nn.Linear) and name not in [*down, "lm_head"],
    )  # fmt: skip
    _check_quantized(model, "torchao-int8")
    assert "stay in" not in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusals of a machine without a GPU")
def test_what_this_machine_cannot_do_is_the_librarys_own_line(saved):
    assert "FlashAttention2" in refused(saved, attn="flash_attention_2")
    pytest.importorskip("torchao")
    assert "needs the kernels of mslk" in refused(saved, quantization="torchao-int4")


def test_a_model_that_is_left_as_it_was_is_refused(saved):
    model, _ = load(saved, "cpu")
    with pytest.raises(InputError, match="too narrow for this quantization"):
        _check_quantized(model, "torchao-int4")


def test_a_library_that_is_missing_is_named(saved, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert "bnb-4bit needs bitsandbytes: pip install" in refused(saved, quantization="bnb-4bit")


@pytest.fixture
def adapter(saved, tmp_path):
    """The folder of a LoRA on decoder and projector, and the logits that it gives."""
    peft = pytest.importorskip("peft")

    def make(inputs, **options):
        model, _ = load(str(saved))
        options = {"target_modules": ["q_proj", "linear_1"], "r": 4, "lora_alpha": 8} | options
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        wrapped.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", logits(wrapped.eval(), inputs)

    return make


PEFT_WARNS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@PEFT_WARNS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["multi_modal_projector"], "target_modules": ["k_proj"]},
    ],
    ids=str,
)
def test_an_adapter_answers_as_under_peft(options, adapter, saved, shown):
    _, inputs = shown
    folder, expected = adapter(inputs, **options)
    wrapper = PrunedVLM.from_pretrained(str(saved), device="cpu", adapter=str(folder))
    for model in (load(str(saved), adapter=str(folder))[0], load(str(folder))[0], wrapper.model):
        assert type(model).__name__ == "LlavaForConditionalGeneration"
        assert torch.equal(logits(model, inputs), expected)
        assert not torch.equal(expected, logits(shown[0].model, inputs))
    assert family_type(str(folder)).__name__ == "Llava"


@PEFT_WARNS
def test_an_adapter_of_a_stranger_runs_nothing_and_is_refused_in_one_line(
    adapter, saved, shown, tmp_path, monkeypatch
):
    folder, _ = adapter(shown[1])
    marker, weights = tmp_path / "marker", folder / "adapter_model.safetensors"
    code = f"import pathlib\npathlib.Path({str(marker)!r}).write_text('ran')\n"
    (tmp_path / "evil_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    whole, tensors = (folder / "adapter_config.json").read_text(), load_file(weights)

    def attempt(**values):
        (folder / "adapter_config.json").write_text(whole)
        change(folder, "adapter_config.json", **values)
        try:
            load(str(saved), adapter=str(folder))
        except InputError as error:
            assert "\n" not in str(error)
            return str(error)
        return ""

    mapping = {"parent_library": "evil_module", "base_model_class": "Evil"}
    assert not attempt(auto_mapping=mapping, megatron_config={"a": 1}, megatron_core="evil_module")
    for values, message in (
        ({"peft_type": "XLORA"}, "its peft_type is 'XLORA'; LORA is supported"),
        ({"layer_replication": [[0, 1]]}, "its option 'layer_replication' is not supported"),
        ({"r": "4"}, "is damaged"), ({"r": 10**12}, "rank"), ({"r": None}, "is damaged"),
        ({"target_modules": None}, "is damaged"), ({"target_modules": ["nothing"]}, "cannot load"),
        ({"r": 8}, "where the configuration describes"), ({"rank_pattern": []}, "is damaged"),
    ):  # fmt: skip
        assert message in attempt(**values)
    (folder / "adapter_config.json").write_text(whole)
    name = next(iter(tensors))
    for changed, message in (
        (tensors | {name: tensors[name] * torch.nan}, "not finite"),
        ({n: t for n, t in tensors.items() if n != name}, "the weights lack tensors"),
        (tensors | {"extra": torch.ones(1)}, "which the configuration does not describe"),
    ):
        save_file(changed, weights)
        assert message in refused(saved, adapter=str(folder))
    weights.unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    assert "a pickle, which is not read" in refused(saved, adapter=str(folder))
    change(folder, "adapter_config.json", base_model_name_or_path=None)
    assert "names no base model" in refused(folder)
    assert not marker.exists()
