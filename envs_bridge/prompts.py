"""What the policy reads at a turn. A prompt is rebuilt every turn from the task and notes kept of the episode.

The notes are read off the household's texts alone: which places were not visited yet, what was seen in the others,
what is in hand. Length is cut where it hurts least: first the notes on the places seen longest ago, then the end of
a long observation; the task is never cut.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# The thought is closed before the answer begins, so a small policy answers with a command alone.
ANSWER_START = "<think></think><action>"
NOTHING = "Nothing happens."
CLOSED = "closed"  # stands for what is in a place that was seen from outside only
_ROOM = re.compile(r"Looking quickly around you, you see (.*?)\.(?:\n|$)", re.S)
_CONTENTS = re.compile(r"(?:On the [^,.]+|In it), you see ([^.]*)\.")
_TAKEN = re.compile(r"You pick up the (.+) from the ")
_PLACED = re.compile(r"You (?:move|put) the (.+) (?:to|in/on) the ")
_CHANGED = re.compile(r"You (heat|clean|cool) the (.+) using the ")
_STATES = {"heat": "hot", "clean": "clean", "cool": "cool"}


def _things(listing: str) -> list[str]:
    """['mug 1', 'pen 2'] from 'a mug 1, and a pen 2'; [] from 'nothing'."""
    words = (part.strip().removeprefix("and ").removeprefix("a ") for part in listing.split(","))
    return [word for word in words if word and word != "nothing"]


@dataclass
class Memory:
    """Notes on one trajectory. `places` maps each place to what was last seen there (None: not visited yet)."""

    task: str
    now: str
    places: dict[str, list[str] | None] = field(default_factory=dict)
    here: str = ""
    hand: str = ""
    last: str = ""

    @classmethod
    def start(cls, task: str, first: str) -> "Memory":
        """Notes before the first turn, from the first observation."""
        room = _ROOM.search(first)
        places = dict.fromkeys(_things(room.group(1))) if room else {}
        return cls(task, "You are in the middle of a room.", places)

    def remember(self, command: str, observation: str) -> None:
        """Note what was done and what came of it."""
        self.last = command
        if observation == NOTHING:  # the world is as it was: what was seen before still holds
            self.last += " failed"
            return
        self.now = observation
        if command.startswith("go to "):
            self.here = command.removeprefix("go to ")
            self.places[self.here] = self.places.pop(self.here, None) or []
        contents = _CONTENTS.search(observation)
        if contents and self.here and not command.startswith(("look", "examine")):
            self.places[self.here] = _things(contents.group(1))
        elif observation.endswith(" is closed.") and not self.places.get(self.here):
            self.places[self.here] = [CLOSED]
        around = [thing for thing in self.places.get(self.here) or [] if thing != CLOSED]
        if taken := _TAKEN.match(observation):
            self.hand = taken.group(1)
            self.places[self.here] = [thing for thing in around if thing != self.hand]
        elif placed := _PLACED.match(observation):
            self.places[self.here] = [*around, placed.group(1)]
            self.hand = ""
        elif changed := _CHANGED.match(observation):
            self.hand = f"{_STATES[changed.group(1)]} {changed.group(2)}"

    def copy(self) -> "Memory":
        return Memory(self.task, self.now, dict(self.places), self.here, self.hand, self.last)


def compact(memory: Memory, *, notes: int | None = None, words: int | None = None) -> str:
    """A short prompt for small policies: task, notes, what is seen now.

    Every place not visited yet stands behind its own `new`, and every thing before the place it was seen in, so that
    what a name means is told by the word beside it: two layers of attention can look that up.
    `notes`: how many of the places seen before are described (all by default, the latest first to stay). `words`:
    how many words of the current observation are kept (all by default).
    """
    new = " ".join(f"new {place}" for place, things in memory.places.items() if things is None)
    seen = [
        " ".join(f"{thing} in {place}" for thing in things or ["nothing"])
        for place, things in memory.places.items()
        if things is not None
    ]
    kept = seen if notes is None else seen[len(seen) - notes :]
    now = memory.now if words is None else " ".join(memory.now.split()[:words])
    return (
        f"task : {memory.task}\n{new}\nseen {' '.join(kept)}\nhand {memory.hand}\n"
        f"last {memory.last}\nnow {now}\nat {memory.here}\n{ANSWER_START}"
    )


def shortened(memory: Memory) -> Iterator[str]:
    """Ever shorter prompts: fewer notes on places, then fewer words of the observation."""
    for notes in range(len(memory.places), -1, -1):
        yield compact(memory, notes=notes)
    words = len(memory.now.split())
    while words > 0:
        words //= 2
        yield compact(memory, notes=0, words=words)
