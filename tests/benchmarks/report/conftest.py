"""Run folders written by hand, with the questions that the tasks really make."""

import json

import pytest
from run_folders import write_run


@pytest.fixture(scope="session")
def make_run():
    return write_run


@pytest.fixture(scope="session")
def edit():
    """Change a JSON file in place; the change gets its content."""

    def edit(path, change):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit
