"""Household games as the trainer asks for them: generated ones, and ALFWorld's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from envs_bridge.actions import ALFWORLD_TAIL
from envs_bridge.environments import Demonstrator, Episode, Spec, TaskRequest, evenly
from envs_bridge.household import lexicon
from envs_bridge.household.dataset import SPLITS, data_folder, survey
from envs_bridge.household.expert import Habits, episodes
from envs_bridge.household.fingerprint import fingerprint
from envs_bridge.household.generate import generate_games
from envs_bridge.turn import Game


def generated_games(request: TaskRequest) -> Mapping[str, list[Game]]:
    """Generated games in the run's folder, made where they are to be made."""
    if not request.generate:
        found = {split: sorted(map(str, (request.folder / split).glob("*/*/game.tw-pddl"))) for split in request.wanted}
        return {split: evenly(found[split], at_most) for split, at_most in request.wanted.items()}
    chosen: dict[str, list[Game]] = {}
    done = 0
    with request.progress("making games", sum(request.wanted.values())) as update:
        for split, count in request.wanted.items():
            if count:
                files = generate_games(
                    request.folder,
                    split=split,
                    count=count,
                    seed=request.seed,
                    level=request.options.level,
                    on_game=partial(_add, update, done),
                )
                chosen[split] = [str(file) for file in files]
                done += count
    return chosen


def _add(update: Callable[[int], None], before: int, made: int) -> None:
    update(before + made)


def alfworld_games(request: TaskRequest) -> Mapping[str, list[Game]]:
    """ALFWorld's own games, evenly chosen from each split."""
    with request.progress("reading games", None) as update:
        found = survey(request.options.data, list(request.wanted), on_game=update)
    request.report(str(found))
    return {split: evenly(found.games[split], at_most) for split, at_most in request.wanted.items()}


def task_type(game: Game) -> str:
    """A game's task type, by the name of its folder."""
    return Path(str(game)).parts[-3].partition("-")[0]


def demonstrations(games: list[Game], how: Demonstrator) -> Iterable[Episode]:
    """Episodes of the demonstrator in the games that our engine plays."""
    habits = Habits(how.search_rate, how.mistake_rate)
    files = [game for game in games if isinstance(game, str)]
    return episodes(files, seed=how.seed, habits=habits, max_turns=how.max_turns)


def engine(options: Any) -> tuple[str, float]:
    """Our engine, or ALFWorld's own, which needs long where many games start at once."""
    return options.engine, 60.0 if options.engine == "fast" else 900.0


def check_data(options: Any) -> None:
    """ALFWorld's games need its data folder."""
    data_folder(options.data)


def words() -> str:
    """Every thing and place that a house may hold, and the numbers they carry."""
    names = {*lexicon.HOLDS, *(thing for things in lexicon.OBJECTS.values() for thing in things)}
    return " ".join([*sorted(names), *map(str, range(1, 31))])


HOUSEHOLD = Spec(
    title="household",
    splits=SPLITS,
    held_out=SPLITS[1:],
    tasks=generated_games,
    kind=task_type,
    worker=engine,
    demonstrations=demonstrations,
    words=words(),
    tail=ALFWORLD_TAIL,
    fingerprint=fingerprint,
)
ALFWORLD = replace(HOUSEHOLD, title="ALFWorld", tasks=alfworld_games, check=check_data)
