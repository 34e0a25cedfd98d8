"""The forwards of a model that are under way, by thread."""

import threading
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class Forwards(Generic[T]):
    """Threads inside a forward, each with what its forward was given, and those around it.

    A thread that ended inside its forward is not waited for.
    """

    running: dict[int, tuple[threading.Thread, list[T]]] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def enter(self, given: T) -> None:
        """Notes that this thread's forward begins, and what it was given."""
        with self.changed:
            number = threading.get_ident()
            thread, outer = self.running.get(number, (None, []))
            # a thread that ended may have had the same number
            if thread is not threading.current_thread():
                outer = []
            self.running[number] = (threading.current_thread(), [*outer, given])

    def leave(self) -> T | None:
        """Notes that this thread's forward is over, or failed; returns what it was given."""
        with self.changed:
            thread, outer = self.running.pop(threading.get_ident(), (None, []))
            if thread is not None and len(outer) > 1:
                self.running[threading.get_ident()] = (thread, outer[:-1])
            self.changed.notify_all()
        return outer[-1] if outer else None

    @property
    def given(self) -> T | None:
        """Returns what this thread's forward was given; None outside of one."""
        found = self.running.get(threading.get_ident(), (None, []))[1]
        return found[-1] if found else None

    def wait(self) -> None:
        """Waits for the forwards of other threads; this thread's is over."""
        with self.changed:
            self.running.pop(threading.get_ident(), None)
            while any(thread.is_alive() for thread, _ in self.running.values()):
                self.changed.wait(0.1)
