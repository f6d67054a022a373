"""What the policy reads at a turn. A prompt is rebuilt every turn from the task and a short memory.

Length is cut where it hurts least: first the oldest commands, then the end of a long observation.
"""

import re
from dataclasses import dataclass, field

# The thought is closed before the answer begins, so a small policy answers with a command alone.
ANSWER_START = "<think></think><action>"
_ROOM = re.compile(r"Looking quickly around you, you see (.*?)\.(?:\n|$)", re.S)
_ARTICLE = re.compile(r"\b(?:an?|and) |,")


@dataclass
class Memory:
    """What one trajectory has seen so far. `past` holds (command, answer) per turn, oldest first."""

    task: str
    first: str
    now: str
    past: list[tuple[str, str]] = field(default_factory=list)

    def remember(self, command: str, observation: str) -> None:
        self.past.append((command, observation))
        self.now = observation


def compact(memory: Memory, *, commands: int = 12, words: int | None = None) -> str:
    """A short prompt for small policies: task, the room's furniture, past commands, what is seen now.

    `commands`: how many of the latest commands are listed; one that did nothing is marked. `words`: how many words
    of the current observation are kept (all by default).
    """
    furniture = _ROOM.search(memory.first)
    places = " ".join(_ARTICLE.sub(" ", furniture.group(1)).split()) if furniture else ""
    past = memory.past[-commands:] if commands else []
    done = " ; ".join(command + (" failed" if answer == "Nothing happens." else "") for command, answer in past)
    now = memory.now if memory.past else "You are in the middle of a room."
    if words is not None:
        now = " ".join(now.split()[:words])
    return f"task: {memory.task}\nplaces: {places}\ndone: {done}\nnow: {now}\n{ANSWER_START}"


def shortened(memory: Memory, commands: int):
    """Ever shorter prompts: fewer past commands, then fewer words of the observation. The task is never cut."""
    for kept in range(commands - 1, -1, -1):
        yield compact(memory, commands=kept)
    words = len(memory.now.split())
    while words > 0:
        words //= 2
        yield compact(memory, commands=0, words=words)
