"""Names to entries, with a suggestion when a name is unknown."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from vlm_prune.vlm.common.errors import InputError

T = TypeVar("T")
MOST_LISTED = 32


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Returns the message for a name that is not `known`, with the nearest one suggested.

    Args:
        kind: what is named.
        name: that the user gave.
        known: names that exist.
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    listed = ", ".join(names)
    if len(names) > MOST_LISTED:
        listed = f"{', '.join(names[:8])} and {len(names) - 8} more"
    hint = f"did you mean {near[0]!r}?" if near else f"known: {listed}"
    return f"unknown {kind} {name[:100]!r}; {hint}"


class Registry(Mapping[str, T], Generic[T]):
    """An ordered table of names; looking up a missing one raises `InputError` with a suggestion."""

    def __init__(self, kind: str, entries: Mapping[str, T] | None = None) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        for name, entry in (entries or {}).items():
            self.register(name, entry)

    def register(self, name: str, entry: T) -> None:
        """Adds `entry`; raises `ValueError` when the name is taken."""
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise InputError(unknown(self.kind, name, self._entries))
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
