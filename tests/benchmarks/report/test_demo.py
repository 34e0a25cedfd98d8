"""The demo's page in a browser, on the embedded model, and how the command refuses."""

import socket
import sys
from contextlib import nullcontext
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import Tiny
from video_files import write_clip

from vlm_prune.benchmarks.report.demo import Comparer, as_seen, demo_page, launch
from vlm_prune.benchmarks.report.overlay import kept_overlay
from vlm_prune.benchmarks.tasks import TASKS
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.load import load

LOCAL = ("127.0.0.1", "localhost")


@pytest.fixture(scope="module")
def compare():
    return Comparer(*load())


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    TASKS["attribute"].sample(1).images[0].save(path)
    return path


def test_both_answers_kept_tokens_and_times(compare, scene):
    sample = TASKS["attribute"].sample(1)
    found = compare(scene, sample.turns[-1].text, "zoo", "64")
    assert found.unpruned == sample.answer
    ((picture, caption),) = found.kept
    assert caption == "before the language model: 64 of 576"
    same = np.asarray(picture) == np.asarray(sample.images[0])
    whole = same.all(2).reshape(24, 14, 24, 14).all((1, 3))
    assert whole.sum() == 64
    rows = [line.strip("| ").split(" | ") for line in found.times.splitlines()]
    assert [row[0] for row in rows[2:6]] == ["vision", "selection", "prefill", "decode"]
    for column in (1, 2):
        phases = [float(row[column]) for row in rows[2:6]]
        assert float(rows[6][column]) == pytest.approx(sum(phases), abs=0.3) and phases[0] > 0
    assert rows[-1][1:] == ["576", "64 / 64.0 / 64.0"]


def test_every_cut_has_a_picture(compare, scene):
    found = compare(scene, "Is there a star?", "zoo-exact+adaptinfer", "32")
    captions = [caption for _, caption in found.kept]
    assert captions[0] == "before the language model: 64 of 576"
    assert [caption.split(":")[0] for caption in captions[1:]] == ["cut 1", "cut 2", "cut 3"]
    captions = [c for _, c in compare(scene, "Is there a star?", "fastv", "576").kept]
    assert captions == ["cut 1: 576 of 576"]


def test_special_tokens_in_a_question_are_text(compare, scene):
    assert compare(scene, "Is <image> or </s> red?", "zoo", "64").unpruned


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "there is no image"),
        ({"image": "/nowhere.png"}, "cannot read image"),
        ({"question": "  "}, "there is no question"),
        ({"question": "a" * 2001}, "at most 2000"),
        ({"method": "zo"}, "did you mean 'zoo'"),
        ({"method": "adaptinfer+zoo"}, "does not choose tokens before the language model"),
        ({"budget": "577"}, "above the 576 tokens"),
        ({"budget": ""}, "not a number"),
    ],
)
def test_what_cannot_be_asked(compare, scene, change, message):
    given = {"image": scene, "question": "Is it red?", "method": "zoo", "budget": "64"} | change
    with pytest.raises(InputError, match=message):
        compare(**given)


@pytest.mark.parametrize(
    ("family", "tiles"), [("qwen2_5_vl", False), ("llava_next", True), ("gemma3", False)]
)
def test_models_with_images_of_any_size(family, tiles, tmp_path):
    """Where tokens are one grid over the image they are drawn, else the picture is as it was."""
    tiny = Tiny(family)
    compare = Comparer(tiny.model, tiny.processor)
    shrunk = "downsample" in compare.methods
    assert shrunk == (family == "qwen2_5_vl") and "divprune" in compare.methods
    Image.effect_noise((112, 84), 90).convert("RGB").save(tmp_path / "noise.png")
    found = compare(tmp_path / "noise.png", "Is it red?", "divprune", "0.5")
    ((picture, caption),) = found.kept
    tokens = int(caption.rsplit(" ", 1)[1])
    assert caption == f"before the language model: {round(tokens / 2)} of {tokens}"
    pale = np.asarray(picture).min() >= 190 and not tiles
    assert not pale and found.times.splitlines()[-1].startswith(f"| image tokens | {tokens} |")
    with Image.open(tmp_path / "noise.png") as noise:
        unchanged = picture.size == noise.size and np.array_equal(picture, noise.convert("RGB"))
    assert unchanged == tiles


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_frames_of_a_video_are_drawn_side_by_side(family, tmp_path):
    pytest.importorskip("av")
    write_clip(tmp_path / "clip.mp4", range(0, 800, 100))
    tiny = Tiny(family)
    found = Comparer(tiny.model, tiny.processor)(tmp_path / "clip.mp4", "Is it red?", "evs", "0.5")
    ((sheet, caption),) = found.kept
    assert caption.startswith("before the language model: ") and sheet.width > 400
    assert "| video tokens |" in found.times
    with (
        nullcontext()
        if family == "qwen2_5_vl"
        else pytest.raises(InputError, match="needs a tower that takes smaller images")
    ):
        Comparer(tiny.model, tiny.processor)(tmp_path / "clip.mp4", "x", "downsample", "0.5")


def test_a_video_for_a_model_of_images_is_refused(compare, tmp_path):
    pytest.importorskip("av")
    write_clip(tmp_path / "clip.mp4", range(0, 800, 100))
    with pytest.raises(InputError, match="take no videos"):
        compare(tmp_path / "clip.mp4", "Is it red?", "zoo", "64")


def test_an_overlay_follows_its_grid():
    picture = Image.new("RGB", (60, 20))
    drawn = np.asarray(kept_overlay(picture, torch.tensor([1, 5]), (2, 3)))
    assert (drawn[:10, 20:40] == 0).all() and (drawn[10:, 40:] == 0).all()
    assert (drawn == 190).sum() == 4 * 20 * 10 * 3


