"""A watchdog: says which part of a run makes no progress, and what every thread is doing."""

import faulthandler
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax


class Watchdog:
    """As a context manager: watches, from a thread of its own, when the run was last heard of.

    Nothing is ended: a part may only be slow. A stall is reported when it has lasted `seconds`, and again after twice
    that, four times, and so on.
    """

    def __init__(self, folder: Path, seconds: float, say: Callable[[str], None]):
        """Make one that does not watch yet.

        Args:
            folder: the run's, where the stacks are written.
            seconds: without progress after which a stall is reported; 0: never.
            say: receives the report, a sentence.
        """
        self._seconds, self._say = seconds, say
        self._path = folder / f"stacks_host{jax.process_index()}.txt"
        self.part, self._since = "the start", time.monotonic()
        self._over = threading.Event()

    def __call__(self, part: str) -> None:
        """Note that a part of the run begins, or goes on."""
        self.part, self._since = part, time.monotonic()

    def __enter__(self) -> "Watchdog":
        self._since = time.monotonic()
        if self._seconds:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        if self._seconds:
            self._thread.join()

    def _watch(self) -> None:
        since, patience = self._since, self._seconds
        while not self._over.wait(min(self._seconds / 4, 5.0)):
            if self._since != since:
                since, patience = self._since, self._seconds
            elif time.monotonic() - since >= patience:
                self._report(time.monotonic() - since)
                patience *= 2

    def _report(self, seconds: float) -> None:
        title = f"host {jax.process_index()}: no progress for {seconds:.0f} s in {self.part}"
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
            self._say(f"{title}; the stacks of all threads are in {self._path}")
        except OSError as error:
            self._say(f"{title}; the stacks cannot be written to {self._path} ({error.strerror})")
