"""Many environments over a few worker processes: one batched message per worker and turn.

Workers are started by interpreter path, never forked: a process that holds JAX must not be forked.
"""

import contextlib
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from envs_bridge.turn import Observation
from envs_bridge.worker import VERSION


class WorkerError(RuntimeError):
    """A worker died, hung, spoke another protocol version, or could not do what it was asked."""


class Pool:
    """`workers` processes, each playing a share of the slots. Use as a context manager, or call `close`."""

    def __init__(self, workers: int = 2, *, python: str = sys.executable, engine: str = "fast", timeout: float = 60.0):
        """`engine`: "fast" (ours) or "textworld" (ALFWorld's own, which `python` must have)."""
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.timeout = timeout
        root = str(Path(__file__).resolve().parent.parent)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        self._buffers = [bytearray() for _ in range(workers)]
        processes = [
            subprocess.Popen(
                [python, "-m", "envs_bridge.worker", engine],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            for _ in range(workers)
        ]
        self._processes = [(p, p.stdin, p.stdout) for p in processes if p.stdin and p.stdout]
        for hello in self._receive(range(workers)).values():
            if hello != {"version": VERSION}:
                self.close()
                raise WorkerError(f"a worker answered {hello}, need protocol version {VERSION}")

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        for _, requests, _ in self._processes:
            with contextlib.suppress(BrokenPipeError):
                requests.close()
        for process, _, answers in self._processes:
            try:
                process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            answers.close()

    def reset(self, games: Sequence[tuple[int, str]]) -> list[tuple[Observation, str]]:
        """Start (slot, game file) pairs; answers (observation, task) in the same order."""
        return [(seen, task) for seen, task in self._ask("reset", games)]

    def step(self, commands: Sequence[tuple[int, str]]) -> list[Observation]:
        """Play (slot, command) pairs; answers in the same order."""
        return [seen for seen, _ in self._ask("step", commands)]

    def _ask(self, verb: str, entries: Sequence[tuple[int, str]]) -> list[tuple[Observation, str]]:
        shares: dict[int, list[int]] = {}
        for position, (slot, _) in enumerate(entries):
            shares.setdefault(self._worker_of(slot), []).append(position)
        for worker, positions in shares.items():
            message = json.dumps({verb: [entries[p] for p in positions]}) + "\n"
            try:
                requests = self._processes[worker][1]
                requests.write(message.encode())
                requests.flush()
            except BrokenPipeError:
                raise WorkerError(self._obituary(worker)) from None
        answers: list = [None] * len(entries)
        for worker, replies in self._receive(shares).items():
            if not isinstance(replies, list) or len(replies) != len(shares[worker]):
                error = replies.get("error") if isinstance(replies, dict) else None
                raise WorkerError(error or f"worker {worker} answered {str(replies)[:200]!r}")
            for position, (text, admissible, reward, done, won, task) in zip(shares[worker], replies, strict=True):
                answers[position] = Observation(text, tuple(admissible), reward, done, won), task
        return answers

    def _worker_of(self, slot: int) -> int:
        """Blocks of eight slots share a worker, so that the members of a group share its cache."""
        return slot // 8 % len(self._processes)

    def _receive(self, workers) -> dict[int, object]:
        """One JSON line from each of these workers."""
        answers: dict[int, object] = {}
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                selector.register(self._processes[worker][2], selectors.EVENT_READ, worker)
            while selector.get_map():
                events = selector.select(self.timeout)
                if not events:
                    raise WorkerError(f"a worker did not answer within {self.timeout:g} s")
                for key, _ in events:
                    worker, buffer = key.data, self._buffers[key.data]
                    chunk = os.read(key.fd, 1 << 20)
                    if not chunk:
                        raise WorkerError(self._obituary(worker))
                    buffer += chunk
                    if buffer.endswith(b"\n"):
                        answers[worker] = json.loads(buffer)
                        buffer.clear()
                        selector.unregister(key.fileobj)
        return answers

    def _obituary(self, worker: int) -> str:
        code = self._processes[worker][0].poll()
        return f"worker {worker} ended unexpectedly (exit status {code})"
