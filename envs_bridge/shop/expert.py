"""A demonstrator for the shop: it searches by the instruction, opens the first matching result, chooses the options and
buys. It knows the fields of the goal, but of the products only what the pages show."""

import random
import re
from collections.abc import Iterable, Iterator, Sequence

from envs_bridge.shop.engine import Shopping
from envs_bridge.shop.notes import ShopNotes
from envs_bridge.turn import SEARCH_COMMAND, Demonstrated, bracketed

_PRICE = re.compile(r" (\d+)$")


def next_command(world: Shopping, notes: ShopNotes) -> str:
    """The demonstrator's next command."""
    goal, page = world.goal, notes.page
    if SEARCH_COMMAND in page.admissible:
        return f"search[{wanted_words(world)}]"
    if "click[buy now]" in page.admissible:
        for name, values in notes.options().items():
            if name not in notes.chosen:
                fitting = [value for value in values if value in _options(goal)]
                if fitting:
                    return f"click[{fitting[0]}]"
        return "click[buy now]"
    rows = notes.rows()
    if not rows:
        return "click[back to search]" if "click[< prev]" not in page.admissible else "click[< prev]"
    return f"click[{best_row(world, rows).partition(' ')[0].lower()}]"


def why(command: str, notes: ShopNotes) -> str:
    """The reason for a command of `next_command`, in a sentence."""
    name, label = bracketed(command)
    if name == "search":
        return "I search for what the instruction names."
    if label == "buy now":
        return "Nothing is left to choose, so I buy it."
    if label in ("back to search", "< prev"):
        return "No product is listed here, so I go back."
    for option, values in notes.options().items():
        if label in values:
            return f"The instruction asks for {option} {label}."
    return f"{label} has the best title within the price."


def wanted_words(world: Shopping) -> str:
    """Attributes and product type in the words of the instruction: the part before its options."""
    words = re.sub(r"^.*?\b(?:a|an|me) ", "", world.task.partition(" in ")[0].lower())
    return " ".join(re.sub(r"[\[\]]", " ", words).split())  # brackets would end the search


def _options(goal: dict) -> list[str]:
    """The values of the goal's options."""
    return [option if isinstance(option, str) else option[1] for option in goal["goal_options"]]


def best_row(world: Shopping, rows: Sequence[str]) -> str:
    """The first result within the price limit with the most attributes in its title."""

    def rank(row: str) -> tuple[bool, int]:
        price = _PRICE.search(row)
        within = price is None or int(price.group(1)) < world.goal["price_upper"]
        return within, sum(attribute in row.lower() for attribute in world.goal["attributes"])

    return max(rows, key=rank)


def demonstrate(world: Shopping, rng: random.Random, mistake_rate: float, *, max_turns: int) -> list[Demonstrated]:
    """Play one episode and return its turns; `mistake_rate` of them are careless."""
    seen = world.reset()
    notes, turns = ShopNotes.start(world.task, seen), []
    for _ in range(max_turns):
        command = next_command(world, notes)
        thought = why(command, notes)
        if rng.random() < mistake_rate:
            command = careless(command, notes, rng)
            thought = f"Let me {command}."
        turns.append(Demonstrated(seen, command, thought))
        seen = world.step(command)
        notes.remember(command, seen)
        if seen.done:
            break
    return turns


def careless(command: str, notes: ShopNotes, rng: random.Random) -> str:
    """A careless command: a search of two words, a random result, a premature purchase or a needless click."""
    if command.startswith("search["):
        words = command[7:-1].split()
        return f"search[{' '.join(words[-2:])}]"
    if rows := notes.rows():
        return f"click[{rng.choice(rows).partition(' ')[0].lower()}]"
    if command == "click[buy now]":
        return command
    return rng.choice(["click[buy now]", "click[description]"])


def episodes(
    worlds: Iterable[Shopping], *, seed: int, mistake_rate: float, max_turns: int
) -> Iterator[tuple[str, list[Demonstrated]]]:
    """Yield (task, turns) of a demonstrated episode in each environment."""
    for i, world in enumerate(worlds):
        yield world.task, demonstrate(world, random.Random(f"{seed}/{i}"), mistake_rate, max_turns=max_turns)
