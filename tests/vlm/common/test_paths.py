"""What data name lies inside their folder, unless the user allows more; URLs never."""

import pytest

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.paths import DataRoot


@pytest.fixture
def root(tmp_path):
    """A folder with files and links in and out, beside a file that is not its own."""
    folder = tmp_path / "root"
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "a.png").write_bytes(b"a")
    (tmp_path / "secret.png").write_bytes(b"s")
    (folder / "link.png").symlink_to("in/a.png")
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    (tmp_path / "root-2").mkdir()
    return folder


def inside(root):
    return ["in/a.png", "in/../in/a.png", "link.png", "./in/gone.png", str(root / "in" / "a.png")]


def outside(root):
    return [
        "../secret.png", "in/../../secret.png", str(root.parent / "secret.png"), "/etc/passwd",
        "out.png", "up/secret.png", "up/root-2/x.png", "../root-2/x.png", "..",
    ]  # fmt: skip


def test_names_inside_lead_to_files(root):
    for name in inside(root):
        assert DataRoot(root).path(name) == root / name


def test_names_that_lead_out_are_refused_and_allowed_when_asked(root):
    for name in outside(root):
        with pytest.raises(InputError, match=r"leads out of .*--allow-outside"):
            DataRoot(root).path(name)
        assert DataRoot(root, allow_outside=True).path(name) == root / name


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize(
    "name", ["http://h/a.png", "https://h/a.png", "s3://b/a", "file:///etc/passwd", "zip://a::http://h/b"]
)  # fmt: skip
def test_urls_are_refused_always(root, name, allow):
    with pytest.raises(InputError, match="nothing is downloaded"):
        DataRoot(root, allow).path(name)


def test_impossible_names_are_one_line(root):
    for name in ("a\0b", ""):
        for allow in (False, True):
            with pytest.raises(InputError, match="no file name"):
                DataRoot(root, allow).path(name)


def test_relative_roots_follow_the_working_folder(root, monkeypatch):
    for place in (root, root.parent / "root-2"):
        monkeypatch.chdir(place)
        assert DataRoot.of(".").path("a.png").name == "a.png"
        with pytest.raises(InputError, match="leads out"):
            DataRoot.of(".").path(root.parent / "secret.png")
    with pytest.raises(InputError, match="leads out"):
        DataRoot.of(".").path(root / "in" / "a.png")


def test_a_folder_below_keeps_the_limit(root):
    assert DataRoot(root).below("in").path("../link.png") == root / "in" / "../link.png"
    with pytest.raises(InputError, match="leads out"):
        DataRoot(root).below("in").path("../../secret.png")
    with pytest.raises(InputError, match="leads out"):
        DataRoot(root).below("up").path("secret.png")


def test_a_root_that_is_a_link_is_where_it_leads(root, tmp_path):
    (tmp_path / "alias").symlink_to(root)
    alias = DataRoot(tmp_path / "alias")
    assert alias.path("in/a.png").is_file()
    with pytest.raises(InputError, match="leads out"):
        alias.path("out.png")
