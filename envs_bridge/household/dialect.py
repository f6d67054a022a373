"""The version of ALFWorld's domain and grammar in a game file, and whether our engine implements it.

Game files contain the rules (`pddl_domain`) and the texts (`grammar`) of the game. Our engine implements those of
ALFWorld's releases up to 0.4.2 and of our generator. It recognises them by hashes that ignore white space and comments,
since files that look alike may play differently.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import dataclass

from envs_bridge.errors import UserError

# Receptacles that clean, by domain. ALFWorld's games first allowed a sink, later only its basin.
SINKS = {
    "2bb2c5c7591b": ("sinktype", "sinkbasintype"),  # before alfworld 0.3.2
    "6eca02b13b27": ("sinkbasintype",),  # 0.3.2 to 0.3.5
    "da18d44ab1bc": ("sinkbasintype",),  # 0.4.0 to 0.4.2
    "f375f3e42423": ("sinkbasintype",),  # household.pddl
}
# The wording for putting objects down, by grammar: "move X to Y" since December 2024, "put X in/on Y" before.
WORDINGS = {
    "2d3167f12452": "put",  # up to 0.3.5
    "160460f60286": "move",  # 0.4.0 to 0.4.2
    "77716ca8211d": "move",  # household.twl2
}
TASK = re.compile(r'"rhs":\s*("Your task is to: (?:[^"\\]|\\.)*")')
HELP = re.compile(r'"help\.feedback":\s*\[\s*\{\s*"rhs":\s*("(?:[^"\\]|\\.)*")')


class GameFileError(UserError):
    """A game file that cannot be played; the message names the file and what is wrong with it."""


class ForeignGame(GameFileError):
    """A game file whose domain, grammar or goal our engine does not implement; ALFWorld's engine may."""


@dataclass(frozen=True)
class Dialect:
    """wording: "move" or "put". sinks: receptacle types that clean. task, help_text: as in the grammar."""

    wording: str
    sinks: tuple[str, ...]
    task: str
    help_text: str


def read_dialect(domain: str, grammar: str) -> Dialect:
    """The dialect of a game. Raises ForeignGame."""
    found = TASK.search(grammar)
    if not found:
        raise ForeignGame('its grammar has no "Your task is to: ..." text')
    sinks = SINKS.get(domain_hash(domain))
    if sinks is None:
        raise ForeignGame(f"its pddl_domain (hash {domain_hash(domain)}) is not one our engine implements")
    general = grammar[: found.start(1)] + grammar[found.end(1) :]
    wording = WORDINGS.get(grammar_hash(general))
    if wording is None:
        raise ForeignGame(f"its grammar (hash {grammar_hash(general)}) is not one our engine implements")
    helped = HELP.search(grammar)
    # TextWorld passes a block of the grammar to a JSON reader unchanged, so its escapes are those of JSON.
    # The engine's grammar reader drops white space before a text.
    task, help_text = json.loads(found.group(1)).strip(), json.loads(helped.group(1)).lstrip() if helped else ""
    return Dialect(wording, sinks, task, help_text)


@functools.lru_cache(maxsize=16)
def domain_hash(domain: str) -> str:
    """The hash of a PDDL domain, without comments, case and white space."""
    return _hash(re.sub(r";[^\n]*", "", domain).lower())


@functools.lru_cache(maxsize=16)
def grammar_hash(grammar: str) -> str:
    """The hash of a grammar without its task and white space."""
    return _hash(grammar)


def _hash(text: str) -> str:
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:12]
