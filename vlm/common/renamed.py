"""Names that were others before: they are still taken, with a `DeprecationWarning`."""

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def warn_renamed(old: str, new: str) -> None:
    """Gives a `DeprecationWarning` that something has another name now.

    Args:
        old: what the caller used.
        new: what to use.
    """
    warnings.warn(f"{old} is called {new} now", DeprecationWarning, stacklevel=3)


def renamed_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns the `__getattr__` of a module that still gives its renamed classes.

    Args:
        module: its `__name__`.
        names: old names with the new ones.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", names[name])
        return getattr(sys.modules[module], names[name])

    return find
