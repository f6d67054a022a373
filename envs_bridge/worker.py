"""A worker process: plays many environments for the pool, one batched message per turn. Never imports JAX.

Started as `python -m envs_bridge.worker ENGINE`, ENGINE one of `ENGINES`. JSON lines over stdin and a private copy of
stdout (libraries print). Requests: {"reset": [[slot, game], ...]} and {"step": [[slot, command], ...]}; a game is a
file, or a shop's [folder, number, kind]. The answer is a list with one [seen, reward, done, won, task] per entry, or a
sentence for an entry that could not be done. `seen` is [text, admissible commands (a line each), counts of the text's
words] the first time this worker says that, and its number after.

Runs under Python 3.8 to 3.12, whatever the engine's packages need; an engine is imported when it is asked for.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from envs_bridge.turn import SAID_AT_MOST, Environment, Game, Goal, Observation

VERSION = 4
WORD = re.compile(r"\b\w\w+\b")  # as `proxmo_jax.estimator.words` counts, which this process must not import


def load_fast(path: str) -> Environment:
    """Our household engine; ALFWorld's own for a game whose rules or texts ours does not implement."""
    from envs_bridge.household.dialect import ForeignGame
    from envs_bridge.household.engine import Household
    from envs_bridge.household.upstream import UpstreamHousehold

    try:
        return Household.load(path)
    except ForeignGame as foreign:
        try:
            return UpstreamHousehold.load(path)
        except ValueError as error:
            raise ValueError(f"{foreign}, and {error}") from error


def load_textworld(path: str) -> Environment:
    """ALFWorld's own engine, its repeated work remembered."""
    from envs_bridge.household.upstream import UpstreamHousehold

    return UpstreamHousehold.load(path)


def load_textworld_stock(path: str) -> Environment:
    """ALFWorld's own engine as it is."""
    from envs_bridge.household.upstream import UpstreamHousehold

    return UpstreamHousehold.load_stock(path)


def load_shop(game: Goal) -> Environment:
    """Our shop engine, on a prepared catalogue."""
    from envs_bridge.shop.engine import Shopping

    return Shopping.load(Goal(*game))


def load_webshop(game: Goal) -> Environment:
    """WebShop itself."""
    from envs_bridge.shop.upstream import UpstreamShop

    return UpstreamShop.load(Goal(*game))


ENGINES: dict[str, Callable[[Any], Environment]] = {
    "fast": load_fast,
    "textworld": load_textworld,
    "textworld-stock": load_textworld_stock,
    "shop": load_shop,
    "webshop": load_webshop,
}


class Worker:
    """The worlds of one process, by slot, and what they have said, by text and admissible commands."""

    def __init__(self, load):
        self._load, self._worlds, self._said = load, {}, {}

    def answer(self, request: dict) -> list:
        """Do one request on the worlds of this worker."""
        replies: list = []
        for verb in ("reset", "step"):
            for slot, text in request.get(verb, []):
                try:
                    seen = self._reset(slot, text) if verb == "reset" else self._step(slot, text)
                    replies.append(self._fields(seen, self._worlds[slot].task))
                except Exception as error:  # one broken game is not the end of the others
                    replies.append(str(error) or type(error).__name__)
        return replies

    def _reset(self, slot: int, game: Game) -> Observation:
        self._worlds.pop(slot, None)
        world = self._load(game)
        seen = world.reset()
        self._worlds[slot] = world
        return seen

    def _step(self, slot: int, command: str) -> Observation:
        if slot not in self._worlds:
            raise ValueError(f"slot {slot} has no game")
        return self._worlds[slot].step(command)

    def _fields(self, seen: Observation, task: str) -> list:
        # Environments of others give NumPy's numbers and lists, too.
        said = str(seen.text), tuple(seen.admissible)
        rest = [float(seen.reward), bool(seen.done), bool(seen.won), str(task)]
        number = self._said.get(said)
        if number is None:
            # A command of two lines could not be told from two, nor be listed in a prompt.
            lines = "\n".join(command for command in said[1] if "\n" not in command)
            if len(self._said) >= SAID_AT_MOST:  # only where the pool will do so, too
                self._said.clear()
            self._said[said] = len(self._said)
            return [[said[0], lines, word_counts(said[0])], *rest]
        return [number, *rest]


@functools.lru_cache(maxsize=10_000)
def word_counts(text: str) -> Counter:
    return Counter(WORD.findall(text.lower()))


def loader(name: str) -> Callable[[Any], Environment]:
    """What loads an environment: one of `ENGINES`, or `module:function`."""
    if name in ENGINES:
        return ENGINES[name]
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")  # half a character becomes a question mark
    os.dup2(2, 1)
    worker = Worker(loader(sys.argv[1]))
    print(json.dumps({"version": VERSION}), file=pipe, flush=True)
    for line in sys.stdin.buffer:
        print(json.dumps(worker.answer(json.loads(line)), ensure_ascii=False), file=pipe, flush=True)


if __name__ == "__main__":
    main()
