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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from envs_bridge.errors import UserError
from envs_bridge.turn import SAID_AT_MOST, Game, Observation
from envs_bridge.worker import VERSION

LIMIT = 1 << 26  # bytes of one answer; more is garbage


# Text, admissible commands, word counts.
Said = tuple[str, tuple[str, ...], Mapping[str, int]]


class WorkerError(UserError):
    """No worker can be started, or speaks another protocol version."""


class Pool:
    """`workers` processes, each playing a share of the slots. Use as a context manager, or call `close`.

    `reset` and `step` wait for the answers; `send_step` and `receive` are the two halves of `step`, for what can be
    done while the worlds play. `faults` counts the times a worker had to be replaced or could not play a game, and
    `fault` is what was wrong last.
    """

    def __init__(
        self,
        workers: int = 2,
        *,
        python: str = sys.executable,
        engine: str = "fast",
        block: int = 8,
        timeout: float = 60.0,
    ):
        """Start the workers.

        Args:
            workers: processes.
            python: their interpreter, which has the packages of the engine.
            engine: a name in `envs_bridge.worker.ENGINES`, or `module:function`.
            block: slots in a row that share a worker, as the members of a group should.
            timeout: seconds after which a worker that does not answer is replaced.

        Raises:
            WorkerError: if no worker can be started.
        """
        if workers < 1 or block < 1:
            raise ValueError(f"workers and block must be at least 1, got {workers} and {block}")
        self.timeout, self.faults, self.fault = timeout, 0, ""
        self._block = block
        self._command = [python, "-m", "envs_bridge.worker", engine]
        self._links: list[_Link] = []
        self._waiting: dict[int, list[int]] = {}  # worker -> positions of the entries it was asked
        try:
            for _ in range(workers):
                self._links.append(_Link(self._command))
        except OSError as error:
            raise WorkerError(f"a worker did not start: {python} ({error.strerror})") from error
        self._greet(range(workers))

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        for link in self._links:
            link.hang_up()
        for link in self._links:
            link.close()

    def reset(self, games: Sequence[tuple[int, Game]]) -> list[tuple[Observation, str] | None]:
        """Start (slot, game) pairs; answers (observation, task) in the same order, None for one that failed."""
        self._send("reset", games)
        return self._collect()

    def step(self, commands: Sequence[tuple[int, str]]) -> list[Observation | None]:
        """Play (slot, command) pairs; answers in the same order, None for a lost episode."""
        self.send_step(commands)
        return self.receive()

    def send_step(self, commands: Sequence[tuple[int, str]]) -> None:
        """The first half of `step`: the worlds begin to play."""
        self._send("step", commands)

    def receive(self) -> list[Observation | None]:
        """The second half of `step`: wait for the answers."""
        return [answer and answer[0] for answer in self._collect()]

    def _greet(self, workers: Iterable[int]) -> None:
        """Read the version each new worker says first. Raises WorkerError, the pool closed, if it is not ours."""
        for hello in self._receive(set(workers)).values():
            if hello != {"version": VERSION}:
                self.close()
                said = hello if isinstance(hello, str) else f"it said {str(hello)[:200]}"
                raise WorkerError(f"a worker did not start ({said}); need one of protocol version {VERSION}")

    def _replace(self, worker: int, reason: str) -> None:
        self.faults, self.fault = self.faults + 1, reason
        self._links[worker].kill()
        self._links[worker] = _Link(self._command)
        self._greet([worker])

    def _send(self, verb: str, entries: Sequence[tuple[int, Game]]) -> None:
        self._waiting = {}
        for position, (slot, _) in enumerate(entries):
            self._waiting.setdefault(self._worker_of(slot), []).append(position)
        for worker, positions in self._waiting.items():
            self._links[worker].outgoing += json.dumps({verb: [entries[p] for p in positions]}).encode("ascii") + b"\n"
            self._links[worker].write()

    def _collect(self) -> list[tuple[Observation, str] | None]:
        """What the workers answer to the request under way, in its order."""
        waiting, self._waiting = self._waiting, {}
        answers: list = [None] * sum(map(len, waiting.values()))
        for worker, replies in self._receive(set(waiting)).items():
            try:
                parsed = _parse(replies, len(waiting[worker]), self._links[worker].said)
            except ValueError as error:
                self._replace(worker, f"worker {worker} {error}")
                continue
            for position, reply in zip(waiting[worker], parsed, strict=True):
                if isinstance(reply, str):
                    self.faults, self.fault = self.faults + 1, reply
                else:
                    answers[position] = reply
        return answers

    def _worker_of(self, slot: int) -> int:
        """The members of a group share a worker, and so its caches."""
        return slot // self._block % len(self._links)

    def _receive(self, workers: set[int]) -> dict[int, object]:
        """One JSON line from each of these workers; a sentence for one that gives none in time."""
        answers: dict[int, object] = {}
        until = time.monotonic() + self.timeout
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                link = self._links[worker]
                selector.register(link.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
                if link.outgoing:
                    selector.register(link.process.stdin, selectors.EVENT_WRITE, worker)  # type: ignore[arg-type]
            while len(answers) < len(workers):
                events = selector.select(max(until - time.monotonic(), 0))
                if not events:
                    for worker in workers - set(answers):
                        answers[worker] = f"did not answer within {self.timeout:g} s"
                for key, event in events:
                    link = self._links[key.data]
                    if event == selectors.EVENT_WRITE:
                        finished = link.write()
                    else:
                        finished = link.read()
                        if finished:
                            answers[key.data] = link.take()
                    if finished:
                        selector.unregister(key.fileobj)
        return answers


class _Link:
    """One worker process, what is still to be written to it, what was read of its next line, and what it has said."""

    def __init__(self, command: list[str]):
        root = str(Path(__file__).resolve().parent.parent)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)
        # A worker that hangs does not read: what it is told must not hang this process, too.
        os.set_blocking(self.process.stdin.fileno(), False)  # type: ignore[union-attr]
        self.outgoing, self.incoming, self._ended = bytearray(), bytearray(), False
        self.said: list[Said] = []

    def write(self) -> bool:
        """Write what the pipe takes; True when nothing is left. A dead worker is found when its answer is read."""
        try:
            written = os.write(self.process.stdin.fileno(), self.outgoing) if self.outgoing else 0  # type: ignore[union-attr]
            del self.outgoing[:written]
        except BlockingIOError:
            return False
        except BrokenPipeError:
            self.outgoing.clear()
        return not self.outgoing

    def read(self) -> bool:
        """Read what is there; True when a line, or the worker, has ended."""
        chunk = os.read(self.process.stdout.fileno(), 1 << 20)  # type: ignore[union-attr]
        self.incoming += chunk
        self._ended = not chunk
        return self._ended or len(self.incoming) > LIMIT or self.incoming.endswith(b"\n")

    def take(self) -> object:
        """The line that was read, parsed, or a sentence about what came instead."""
        line, self.incoming = self.incoming, bytearray()
        if self._ended:
            return f"ended unexpectedly (exit status {self.process.wait()})"
        if len(line) > LIMIT:
            return f"answered more than {LIMIT} bytes"
        try:
            return json.loads(line)
        except ValueError:
            return f"answered {bytes(line[:80])!r}, which is not JSON"

    def hang_up(self) -> None:
        """Tell the worker to end."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # type: ignore[union-attr]

    def close(self) -> None:
        """Wait for the worker's end; kill it if that takes more than two seconds."""
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process.stdout.close()  # type: ignore[union-attr]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.hang_up()
        self.process.stdout.close()  # type: ignore[union-attr]


