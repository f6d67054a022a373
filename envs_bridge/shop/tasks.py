"""A shop's goals as the trainer asks for them: of our engine's catalogues, and of WebShop itself."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from envs_bridge.actions import WEBSHOP_TAIL
from envs_bridge.environments import Demonstrator, Episode, Spec, TaskRequest, evenly
from envs_bridge.errors import UserError
from envs_bridge.shop import upstream
from envs_bridge.shop.catalogue import SPLITS, Catalogue, prepare, splits
from envs_bridge.shop.engine import Shopping
from envs_bridge.shop.expert import episodes
from envs_bridge.shop.fingerprint import fingerprint
from envs_bridge.shop.generate import FILES, generate_catalogue
from envs_bridge.shop.notes import ShopNotes
from envs_bridge.turn import Game, Goal


def shop_goals(request: TaskRequest) -> Mapping[str, list[Game]]:
    """Goals of the prepared catalogue, evenly chosen from each split."""
    folder = catalogue_folder(request)
    catalogue = Catalogue(folder)

    def goal(number: int) -> Goal:
        return Goal(str(folder), number, catalogue.goal(number)["category"])

    return {
        split: [goal(int(i)) for i in evenly(list(catalogue.splits[split]), at_most)]
        for split, at_most in request.wanted.items()
    }


def catalogue_folder(request: TaskRequest) -> Path:
    """The prepared catalogue of the data folder, or one of generated products in the run's folder."""
    if request.options.data is None:
        data = cache = request.folder
        if not all((data / name).is_file() for name in FILES):
            generate_catalogue(data, seed=request.seed)
    else:
        data, cache = request.options.data, None
    with request.progress("reading products", None) as update:
        return prepare(data, request.options.goals, update, cache)


def webshop_goals(request: TaskRequest) -> Mapping[str, list[Game]]:
    """WebShop's goals, evenly chosen from each split of their one order."""
    options = request.options
    count = upstream.count_goals(options.python or sys.executable, options.webshop, options.goals)
    request.report(f"WebShop in {options.webshop}: {count} goals")
    numbers = splits(count)
    return {
        split: [Goal(str(options.webshop), int(i), options.goals) for i in evenly(list(numbers[split]), at_most)]
        for split, at_most in request.wanted.items()
    }


def kind(game: Game) -> str:
    """A goal's kind: its product category."""
    assert isinstance(game, Goal)
    return game.kind


def demonstrations(games: list[Game], how: Demonstrator) -> Iterable[Episode]:
    """Episodes of the demonstrator in our engine."""
    sessions = (Shopping.load(game) for game in games if isinstance(game, Goal))
    return episodes(sessions, seed=how.seed, mistake_rate=how.mistake_rate, max_turns=how.max_turns)


def check_webshop(options: Any) -> None:
    """WebShop itself needs a checkout."""
    if options.webshop is None:
        raise UserError("--env webshop needs --env.webshop DIR, a checkout of WebShop")


SHOP = Spec(
    title="shop",
    splits=SPLITS,
    held_out=("valid",),
    tasks=shop_goals,
    kind=kind,
    worker=lambda options: ("shop", 60.0),
    demonstrations=demonstrations,
    notes=ShopNotes.start,
    words=" ".join(f"{number:02d}" for number in range(100)),
    tail=WEBSHOP_TAIL,
    scored=True,
    fingerprint=fingerprint,
)
WEBSHOP = replace(
    SHOP,
    title="WebShop",
    tasks=webshop_goals,
    worker=lambda options: ("webshop", 900.0),
    demonstrations=None,
    check=check_webshop,
    fingerprint=None,
)
