"""Many environments over a few worker processes: one batched message per worker and turn.

Workers are started by interpreter path, never forked: a process that holds JAX must not be forked. A worker that dies,
hangs or answers garbage is replaced; the episodes it was playing are lost, and the caller is told which.
"""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from envs_bridge.turn import Observation
from envs_bridge.worker import VERSION

LIMIT = 1 << 26  # bytes of one answer; more is garbage


class WorkerError(RuntimeError):
    """No worker can be started, or speaks another protocol version; or no episode at all could be played."""


class Pool:
    """`workers` processes, each playing a share of the slots. Use as a context manager, or call `close`.

    `faults` counts the times a worker had to be replaced or could not start a game, and `fault` is what was wrong last.
    """

    def __init__(
        self, workers: int = 2, *, python: str = sys.executable, engine: str = "fast", timeout: float = 60.0
    ):  # fmt: skip
        """`engine`: "fast" (ours) or "textworld" (ALFWorld's own, which `python` must have). `timeout` in seconds."""
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.timeout, self.faults, self.fault = timeout, 0, ""
        self._command = [python, "-m", "envs_bridge.worker", engine]
        self._processes: list[subprocess.Popen] = [self._start() for _ in range(workers)]
        self._greet(range(workers))

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        for process in self._processes:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # type: ignore[union-attr]
        for process in self._processes:
            try:
                process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()  # type: ignore[union-attr]

    def reset(self, games: Sequence[tuple[int, str]]) -> list[tuple[Observation, str] | None]:
        """Start (slot, game file) pairs; answers (observation, task) in the same order, None for one that failed."""
        return self._ask("reset", games)

    def step(self, commands: Sequence[tuple[int, str]]) -> list[Observation | None]:
        """Play (slot, command) pairs; answers in the same order, None for a lost episode."""
        return [answer and answer[0] for answer in self._ask("step", commands)]

    def _start(self) -> subprocess.Popen:
        root = str(Path(__file__).resolve().parent.parent)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        pipe = subprocess.PIPE
        return subprocess.Popen(self._command, stdin=pipe, stdout=pipe, env=environment)

    def _greet(self, workers: Iterable[int]) -> None:
        """Read the version each new worker says first. Raises WorkerError, the pool closed, if it is not ours."""
        for hello in self._receive(set(workers)).values():
            if hello != {"version": VERSION}:
                self.close()
                said = hello if isinstance(hello, str) else f"it said {str(hello)[:200]}"
                raise WorkerError(f"a worker did not start ({said}); need one of protocol version {VERSION}")

    def _replace(self, worker: int, reason: str) -> None:
        self.faults, self.fault = self.faults + 1, reason
        process = self._processes[worker]
        process.kill()
        process.wait()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # type: ignore[union-attr]
        process.stdout.close()  # type: ignore[union-attr]
        self._processes[worker] = self._start()
        self._greet([worker])

    def _ask(self, verb: str, entries: Sequence[tuple[int, str]]) -> list[tuple[Observation, str] | None]:
        shares: dict[int, list[int]] = {}
        for position, (slot, _) in enumerate(entries):
            shares.setdefault(self._worker_of(slot), []).append(position)
        for worker, positions in shares.items():
            # A dead worker is found when its answer is read.
            with contextlib.suppress(BrokenPipeError):
                requests = self._processes[worker].stdin
                requests.write(json.dumps({verb: [entries[p] for p in positions]}).encode() + b"\n")  # type: ignore[union-attr]
                requests.flush()  # type: ignore[union-attr]
        answers: list = [None] * len(entries)
        for worker, replies in self._receive(set(shares)).items():
            try:
                parsed = _parse(replies, len(shares[worker]))
            except ValueError as error:
                self._replace(worker, f"worker {worker} {error}")
                continue
            for position, reply in zip(shares[worker], parsed, strict=True):
                if isinstance(reply, str):
                    self.faults, self.fault = self.faults + 1, reply
                else:
                    answers[position] = reply
        return answers

    def _worker_of(self, slot: int) -> int:
        """Blocks of eight slots share a worker, so that the members of a group share its cache."""
        return slot // 8 % len(self._processes)

    def _receive(self, workers: set[int]) -> dict[int, object]:
        """One JSON line from each of these workers; a sentence for one that gives none in time."""
        answers: dict[int, object] = {}
        buffers = {worker: bytearray() for worker in workers}
        until = time.monotonic() + self.timeout
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                selector.register(self._processes[worker].stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
            while selector.get_map():
                events = selector.select(max(until - time.monotonic(), 0))
                if not events:
                    for worker in workers - set(answers):
                        answers[worker] = f"did not answer within {self.timeout:g} s"
                    break
                for key, _ in events:
                    worker, buffer = key.data, buffers[key.data]
                    chunk = os.read(key.fd, 1 << 20)
                    buffer += chunk
                    if not chunk:
                        answers[worker] = f"ended unexpectedly (exit status {self._processes[worker].wait()})"
                    elif len(buffer) > LIMIT:
                        answers[worker] = f"answered more than {LIMIT} bytes"
                    elif buffer.endswith(b"\n"):
                        answers[worker] = _load(buffer)
                    else:
                        continue
                    selector.unregister(key.fileobj)
        return answers


def _load(line: bytearray) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return f"answered {bytes(line[:80])!r}, which is not JSON"


def _parse(replies: object, count: int) -> list[tuple[Observation, str] | str]:
    """Observation and task, or a sentence, per entry. Raises ValueError for anything else."""
    if isinstance(replies, str):
        raise ValueError(replies)
    if not isinstance(replies, list) or len(replies) != count:
        raise ValueError(f"answered {str(replies)[:80]!r}, need a list of {count}")
    parsed: list[tuple[Observation, str] | str] = []
    for reply in replies:
        match reply:
            case str():
                parsed.append(reply)
            case [
                str() as text,
                [*admissible],
                int() | float() as reward,
                bool() as done,
                bool() as won,
                str() as task,
            ]:
                parsed.append((Observation(text, tuple(map(str, admissible)), float(reward), done, won), task))
            case _:
                raise ValueError(f"answered {str(reply)[:80]!r} for an episode")
    return parsed