def _parse(replies: object, count: int, said: list[Said]) -> list[tuple[Observation, str] | str]:
    """Observation and task, or a sentence, per entry. Raises ValueError for anything else.

    said: what this worker has said so far, by number; what is new is added.
    """
    if isinstance(replies, str):
        raise ValueError(replies)
    if not isinstance(replies, list) or len(replies) != count:
        raise ValueError(f"answered {str(replies)[:80]!r}, need a list of {count}")
    parsed: list[tuple[Observation, str] | str] = []
    for reply in replies:
        match reply:
            case str():
                parsed.append(reply)
            case [seen, int() | float() as reward, bool() as done, bool() as won, str() as task]:
                text, admissible, words = _seen(seen, said)
                parsed.append((Observation(text, admissible, float(reward), done, won, words), task))
            case _:
                raise ValueError(f"answered {str(reply)[:80]!r} for an episode")
    return parsed


def _seen(seen: object, said: list[Said]) -> Said:
    """What a worker says anew or by number. Raises ValueError for anything else."""
    match seen:
        case int() if 0 <= seen < len(said):
            return said[seen]
        case [str() as text, str() as lines, dict() as words]:
            if not set(map(type, words.values())) <= {int} or min(words.values(), default=1) < 1:
                raise ValueError(f"answered {str(words)[:80]!r} as word counts")
            if len(said) >= SAID_AT_MOST:  # the worker forgets at the same moment
                said.clear()
            said.append((text, tuple(lines.split("\n")) if lines else (), words))
            return said[-1]
    raise ValueError(f"answered {str(seen)[:80]!r} as an observation")
