"""Stopping a run by a signal."""

import signal
from typing import Any

from rich.console import Console


class StopOnSignal:
    """As a context manager: true once Ctrl-C or SIGTERM was seen. The iteration in progress is finished and saved; a
    second signal interrupts. The handlers that were there before are restored at the end."""

    def __init__(self, console: Console):
        self._console, self._asked = console, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, *_) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        self._console.print("Stopping after this iteration and saving it; press Ctrl-C again to stop at once.")

    def __bool__(self) -> bool:
        return self._asked
