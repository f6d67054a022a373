"""What an environment is to the bridge: five values a turn, as in Gymnasium, without auto-reset.

An environment has `reset() -> Observation` and `step(command) -> Observation`. Nothing here imports JAX, and nothing is
newer than Python 3.8, which genuine environments may run under.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

# Observations that a worker and the pool remember of each other; both forget at once when there would be more.
SAID_AT_MOST = 10_000
# Stands among the admissible commands where words of one's own may be searched for.
SEARCH_COMMAND = "search[<words>]"


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
        is_search = command.startswith("search[") and command.endswith("]") and len(command) > len("search[]")
        return is_search and SEARCH_COMMAND in self.admissible


class Environment(Protocol):
    """One text world. `task` is the instruction in words, known after `reset`."""

    task: str

    def reset(self) -> Observation: ...

    def step(self, command: str) -> Observation: ...
