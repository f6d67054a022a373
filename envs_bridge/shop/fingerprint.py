"""What identifies a shop's goal: a hash of the goal and of the catalogue it is played on, and one of what is asked."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from envs_bridge.shop.catalogue import NO_LIMIT
from envs_bridge.shop.engine import opened
from envs_bridge.text import digest
from envs_bridge.turn import Goal

PRICE = ", and price lower than "


def fingerprint(game: Goal) -> dict[str, Any]:
    """What a panel records of a goal.

    Args:
        game: a goal of a prepared catalogue.

    Returns:
        name: its place in the order of the goals. content: a hash of the goal with its price limit, and of every
        product and price of the catalogue, which decide searches and rewards. world: a hash of product, attributes,
        options and instruction without the price limit. instruction: with the limit. product: its ASIN. price_limit:
        in dollars; None: there is none.
    """
    goal = {name: value for name, value in opened(game.folder).goal(game.number).items() if name != "weight"}
    text, limit = goal["instruction_text"], goal["price_upper"]
    asked = [goal["asin"], goal["attributes"], goal["goal_options"], text.partition(PRICE)[0]]
    return {
        "name": f"goal {game.number}",
        "content": digest([goal, catalogue_hash(game.folder)]),
        "world": digest(asked),
        "instruction": text,
        "product": goal["asin"],
        "price_limit": None if limit >= NO_LIMIT else limit,
    }


@functools.lru_cache(maxsize=8)
def catalogue_hash(folder: str) -> str:
    """The hash of a prepared catalogue's products and prices, in their order."""
    parts = []
    for name in ("products.jsonl", "prices.npy"):
        with (Path(folder) / name).open("rb") as file:
            parts.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digest(parts)
