"""The rules for names and docstrings hold in every folder: see CONTRIBUTING, Style."""

import re

import pytest
from language import (
    PACKAGES,
    ROOT,
    TYPED,
    british,
    files,
    misdocumented,
    missing_docstrings,
    prose,
    repeated,
    undocumented,
    untyped_records,
    verbless,
)


@pytest.mark.parametrize("folder", PACKAGES)
def test_three_arguments_and_more_are_documented(folder):
    assert not undocumented(folder), "\n".join(map(str, undocumented(folder)))


@pytest.mark.parametrize("folder", PACKAGES)
def test_public_definitions_have_docstrings(folder):
    assert not missing_docstrings(folder), "\n".join(map(str, missing_docstrings(folder)))


@pytest.mark.parametrize("folder", PACKAGES)
def test_documented_arguments_are_those_of_the_function(folder):
    assert not misdocumented(folder), "\n".join(misdocumented(folder))


@pytest.mark.parametrize("folder", PACKAGES)
def test_docstrings_of_functions_begin_with_a_verb(folder):
    assert not verbless(folder), "\n".join(map(str, verbless(folder)))


def test_names_are_defined_once():
    names = repeated(*PACKAGES)
    assert not names, "\n".join(f"{name}: {', '.join(map(str, at))}" for name, at in names.items())


def test_results_are_typed_records():
    records = untyped_records(*TYPED)
    assert not records, "\n".join(map(str, records))


def test_markdown_tables_have_one_writer():
    writers = [path for path in files(*PACKAGES) if re.search(r"---[\"|]", path.read_text())]
    assert writers == [ROOT / "benchmarks" / "stats" / "table.py"]


def test_names_and_comments_have_american_spelling():
    assert not british(*PACKAGES), "\n".join(british(*PACKAGES))


def test_identifiers_are_terms_and_no_prose():
    names = prose(*PACKAGES, "tests")
    assert not names, "\n".join(names)


def test_each_rule_finds_what_breaks_it(tmp_path):
    text = """def act(first, second, third):
    '''Acts.'''
def silent(): ...
def noun_first():
    '''All rows.'''
def noun_of():
    '''Scores of all rows.'''
def without_end():
    '''Opens a file'''
def renamed(new, other):
    '''Opens a file.

    Args:
        old: name.
        other: name.
    '''
class TokenLayout:
    '''A second one.'''
    rows: list[dict[str, Any]]
colour = 1  # grey
Hits = list[int]
name = "a neighbour"
asked = lambda twin: twin
def states(hidden: Tensor): ...
"""
    (tmp_path / "broken.py").write_text(text)
    folder = str(tmp_path)
    assert [found.name for found in undocumented(folder)] == ["act"]
    assert [found.name for found in missing_docstrings(folder)] == ["silent", "states"]
    assert [found.name for found in verbless(folder)] == ["noun_first", "noun_of", "without_end"]
    assert [line.split()[-1] for line in misdocumented(folder)] == ["new", "old"]
    assert list(repeated(folder)) == ["Hits", "TokenLayout"]
    assert [found.name for found in untyped_records(folder)] == ["TokenLayout"]
    assert [line.split()[1] for line in prose(folder)] == ["asked", "hidden:", "twin"]
    assert [line.split()[1:] for line in british(folder)] == [
        ["colour"], ["#", "grey"], ['"a', 'neighbour"'],
    ]  # fmt: skip
