"""What an environment is to the bridge: five values a turn, as in Gymnasium, without auto-reset.

An environment has `reset() -> Observation` and `step(command) -> Observation`. Nothing here imports JAX, and nothing is
newer than Python 3.8, which genuine environments may run under.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, Union

# Observations that a worker and the pool remember of each other; both forget at once when there would be more.
SAID_AT_MOST = 10_000
# Stands among the admissible commands where words of one's own may be searched for.
SEARCH_COMMAND = "search[<words>]"
_BRACKETED = re.compile(r"(.+)\[(.+)\]")


class Goal(NamedTuple):
    """A shop's goal: the prepared catalogue or WebShop's checkout, its place in the goals' order, what kind it is."""

    folder: str
    number: int
    kind: str


# What names a game: a household game's file, or a shop's goal (in JSON, a list of its three fields).
Game = Union[str, Goal]  # noqa: UP007  (Python 3.8 evaluates it)


def bracketed(action: str) -> tuple[str, str]:
    """(name, argument) of an action like `click[label]`, as WebShop reads it; the argument in lower case, and empty
    where there is none. One with brackets of its own, or a line break, may not be read as it was meant."""
    match = _BRACKETED.match(action)
    return (match.group(1), match.group(2).lower()) if match else (action, "")


def clicks(labels: Iterable[str]) -> tuple[str, ...]:
    """Commands that click these lower-case labels; without those that WebShop would not read as such."""
    commands = [f"click[{label}]" for label in labels if label != "search"]
    return tuple(command for command in commands if bracketed(command) == ("click", command[6:-1]))


@dataclass(frozen=True)
class Observation:
    """What the world answers.

    text        the raw environment text: the anchor observation, by which steps are compared
    admissible  commands that would do something now; `SEARCH_COMMAND` stands for any search
    reward      the environment's own reward of this turn in [0, 1] (before any reward scale)
    done        the episode is over; the caller resets
    won         the task is solved
    words       counts of the text's words, if a pool's worker has counted them
    """

    text: str
    admissible: tuple[str, ...]
    reward: float = 0.0
    done: bool = False
    won: bool = False
    words: Mapping[str, int] | None = field(default=None, compare=False, repr=False)

    def admits(self, command: str) -> bool:
        """Whether the command would do something now."""
        if command in self.admissible:
            return command != SEARCH_COMMAND
        if SEARCH_COMMAND not in self.admissible:
            return False
        name, words = bracketed(command)
        return name == "search" and words != ""


class Demonstrated(NamedTuple):
    """One turn of a demonstrated episode: what was seen, what was done, and why, in a sentence (may be empty)."""

    seen: Observation
    command: str
    thought: str = ""


class Environment(Protocol):
    """One text world. `task` is the instruction in words, known after `reset`."""

    task: str

    def reset(self) -> Observation: ...

    def step(self, command: str) -> Observation: ...
