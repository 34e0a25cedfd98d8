"""The redrawn stream: sizes, determinism, and nothing shared by splits or with `packaged`."""

import hashlib

import numpy as np
import pytest

from vlm_prune.continual.streams import drawing, open_stream
from vlm_prune.continual.streams.packaged import DOMAINS, PHOTOGRAPHS
from vlm_prune.continual.streams.redrawn import DIRECTIONS, HOURS, PICTURES, REDRAWN, redrawn

TASKS = redrawn()


def test_eight_domains_and_82_classes():
    stream = open_stream("redrawn")
    assert [task.name for task in stream.tasks] == list(REDRAWN) and len(TASKS) == 8
    assert stream.classes == 82 and stream.joint and stream.ambiguous() == []
    for one in TASKS:
        count = len(one.classes)
        assert [len(s) // count for s in (one.train, one.val, one.test)] == [32, 8, 24]


def test_nothing_is_shared_with_the_packaged_stream():
    assert not set(REDRAWN) & set(DOMAINS)
    numbers = [domain.number for domain in (*DOMAINS.values(), *REDRAWN.values())]
    assert len(set(numbers)) == len(numbers)
    assert not set(PICTURES.values()) & set(PHOTOGRAPHS.values())


@pytest.mark.parametrize("one", TASKS, ids=lambda one: one.name)
def test_pictures_are_the_same_each_time_and_in_no_two_splits(one):
    seen, drawn = set(), 0
    for split in (one.train, one.val, one.test):
        for index in range(0, len(split), 11):
            image, label = split[index]
            assert image.size == (48, 48) and image.mode == "RGB" and label == split.labels[index]
            seen.add(hashlib.sha256(image.tobytes()).hexdigest())
            drawn += 1
    again = next(task for task in redrawn() if task.name == one.name).val
    assert np.array_equal(one.val[11][0], again[11][0])
    # blank parts of the horse's and the color wheel's pictures are alike
    assert len(seen) == drawn or one.name == "pictures"


def test_splits_share_no_pixel_of_a_picture(monkeypatch):
    cells = []
    monkeypatch.setattr(drawing, "crop", lambda *a: a[:2])
    one = next(task for task in redrawn() if task.name == "pictures")
    for split in (one.train, one.val, one.test):
        cells.append({image for image, _ in split})
    assert sum(map(len, cells)) == len(set().union(*cells)) == 8 * 11


def ink(domain, name):
    """Which pixels of a plain picture differ from the paper, cut to the ink's box."""
    image = REDRAWN[domain].draw(name, "train", 0, np.random.default_rng(0), "plain")
    gray = np.asarray(image.convert("L"), float)
    inked = abs(gray - np.median(gray[[0, -1]])) > 60
    rows, columns = np.nonzero(inked)
    return inked[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def test_arrows_point_where_they_say():
    """An arrow is widest beyond its middle."""
    assert len(DIRECTIONS) == 8
    for name, axis, beyond in (("right", 0, 1), ("left", 0, 0), ("down", 1, 1), ("up", 1, 0)):
        width = ink("arrows", name).sum(axis)
        assert (width.argmax() > len(width) / 2) == beyond, name


def test_clocks_show_the_hour_of_their_name():
    """The hour hand moves the ink's center."""
    assert HOURS[0] == "one" and HOURS[-1] == "twelve"
    centers = {h: np.argwhere(ink("clocks", h)).mean(0) for h in ("three", "six", "nine", "twelve")}
    assert centers["three"][1] > centers["nine"][1]
    assert centers["six"][0] > centers["twelve"][0]


def test_colored_paper_is_paper():
    rng = np.random.default_rng(0)
    for name in ("red", "cyan"):
        image = np.asarray(REDRAWN["grounds"].draw(name, "train", 0, rng, "plain"), float)
        corners = image[[0, 0, -1, -1], [0, -1, 0, -1]].mean(0)
        assert abs(corners - drawing.COLORS[name]).max() < 50
