# SPDX-License-Identifier: Apache-2.0
"""What is open in this process, each once: found while it has users, closed after the last of them.

The last user may go in any thread, wherever Python's collector runs. Python then forgets the user first, and closing
takes a while after that. Who asks for the same place in between finds no user, and must not be told that the place is
open in its own process: it waits until it is closed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import weakref
from typing import Generic, Protocol, TypeVar

import damo_embedding as de

__all__ = ["Held", "OpenOnce"]


class _Closable(Protocol):
    def close(self) -> None: ...


class _Locked(Protocol):
    def forget_locks(self) -> None: ...


C = TypeVar("C", bound=_Closable)
U = TypeVar("U", bound=_Locked)


class Held(Generic[C]):
    """What has a place open. It knows nothing of its user, and so outlives it."""

    def __init__(self, opened: C) -> None:
        self.opened = opened  # another one when the place is opened anew
        self._closing = threading.RLock()

    def close(self) -> None:
        """Returns when it is closed, by whatever thread: the core's `close` does not wait for another thread's."""
        with self._closing:
            self.opened.close()

    def close_unused(self) -> None:
        """Nobody is left to be told of an error. What could not be written is in the log or in the file."""
        # ValueError: a schedule is being asked in this thread; the end of the object closes it then.
        with contextlib.suppress(de.DamoError, ValueError):
            self.close()

    def forget_locks(self) -> None:
        self._closing = threading.RLock()


class OpenOnce(Generic[U]):
    """The users by their place, and what each holds."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while a place is looked for and opened; never by what closes unused ones
        self._users: weakref.WeakValueDictionary[str, U] = weakref.WeakValueDictionary()
        # Each is here until it is closed: from its user's end on the finalizer that closes it is what keeps it.
        self._held: weakref.WeakValueDictionary[str, Held[_Closable]] = weakref.WeakValueDictionary()
        atexit.register(self._close_all)
        os.register_at_fork(after_in_child=self._forget_all)

    def find(self, place: str) -> U | None:
        """Its user. None: the place is closed."""
        user = self._users.get(place)
        if user is None:
            self.close(place)
        return user

    def add(self, place: str, user: U, held: Held[C]) -> None:
        """From now on `user` is found, and after its end `held` is closed."""
        # A finalizer, not __del__: it begins when no weak reference gives the user back any more.
        weakref.finalize(user, held.close_unused).atexit = False
        self._users[place] = user
        self._held[place] = held  # type: ignore[assignment]

    def close(self, place: str) -> None:
        """Closes what has the place open, or waits for whoever closes it."""
        held = self._held.get(place)
        if held is not None:
            held.close_unused()

    def _close_all(self) -> None:
        with contextlib.ExitStack() as stack:  # all of them, even if one fails
            for held in list(self._held.values()):
                stack.callback(held.close)

    def _forget_all(self) -> None:
        """In a forked child, where other threads held locks and are no more. What is open is the parent's."""
        self.lock = threading.Lock()
        for user in list(self._users.values()):
            user.forget_locks()
        for held in list(self._held.values()):
            held.forget_locks()
        self._users.clear()
        self._held.clear()
