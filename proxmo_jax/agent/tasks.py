"""What a run plays: its games, the workers that play them, demonstrations, and which kind a game is.

A household game is named by its file, a shop's by a `Goal`.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from envs_bridge.household import expert as household_expert
from envs_bridge.household.dataset import SPLITS, survey
from envs_bridge.household.generate import generate_games
from envs_bridge.pool import Pool
from envs_bridge.prompts import History, Memory, Notes
from envs_bridge.shop import catalogue as shop
from envs_bridge.shop import expert as shop_expert
from envs_bridge.shop import upstream
from envs_bridge.shop.engine import Shopping
from envs_bridge.shop.generate import FILES, generate_catalogue
from envs_bridge.shop.notes import ShopNotes
from envs_bridge.turn import Game, Goal, Observation
from proxmo_jax.agent.report import progress_bar
from proxmo_jax.agent.settings import SHOPS, Config
from proxmo_jax.errors import UserError

SPLITS_OF = {"household": SPLITS, "alfworld": SPLITS, "shop": shop.SPLITS, "webshop": shop.SPLITS}
HELD_OUT = {"household": SPLITS[1:], "alfworld": SPLITS[1:], "shop": ("valid",), "webshop": ("valid",)}


def make_games(config: Config, console: Console) -> tuple[list[Game], list[Game]]:
    """Training games, and held-out ones: of houses half new games in known houses, half in houses never trained in; of
    a shop the goals of its validation range."""
    names = HELD_OUT[config.env]
    share = config.eval_games // len(names)
    wanted = {"train": config.train_games, names[0]: share, names[-1]: config.eval_games - share * (len(names) - 1)}
    if config.env == "household":
        chosen = household_games(config, wanted, console)
    else:
        chosen = stored_games(config, wanted, console)
    held_out = [game for split in names for game in chosen.get(split, [])]
    if not chosen["train"] or not held_out:
        found = ", ".join(f"{split} {len(games)}" for split, games in chosen.items()) or "none"
        raise UserError(f"--data: need games in train, and in {' or '.join(names)}; found {found}")
    return chosen["train"], held_out


def household_games(config: Config, wanted: Mapping[str, int], console: Console) -> dict[str, list[Game]]:
    """So many generated games of each split, in the run's folder."""
    chosen: dict[str, list[Game]] = {}
    with progress_bar(console) as bar:
        task = bar.add_task("making games", total=sum(wanted.values()), note="")
        for split, count in wanted.items():
            if count:
                files = generate_games(
                    config.out / "games", split=split, count=count, seed=config.seed, level=config.level,
                    on_game=lambda _: bar.update(task, advance=1),
                )  # fmt: skip
                chosen[split] = [str(file) for file in files]
    return chosen


def stored_games(config: Config, wanted: Mapping[str, int], console: Console) -> dict[str, list[Game]]:
    """At most so many games of each split, evenly spread over it; of a run's own household those it has generated."""
    if config.env == "webshop":
        count = upstream.count_goals(config.python or sys.executable, config.webshop, config.goals)
        console.print(f"WebShop in {config.webshop}: {count} goals", markup=False, highlight=False, soft_wrap=True)
        return {
            split: [Goal(str(config.webshop), int(i), config.goals) for i in evenly(shop.splits(count)[split], at_most)]
            for split, at_most in wanted.items()
        }
    if config.env == "shop":
        folder = shop_folder(config, console)
        catalogue = shop.Catalogue(folder)

        def name(i: int) -> Goal:
            return Goal(str(folder), i, catalogue.goal(i)["category"])

        return {split: [name(i) for i in evenly(catalogue.splits[split], at_most)] for split, at_most in wanted.items()}
    if config.env == "alfworld":
        found: Mapping[str, list[str]] = alfworld_games(config.data, list(wanted), console)
    else:
        folder = config.out / "games"
        found = {split: sorted(map(str, (folder / split).glob("*/*/game.tw-pddl"))) for split in wanted}
    return {split: evenly(found[split], at_most) for split, at_most in wanted.items()}


def shop_folder(config: Config, console: Console) -> Path:
    """The prepared catalogue of --data, or one of invented products, made in the run's folder."""
    if config.data is None:
        data = cache = config.out / "games"
        if not all((data / name).is_file() for name in FILES):
            generate_catalogue(data, seed=config.seed)
    else:
        data, cache = config.data, None
    with progress_bar(console) as bar:
        task = bar.add_task("reading products", total=None, note="")
        return shop.prepare(data, config.goals, lambda count: bar.update(task, completed=count), cache)


def alfworld_games(data: Path | None, splits: Sequence[str], console: Console) -> dict[str, list[str]]:
    """ALFWorld's games by split, with what there is to say about them."""
    with progress_bar(console) as bar:
        task = bar.add_task("reading games", total=None, note="")
        found = survey(data, splits, on_game=lambda count: bar.update(task, completed=count))
    console.print(str(found), markup=False, highlight=False, soft_wrap=True)
    return found.games


def evenly(games: Sequence, count: int) -> list:
    """At most `count` of them, evenly spread over the (sorted) list, so that no task type is left out."""
    return [games[i] for i in np.linspace(0, len(games) - 1, min(count, len(games))).round().astype(int)]


def make_pool(config: Config) -> Pool:
    """The workers; upstream engines need longer, above all where many games start at once."""
    engine = config.env if config.env in SHOPS else config.engine
    return Pool(
        config.workers,
        python=config.python or sys.executable,
        engine=engine,
        block=config.members,
        timeout=config.worker_timeout or (60.0 if engine in ("fast", "shop") else 900.0),
    )


def kind_of(game: Game) -> str:
    """A household game's task type, by its folder's name; a goal's kind."""
    if isinstance(game, Goal):
        return game.kind
    return Path(game).parts[-3].partition("-")[0]


def demonstrated(
    config: Config, games: Sequence[Game], mistake_rate: float
) -> Iterable[tuple[str, list[tuple[Observation, str]]]]:
    """(task, turns) of a demonstrated episode for each game that our engines play."""
    turns = 2 * config.max_turns
    if config.env == "shop":
        return shop_expert.episodes(
            (Shopping.load(game) for game in games if isinstance(game, Goal)),
            seed=config.seed,
            mistake_rate=mistake_rate,
            max_turns=turns,
        )
    habits = household_expert.Habits(config.search_rate, mistake_rate)
    files = [game for game in games if isinstance(game, str)]
    return household_expert.episodes(files, seed=config.seed, habits=habits, max_turns=turns)


def memory_of(config: Config) -> Callable[[str, Observation], Memory]:
    """What begins the memory of an episode, from which its prompts are written."""
    if config.prompt == "notes":
        return ShopNotes.start if config.env in SHOPS else Notes.start
    return lambda task, seen: History.start(task, seen, kept=config.history, list_actions=config.list_actions)
