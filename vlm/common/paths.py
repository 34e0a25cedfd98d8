"""Files that data name: inside the folder of the data, never on the network."""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vlm_prune.vlm.common.errors import InputError

HINT = "put it inside, or give --allow-outside (allow_outside=True)"


@dataclass(frozen=True)
class DataRoot:
    """A folder of data. The files that the data name must lie inside it, links followed.

    Args:
        folder: where relative names start.
        allow_outside: whether absolute names, `..` and links may leave the folder. URLs are refused
            all the same: nothing is fetched because data name it.
        top: what must not be left, if it is not `folder` itself but a folder around it.
    """

    folder: Path
    allow_outside: bool = False
    top: Path | None = None

    @classmethod
    def of(cls, root: "DataRoot | Path | str", allow_outside: bool = False) -> "DataRoot":
        """Returns the root itself, or one at a path."""
        return root if isinstance(root, cls) else cls(Path(str(root)), allow_outside)

    def below(self, name: str) -> "DataRoot":
        """Returns the same root with names that start in a folder below; that
        folder is checked by `path`.
        """
        return DataRoot(self.folder / name, self.allow_outside, self.top or self.folder)

    def path(self, name: str | Path) -> Path:
        """Returns where a name leads; whether something is there is not looked at.

        Raises:
            InputError: if the name is a URL, no possible file name, or leads out of the folder.
        """
        shown = str(name)
        if "://" in shown:
            raise InputError(f"{shown[:200]!r} is a URL, and nothing is downloaded; give a file")
        if not shown or "\0" in shown:
            raise InputError(f"{shown[:200]!r} is no file name")
        path, top = self.folder / name, self.top or self.folder
        try:
            linked = path.is_symlink()
            if self.allow_outside:
                return path
            # parents are looked up once: data sets have many files in few folders
            parent = _real(os.path.join(os.getcwd(), path.parent))
            real = os.path.realpath(path) if linked else os.path.join(parent, path.name)
            limit = _real(os.path.join(os.getcwd(), top))
            inside = Path(os.path.normpath(real)).is_relative_to(limit)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or getattr(error, "reason", error)
            raise InputError(f"{shown[:200]!r} is no file name: {reason}") from None
        if not inside:
            raise InputError(f"{shown[:200]!r} leads out of {top}; {HINT}")
        return path


@lru_cache(maxsize=4096)
def _real(folder: str) -> str:
    return os.path.realpath(folder)
