"""Stopping a run by a signal, within a time that a scheduler grants."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

from proxmo_jax.agent.report import terminal


class Stopped(Exception):
    """A signal asked the run to stop: what is under way is dropped, what is complete is saved."""


class StopOnSignal:
    """As a context manager: true once Ctrl-C or SIGTERM was seen. A second Ctrl-C interrupts.

    Python runs signal handlers between two of its own instructions, so none while the main thread is inside a
    compilation or waits for a device. A thread of its own hears of the signal at once (`signal.set_wakeup_fd`): if the
    main thread has not noticed by the end of the grace period, it saves what can be saved and ends the process.

    Attributes:
        asked: whether this process has seen a signal.
        agree: whether any process says so, from what this one says. `bool(stop)` is the agreed answer, so that all
            processes must ask at the same points; `check` is for points of one process alone.
        rescue: saves what can be saved, from another thread, and says what it did; "" if there is nothing.
        where: names what the main thread is doing.
    """

    def __init__(self, console: Console | None = None, grace: float = 0.0, agree: Callable[[bool], bool] = bool):
        """Make one that is not listening yet.

        Args:
            console: where it is announced; default: the terminal.
            grace: seconds from the signal to the end of the process at the latest, unless it is saving; 0: no limit.
            agree: of the attributes.
        """
        self._console, self._grace, self.agree = console or terminal(), grace, agree
        self.asked, self._announced, self._noticed, self._interrupts = False, False, False, 0
        self.rescue: Callable[[], str] = str
        self.where: Callable[[], str] = str
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        self._heard, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        self._wakeup_before = signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._woken.close()
        self._thread.join()
        self._heard.close()

    def __bool__(self) -> bool:
        answer = self.agree(self.asked)
        self._noticed |= answer
        return answer

    def check(self) -> None:
        """Raise Stopped if this process has seen a signal."""
        if self.asked:
            self._noticed = True
            raise Stopped

    def _handle(self, number: int, _: Any) -> None:
        self.asked = True
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt

    def _listen(self) -> None:
        """Wait for the signal, then for the end of the grace period; the socket is closed at the end of the run."""
        until: float | None = None
        while True:
            if until is not None:
                self._heard.settimeout(max(until - time.monotonic(), 0.001))
            try:
                numbers = self._heard.recv(64)
            except TimeoutError:
                until = None
                self._heard.settimeout(None)
                if not self._noticed:
                    self._leave()
                continue
            if not numbers:
                return
            if {signal.SIGINT, signal.SIGTERM} & set(numbers) and not self._announced:
                self._announce()
                until = time.monotonic() + self._grace if self._grace else None

    def _announce(self) -> None:
        self._announced = self.asked = True
        limit = f", in {self._grace:g} s at the latest" if self._grace else ""
        self._console.print(
            f"Stopping after the turn or update under way, and saving{limit}; press Ctrl-C again to stop at once.",
            soft_wrap=True,
        )

    def _leave(self) -> None:
        """End the process although its main thread is busy."""
        try:
            saved = self.rescue()
        except Exception as error:  # whatever is wrong, the process has to end now
            saved = f"nothing more was saved ({error})"
        with contextlib.suppress(Exception):
            where, saved = self.where(), f"; {saved}" if saved else ""
            self._console.print(
                f"Ended after {self._grace:g} s, in {where or 'an unknown part'}{saved}. To go on: --resume",
                soft_wrap=True,
            )
        sys.stdout.flush()
        os._exit(0)