def test_a_picture_as_the_tower_sees_it(compare):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (336, 500, 3), np.uint8))
    processor = compare.processor.image_processor
    pixels = processor(images=[picture], return_tensors="pt")["pixel_values"][0]
    cropped = picture.crop((82, 0, 418, 336))
    assert np.array_equal(np.asarray(as_seen(pixels, processor)), np.asarray(cropped))


def test_without_gradio_the_command_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, err = run("demo")
    assert code == 2 and err == "Error: the demo needs gradio: pip install 'vlm-prune[demo]'\n"


def test_a_port_that_is_taken(run):
    pytest.importorskip("gradio", reason="gradio is not installed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = run("demo", "--port", taken.getsockname()[1])
    assert code == 2 and "give another --host or --port" in err and err.count("\n") == 1


@pytest.fixture(scope="module")
def hosts():
    """Names that this process looked up, filled while the page is served."""
    return set()


@pytest.fixture(scope="module")
def address(compare, hosts, tmp_path_factory):
    pytest.importorskip("gradio", reason="gradio is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "True")  # what the page has to overrule
        look_up = socket.getaddrinfo
        patch.setattr(socket, "getaddrinfo", lambda *a, **k: hosts.add(a[0]) or look_up(*a, **k))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        blocks = demo_page(compare, "tiny")
        yield launch(blocks, "127.0.0.1", port)
        blocks.close()


@pytest.fixture(scope="module")
def errors():
    return []


@pytest.fixture(scope="module")
def tab(browser, address, errors):
    tab = browser.new_page()
    tab.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda r: None if is_local(r.url) else errors.append(r.url))
    tab.goto(address)
    tab.get_by_role("button", name="Ask").wait_for()
    return tab


def is_local(url):
    parts = urlsplit(url)
    return parts.scheme in ("data", "blob") or parts.hostname in LOCAL


def ask(tab, wait):
    tab.get_by_role("button", name="Ask").click()
    wait.wait_for()


def test_the_page_answers_about_an_example(tab, errors, hosts):
    question = TASKS["attribute"].sample(1).turns[-1].text
    tab.get_by_text(question).first.click()
    tab.wait_for_function(
        "text => document.querySelector('#question textarea').value === text", arg=question
    )
    ask(tab, tab.get_by_text("before the language model: 64 of 576"))
    answer = TASKS["attribute"].sample(1).answer
    assert tab.get_by_label("Unpruned answer").input_value() == answer
    assert tab.get_by_label("Pruned answer", exact=True).input_value()
    assert tab.locator("td", has_text="selection").count() == 1
    assert errors == []
    assert hosts <= set(LOCAL)


def test_the_page_answers_with_another_method_and_budget(tab, errors):
    tab.get_by_label("Method").fill("adaptinfer")
    tab.get_by_label("Method").press("Enter")
    tab.get_by_label("Budget").fill("0.25")
    ask(tab, tab.get_by_role("cell", name="/ 143.9 /"))
    assert tab.get_by_text("cut 3:").count() == 1
    assert errors == []


def test_the_page_takes_an_upload(tab, errors, tmp_path):
    Image.new("RGBA", (200, 100), "red").save(tmp_path / "red.png")
    before = tab.locator("#image img").get_attribute("src")
    tab.locator("input[type=file]").set_input_files(tmp_path / "red.png")
    tab.wait_for_function("old => document.querySelector('#image img').src !== old", arg=before)
    tab.get_by_label("Budget").fill("16")
    ask(tab, tab.get_by_role("cell", name="/ 16.0 /"))
    assert errors == []


def test_the_page_takes_a_video_and_an_example_after_it(tab, errors, tmp_path):
    """The embedded model takes images alone: its refusal shows which of the two was asked about."""
    pytest.importorskip("av")
    write_clip(tmp_path / "clip.mp4", range(0, 800, 100))
    shown = "document.querySelector('#image img')?.src"
    before = tab.evaluate(shown)
    tab.locator("input[type=file]").set_input_files(tmp_path / "clip.mp4")
    tab.wait_for_function(f"old => {shown} && {shown} !== old", arg=before)
    tab.get_by_label("Question").fill("Is it red?")
    ask(tab, tab.get_by_text("take no videos").first)
    question = TASKS["ocr"].sample(4).turns[-1].text
    tab.get_by_text(question).first.click()
    tab.wait_for_function(
        "text => document.querySelector('#question textarea').value === text", arg=question
    )
    tab.get_by_label("Method").fill("divprune")
    tab.get_by_label("Method").press("Enter")
    tab.get_by_label("Budget").fill("48")
    ask(tab, tab.get_by_role("cell", name="/ 48.0 /"))
    assert errors == []


def test_the_page_says_what_is_wrong_in_one_line(tab, errors, tmp_path):
    tab.get_by_label("Budget").fill("<b>many</b>")
    ask(tab, tab.get_by_text("budget '<b>many</b>' is not a number"))
    tab.get_by_label("Budget").fill("64")
    (tmp_path / "broken.png").write_bytes(b"no image at all")
    tab.locator("input[type=file]").set_input_files(tmp_path / "broken.png")
    tab.get_by_text("broken.png is no image that Pillow can read").wait_for()
    Image.new("L", (10_000, 9_000)).save(tmp_path / "bomb.png")
    tab.locator("input[type=file]").set_input_files(tmp_path / "bomb.png")
    tab.get_by_text("bomb.png has more than 89 million pixels").wait_for()
    assert tab.get_by_text("Traceback").count() == 0
    assert errors == []
