"""What the policy reads at a turn. A prompt is rebuilt every turn from the task and what is kept of the episode.

Two ways: `Notes` for small policies, read off the household's texts (which places were not visited yet, what was seen
in the others, what is in hand), and `History` for language models, as published (the last turns as they were, the
observation, the admissible actions). Length is cut where it hurts least, what is oldest first; the task is never cut.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from envs_bridge.turn import Observation

# What a small policy's answer begins with for it: the thought is closed, so it answers with a command alone.
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


class Memory(Protocol):
    """What is kept of one trajectory, from which the prompt of its next turn is written."""

    def remember(self, command: str, seen: Observation) -> None:
        """Note what was done and what came of it."""

    def prompt(self) -> str: ...

    def shortened(self) -> Iterator[str]:
        """Ever shorter prompts, for one that is too long."""

    def copy(self) -> "Memory": ...


@dataclass
class Notes:
    """Notes on one trajectory. `places` maps each place to what was last seen there (None: not visited yet)."""

    task: str
    now: str
    places: dict[str, list[str] | None] = field(default_factory=dict)
    here: str = ""
    hand: str = ""
    last: str = ""

    @classmethod
    def start(cls, task: str, seen: Observation) -> "Notes":
        """Notes before the first turn, from the first observation."""
        room = _ROOM.search(seen.text)
        places = dict.fromkeys(_things(room.group(1))) if room else {}
        return cls(task, "You are in the middle of a room.", places)

    def remember(self, command: str, seen: Observation) -> None:
        """Note what was done and what came of it."""
        observation = seen.text
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

    def copy(self) -> "Notes":
        return replace(self, places=dict(self.places))

    def prompt(self, *, notes: int | None = None, words: int | None = None) -> str:
        """A short prompt for small policies: task, notes, what is seen now.

        Every place not visited yet stands behind its own `new`, and every thing before the place it was seen in, so
        that what a name means is told by the word beside it: two layers of attention can look that up.
        `notes`: how many of the places seen before are described (all by default, the latest first to stay). `words`:
        how many words of the current observation are kept (all by default).
        """
        new = " ".join(f"new {place}" for place, things in self.places.items() if things is None)
        seen = [
            " ".join(f"{thing} in {place}" for thing in things or ["nothing"])
            for place, things in self.places.items()
            if things is not None
        ]
        kept = seen if notes is None else seen[len(seen) - notes :]
        now = self.now if words is None else " ".join(self.now.split()[:words])
        return (
            f"task : {self.task}\n{new}\nseen {' '.join(kept)}\nhand {self.hand}\n"
            f"last {self.last}\nnow {now}\nat {self.here}\n"
        )

    def shortened(self) -> Iterator[str]:
        """Ever shorter prompts: fewer notes on places, then fewer words of the observation."""
        for notes in range(len(self.places), -1, -1):
            yield self.prompt(notes=notes)
        words = len(self.now.split())
        while words > 0:
            words //= 2
            yield self.prompt(notes=0, words=words)


@dataclass
class History:
    """The last turns of a trajectory as they were. `turns`: (observation, action) pairs, at most `kept` of them.

    `list_actions`: whether the prompt lists the admissible actions. Source: the official code's prompts (spec, 'The
    published recipe'), in words of our own.
    """

    task: str
    now: str
    admissible: Sequence[str]
    kept: int = 2
    list_actions: bool = True
    turns: tuple[tuple[str, str], ...] = ()
    taken: int = 0

    @classmethod
    def start(cls, task: str, seen: Observation, *, kept: int = 2, list_actions: bool = True) -> "History":
        """Nothing done yet. The first observation ends with the task, which the prompt has a place for."""
        now = seen.text.removesuffix(f"Your task is to: {task}").rstrip()
        return cls(task, now, seen.admissible, kept, list_actions)

    def remember(self, command: str, seen: Observation) -> None:
        """The observation under way becomes part of the past."""
        self.turns = (*self.turns, (self.now, command))[-self.kept :] if self.kept else ()
        self.taken += 1
        self.now, self.admissible = seen.text, seen.admissible

    def copy(self) -> "History":
        return replace(self)

    def prompt(
        self, *, turns: int | None = None, list_actions: bool | None = None, words: int | None = None
    ) -> str:  # fmt: skip
        """Instruction, task, the last turns, the observation now, what can be done, how to answer.

        `turns`, `words`: how many past turns and words of the observation are kept (all by default).
        """
        past = self.turns if turns is None else self.turns[len(self.turns) - turns :]
        now = self.now if words is None else " ".join(self.now.split()[:words])
        parts = [f"You act in a text world, one action a turn. Your task: {self.task}"]
        if past:
            first = self.taken - len(past) + 1
            lines = [f"[{first + i}] saw: {saw}\n[{first + i}] did: {did}" for i, (saw, did) in enumerate(past)]
            parts.append(f"You have taken {self.taken} actions. The latest:\n" + "\n".join(lines))
        parts.append(f"Turn {self.taken + 1}. You see: {now}")
        if self.list_actions if list_actions is None else list_actions:
            parts.append("Possible actions:\n" + "\n".join(a for a in self.admissible if a != "help"))
        parts.append(
            "Think first, inside <think> and </think>. Then give exactly one action inside <action> and </action>."
        )
        return "\n\n".join(parts) + "\n"

    def shortened(self) -> Iterator[str]:
        """Ever shorter prompts: no past turns (as published for WebShop), then no list of actions, then fewer words of
        the observation."""
        yield self.prompt(turns=0)
        words = len(self.now.split())
        yield self.prompt(turns=0, list_actions=False)
        while words > 0:
            words //= 2
            yield self.prompt(turns=0, list_actions=False, words=words)
