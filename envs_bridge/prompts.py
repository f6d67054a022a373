"""The policy's prompts. A prompt is rebuilt every turn from the task and a memory of the episode.

There are two memories: `Notes` for small policies, parsed from the household's texts (unvisited places, contents of
visited ones, the object in hand), and `History` for language models, as published (the last turns, the observation, the
admissible actions). A prompt that is too long loses the least important parts first, the task last.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, TypeVar

from envs_bridge.turn import Observation

# The given beginning of a small policy's response: an empty thought, so that it generates only a command.
ANSWER_START = "<think></think><action>"
NOTHING = "Nothing happens."
CLOSED = "closed"  # the content of a place that was seen closed
_ROOM = re.compile(r"Looking quickly around you, you see (.*?)\.(?:\n|$)", re.S)
_CONTENTS = re.compile(r"(?:On the [^,.]+|In it), you see ([^.]*)\.")
_TAKEN = re.compile(r"You pick up the (.+) from the ")
_PLACED = re.compile(r"You (?:move|put) the (.+) (?:to|in/on) the ")
_CHANGED = re.compile(r"You (heat|clean|cool) the (.+) using the ")
_STATES = {"heat": "hot", "clean": "clean", "cool": "cool"}
# Where a text may be cut: after a word of ASCII letters and digits, or after any other character with its combining
# marks (accents, joined emoji, flags). Long runs without a space are cut, too.
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
    """Positions where a text may be cut, including its start and end.

    None is within a word of at most 24 ASCII letters and digits, or within a character of several code points.
    """
    return [0, *(piece.end() for piece in _PIECE.finditer(text))]


def readable(text: str) -> str:
    """The text with `?` for each lone surrogate, which JSON can represent and tokenizers reject."""
    return text.encode("utf-8", "replace").decode()


class Memory(Protocol):
    """The memory of one trajectory, from which its next prompt is built."""

    def remember(self, command: str, seen: Observation) -> None:
        """Add a command and the observation after it."""

    def prompt(self) -> str: ...

    def shortened(self) -> Iterator[Cut]:
        """The cuts of a prompt that is too long, the least important first.

        Each cut starts from the prompt without what the previous cuts removed; the last cut is that of the task.
        """

    def copy(self) -> "Memory": ...


Kept = TypeVar("Kept", "Notes", "History")


def _cut(memory: Kept, what: str, name: str) -> Cut:
    """The cut of a text field, which keeps its beginning."""
    text = getattr(memory, name)
    ends = piece_ends(text)
    return Cut(what, len(ends) - 1, lambda n: replace(memory, **{name: text[: ends[n]]}).prompt())


@dataclass
class Notes:
    """Notes on one trajectory. `places` maps each place to its last known content (None: not visited yet)."""

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
        """Add a command and the observation after it."""
        observation = seen.text
        self.last = command
        if observation == NOTHING:  # the state is unchanged, so earlier notes remain valid
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
        """A short prompt for small policies: task, notes, current observation.

        Every unvisited place follows its own `new`, and every object precedes its place, so that the adjacent word
        tells the role of a name: two layers of attention can look that up.
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
        """Drop notes on places (oldest first), unvisited places, the end of the observation, the end of the task."""
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
    """The last turns of a trajectory, verbatim. The content follows the official code's prompts, the wording is ours.

    task: the task. now: the current observation. admissible: its actions. kept: how many turns are kept. list_actions:
    whether the prompt lists the admissible actions. turns: (observation, action) pairs. taken: turns so far.
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
        """The history before the first turn, with the task removed from the end of the observation."""
        now = seen.text.removesuffix(f"Your task is to: {task}").rstrip()
        return cls(task, now, seen.admissible, kept, list_actions)

    def remember(self, command: str, seen: Observation) -> None:
        """Add the current observation and the command to the turns, and set the new observation."""
        self.turns = (*self.turns, (self.now, command))[-self.kept :] if self.kept else ()
        self.taken += 1
        self.now, self.admissible = seen.text, seen.admissible

    def copy(self) -> "History":
        return replace(self)

    def prompt(self) -> str:
        """Instruction, task, the last turns, the current observation, the admissible actions, the response format."""
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
        """Drop the past turns (as published for WebShop), the list of actions, the end of the observation, the end of
        the task."""
        alone = replace(self, turns=())
        yield Cut("turns", 0, lambda _: alone.prompt())
        bare = replace(alone, list_actions=False)
        yield Cut("actions", 0, lambda _: bare.prompt())
        yield _cut(bare, "observation", "now")
        yield _cut(replace(bare, now=""), "task", "task")
