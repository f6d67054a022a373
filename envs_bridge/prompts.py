"""What the policy reads at a turn. A prompt is rebuilt every turn from the task and what is kept of the episode.

Two ways: `Notes` for small policies, read off the household's texts (which places were not visited yet, what was seen
in the others, what is in hand), and `History` for language models, as published (the last turns as they were, the
observation, the admissible actions). Length is cut where it hurts least, what is oldest first; the task comes last.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, TypeVar

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
# Where a text may be cut: after a word of ASCII letters and digits, or after any other character with what belongs to
# it (accents, joined emoji, flags). Long runs without a space are cut all the same.
_PIECE = re.compile(
    r"\s{0,8}(?:[A-Za-z0-9_]{1,24}|[\U0001f1e6-\U0001f1ff]{2}|.)"
    r"(?:\u200d.|[\u0300-\u036f\u20e3\ufe00-\ufe0f\U0001f3fb-\U0001f3ff])*",
    re.S,
)


def _things(listing: str) -> list[str]:
    """['mug 1', 'pen 2'] from 'a mug 1, and a pen 2'; [] from 'nothing'."""
    words = (part.strip().removeprefix("and ").removeprefix("a ") for part in listing.split(","))
    return [word for word in words if word and word != "nothing"]


class Cut(NamedTuple):
    """One way to shorten a prompt: `write(n)` keeps `n` of the `size` parts of `what`, 0 <= n <= size."""

    what: str
    size: int
    write: Callable[[int], str]


def piece_ends(text: str) -> list[int]:
    """Where a text may be cut, its start and its end included: never within a word of ASCII letters and digits (of 24
    at most), nor within a character that is written as several."""
    return [0, *(piece.end() for piece in _PIECE.finditer(text))]


def readable(text: str) -> str:
    """The text with `?` for each half of a surrogate pair, which JSON can hold and no tokenizer reads."""
    return text.encode("utf-8", "replace").decode()


class Memory(Protocol):
    """What is kept of one trajectory, from which the prompt of its next turn is written."""

    def remember(self, command: str, seen: Observation) -> None:
        """Note what was done and what came of it."""

    def prompt(self) -> str: ...

    def shortened(self) -> Iterator[Cut]:
        """How a prompt that is too long is cut, what hurts least first. Each cut begins where the one before it has
        left nothing; the last is the task's."""

    def copy(self) -> "Memory": ...


Kept = TypeVar("Kept", "Notes", "History")


def _cut(memory: Kept, what: str, name: str) -> Cut:
    """The cut of a field that is a text: its beginning is kept."""
    text = getattr(memory, name)
    ends = piece_ends(text)
    return Cut(what, len(ends) - 1, lambda n: replace(memory, **{name: text[: ends[n]]}).prompt())


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

    def prompt(self) -> str:
        """A short prompt for small policies: task, notes, what is seen now.

        Every place not visited yet stands behind its own `new`, and every thing before the place it was seen in, so
        that what a name means is told by the word beside it: two layers of attention can look that up.
        """
        new = " ".join(f"new {place}" for place, things in self.places.items() if things is None)
        seen = " ".join(
            f"{thing} in {place}"
            for place, things in self.places.items()
            if things is not None
            for thing in things or ["nothing"]
        )
        return (
            f"task : {self.task}\n{new}\nseen {seen}\nhand {self.hand}\n"
            f"last {self.last}\nnow {self.now}\nat {self.here}\n"
        )

    def shortened(self) -> Iterator[Cut]:
        """Fewer notes on places (the latest stay), fewer places not visited, less of the observation, of the task."""
        seen = [place for place, things in self.places.items() if things is not None]
        new = [place for place, things in self.places.items() if things is None]

        def with_places(kept: Sequence[str]) -> "Notes":
            return replace(self, places={place: self.places[place] for place in kept})

        yield Cut("notes", len(seen), lambda n: with_places([*new, *seen[len(seen) - n :]]).prompt())
        yield Cut("places", len(new), lambda n: with_places(new[:n]).prompt())
        bare = with_places([])
        yield _cut(bare, "observation", "now")
        yield _cut(replace(bare, now=""), "task", "task")


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

    def prompt(self) -> str:
        """Instruction, task, the last turns, the observation now, what can be done, how to answer."""
        parts = [f"You act in a text world, one action a turn. Your task: {self.task}"]
        if self.turns:
            first = self.taken - len(self.turns) + 1
            lines = [f"[{first + i}] saw: {saw}\n[{first + i}] did: {did}" for i, (saw, did) in enumerate(self.turns)]
            parts.append(f"You have taken {self.taken} actions. The latest:\n" + "\n".join(lines))
        parts.append(f"Turn {self.taken + 1}. You see: {self.now}")
        if self.list_actions:
            parts.append("Possible actions:\n" + "\n".join(a for a in self.admissible if a != "help"))
        parts.append(
            "Think first, inside <think> and </think>. Then give exactly one action inside <action> and </action>."
        )
        return "\n\n".join(parts) + "\n"

    def shortened(self) -> Iterator[Cut]:
        """No past turns (as published for WebShop), then no list of actions, then less of the observation, of the
        task."""
        alone = replace(self, turns=())
        yield Cut("turns", 0, lambda _: alone.prompt())
        bare = replace(alone, list_actions=False)
        yield Cut("actions", 0, lambda _: bare.prompt())
        yield _cut(bare, "observation", "now")
        yield _cut(replace(bare, now=""), "task", "task")
