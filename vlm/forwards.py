"""The forwards of a model that are under way, by thread."""

import threading
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class Forwards(Generic[T]):
    """Threads inside a forward, each with what its forward was given.

    A thread that ended inside its forward is not waited for.
    """

    running: dict[int, tuple[threading.Thread, T]] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def enter(self, given: T) -> None:
        """Notes that this thread's forward begins, and what it was given."""
        with self.changed:
            self.running[threading.get_ident()] = (threading.current_thread(), given)

    def leave(self) -> T | None:
        """Notes that this thread's forward is over, or failed; returns what it was given."""
        with self.changed:
            _, given = self.running.pop(threading.get_ident(), (None, None))
            self.changed.notify_all()
        return given

    @property
    def given(self) -> T | None:
        """Returns what this thread's forward was given; None outside of one."""
        return self.running.get(threading.get_ident(), (None, None))[1]

    def wait(self) -> None:
        """Waits for the forwards of other threads; this thread's is over."""
        with self.changed:
            self.running.pop(threading.get_ident(), None)
            while any(thread.is_alive() for thread, _ in self.running.values()):
                self.changed.wait(0.1)
