"""The packaged stream: sizes, determinism, and splits that share nothing."""

import hashlib

import numpy as np
import pytest

from vlm_prune.continual.streams import drawing
from vlm_prune.continual.streams.packaged import DOMAINS, PER_CLASS, SPLITS, Drawn, packaged, task
from vlm_prune.continual.streams.stream import Stream, few_shot

TASKS = packaged()


def test_eight_domains_and_100_classes():
    stream = Stream("packaged", TASKS, joint=True, ensemble=False)
    assert len(TASKS) == 8 and stream.classes == 100 and stream.ambiguous() == []
    for one in TASKS:
        count = len(one.classes)
        assert [len(s) // count for s in (one.train, one.val, one.test)] == [32, 8, 24]
        assert 0.4 * count < len(DOMAINS[one.name].known) < 0.75 * count


@pytest.mark.parametrize("one", TASKS, ids=lambda one: one.name)
def test_pictures_are_the_same_each_time_and_in_no_two_splits(one):
    seen = set()
    for split in (one.train, one.val, one.test):
        for index in range(0, len(split), 7):
            image, label = split[index]
            assert image.size == (48, 48) and image.mode == "RGB"
            assert label == split.labels[index]
            assert np.array_equal(image, split[index][0])
            seen.add(hashlib.sha256(image.tobytes()).hexdigest())
    expected = sum(len(range(0, len(s), 7)) for s in (one.train, one.val, one.test))
    assert len(seen) == expected
    with pytest.raises(IndexError):
        one.train[len(one.train)]


def used(monkeypatch, name, domain, function):
    """What each split passes as its source, by split."""
    sources = {}
    for split in SPLITS:
        given = []

        def note(*arguments, given=given):
            given.append(function(arguments))

        with monkeypatch.context() as patch:
            patch.setattr(drawing, name, note)
            drawn = Drawn(DOMAINS[domain], split, DOMAINS[domain].classes, "varied")
            for index in range(len(drawn)):
                drawn[index]
        sources[split] = set(given)
    return sources


def test_splits_share_no_handwritten_drawing(monkeypatch):
    sources = used(monkeypatch, "digit_image", "digits", lambda a: a[0].tobytes())
    parts = list(sources.values())
    assert sum(map(len, parts)) == len(set().union(*parts))
    assert len(sources["test"]) == 10 * PER_CLASS["test"]


def test_splits_share_no_pixel_of_a_photograph(monkeypatch):
    sources = used(monkeypatch, "crop", "photographs", lambda a: (a[0], a[1]))
    parts = list(sources.values())
    assert sum(map(len, parts)) == len(set().union(*parts)) == 14 * 16


def test_the_two_styles_share_no_typeface():
    for faces in (drawing.FACES, drawing.SYMBOL_FACES):
        assert not set(faces["plain"]) & set(faces["varied"])


def test_every_symbol_is_in_every_face():
    for faces in drawing.SYMBOL_FACES.values():
        for face in faces:
            font = drawing.font(face, 40)
            missing = font.getmask(chr(0x10FFFE)).getbbox(), bytes(font.getmask(chr(0x10FFFE)))
            for symbol in drawing.SYMBOLS.values():
                assert (font.getmask(symbol).getbbox(), bytes(font.getmask(symbol))) != missing


def test_shots_of_the_packaged_stream_open_no_image(monkeypatch):
    monkeypatch.setattr(Drawn, "__getitem__", None)
    assert len(few_shot(task("letters"), 16).train) == 26 * 16
