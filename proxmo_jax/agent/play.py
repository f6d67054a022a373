"""Play an environment yourself, and keep the episodes as demonstrations.

    proxmo play                                     # a generated household game
    proxmo play --env shop --game 3
    proxmo play --env alfworld --data DIR --keep demonstrations.jsonl

Answer with the number of a command, or with the command itself. Words after a number are kept as the reason for it,
which a language model learns to think. `proxmo train --warm-start.demonstrations FILE` clones solved episodes.
"""

import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.columns import Columns
from rich.console import Console

from envs_bridge.played import append_episode
from envs_bridge.pool import Pool
from envs_bridge.turn import SEARCH_COMMAND, Demonstrated, Game, Observation
from proxmo_jax.agent.panel import TURNS
from proxmo_jax.agent.report import terminal
from proxmo_jax.agent.settings import Config as TrainConfig
from proxmo_jax.agent.settings import EnvSettings, need
from proxmo_jax.agent.tasks import environment, make_pool, tasks_of
from proxmo_jax.errors import UserError

NEEDS_DEVICE = False
NUMBERED = re.compile(r"(\d+)(?:[\s:,.]+(.*))?")
HELP = "a number, and after it your reason if you like; or a command; q leaves"


@dataclass(frozen=True)
class Config:
    """What to play."""

    env: str = "household"
    """household (generated), alfworld (from --data), shop (our engine), webshop (WebShop itself, from --webshop), or
    one of your own."""
    game: int = 0
    """Number of the game in its split, from 0."""
    split: str = ""
    """Split; default: train, the only one whose episodes are kept."""
    data: Path | None = None
    """ALFWorld's data folder (default: $ALFWORLD_DATA), or a shop's files (default: generated products)."""
    level: Literal["easy", "medium", "hard"] = "easy"
    """Size of a generated house."""
    goals: Literal["human", "synthetic"] = "human"
    """A shop's goals: written by people, or every combination of a product's options."""
    seed: int = 0
    """Seed of generated games and products."""
    turns: int = 0
    """Turns after which the episode ends; 0: 50, or 15 in a shop."""
    keep: Path | None = None
    """File of demonstrations (JSON lines) that the episode is added to when it is solved."""
    engine: Literal["fast", "textworld", "textworld-stock"] = "fast"
    """Household engine: ours, or ALFWorld's own."""
    webshop: Path | None = None
    """Checkout of WebShop."""
    python: str = ""
    """Interpreter of the worker process, if the upstream packages live in another one."""


def main(config: Config, console: Console | None = None) -> bool:
    """Play one episode; True, since a lost game is no failure."""
    console = console or terminal()
    need(config.game >= 0 and config.turns >= 0, "--game and --turns must be at least 0")
    with tempfile.TemporaryDirectory(prefix="proxmo-play-") as folder:
        settings = settings_for(config, Path(folder))
        game = find_game(config, settings, console)
        with make_pool(settings) as pool:
            task, turns, last = play(pool, game, settings.rollout.max_turns, console)
    if last.done:
        console.print(f"{'Solved' if last.won else 'Not solved'} in {len(turns)} turns; score {last.reward:g}.")
    else:
        console.print(f"Left after {len(turns)} turns, not solved.")
    if config.keep is not None and last.won:
        append_episode(config.keep, config.env, task, turns)
        use = f"proxmo train --env {config.env} --warm-start.demonstrations {config.keep}"
        console.print(f"{config.keep} holds it: {use}", soft_wrap=True)
    elif config.keep is not None:
        console.print("It is not kept: only solved episodes are demonstrations.")
    return True


def settings_for(config: Config, folder: Path) -> TrainConfig:
    """A training run's settings with this environment; generated games go into `folder`."""
    env = EnvSettings(
        name=config.env, data=config.data, level=config.level, goals=config.goals, engine=config.engine,
        webshop=config.webshop, python=config.python, workers=1,
    )  # fmt: skip
    settings = TrainConfig(env=env, seed=config.seed)
    environment(settings).check(env)
    return dataclasses.replace(
        settings,
        output=dataclasses.replace(settings.output, dir=folder),
        rollout=dataclasses.replace(
            settings.rollout,
            max_turns=config.turns or TURNS.get(config.env, TURNS["shop" if config.env == "webshop" else "household"]),
        ),
    )


def find_game(config: Config, settings: TrainConfig, console: Console) -> Game:
    """The game to play. Raises UserError for a split or number that is not there, and for keeping a held-out game."""
    splits = environment(settings).splits
    split = config.split or splits[0]
    need(split in splits, f"--split must be one of {', '.join(splits)}; got {split!r}")
    need(
        config.keep is None or split == splits[0],
        f"--keep: an episode of {split} is no demonstration, since runs are evaluated on it; need --split {splits[0]}",
    )
    if config.keep is not None:
        place = config.keep.absolute().parent
        need(place.is_dir() and os.access(place, os.W_OK), f"--keep: {place} is no folder that can be written")
    at_most = config.game + 1 if config.env == "household" else sys.maxsize
    games = tasks_of(settings, {split: at_most}, console, generate=True)[split]
    if config.game >= len(games):
        raise UserError(f"--game must be below the {len(games)} games of {split}, got {config.game}")
    return games[config.game]


def play(pool: Pool, game: Game, limit: int, console: Console) -> tuple[str, list[Demonstrated], Observation]:
    """Play one episode.

    Args:
        pool: a worker.
        game: the game.
        limit: turns after which it ends.
        console: the terminal.

    Returns:
        The task in words, the turns, and what was seen last.

    Raises:
        UserError: the game cannot be started, or its worker is lost.
    """
    begun = pool.reset([(0, game)])[0]
    if begun is None:
        raise UserError(f"the game cannot be started: {pool.fault}")
    seen, task = begun
    turns: list[Demonstrated] = []
    console.print(f"Your task: {shown(task)}\n({HELP})")
    while not seen.done and len(turns) < limit:
        console.print(f"\n[{len(turns) + 1} of {limit}, score {seen.reward:g}] {shown(seen.text)}", highlight=False)
        answer = ask(seen.admissible, console)
        if answer is None:
            break
        command, thought = answer
        turns.append(Demonstrated(seen, command, thought))
        after = pool.step([(0, command)])[0]
        if after is None:
            raise UserError(f"the game is lost: {pool.fault}")
        seen = after
    console.print(f"\n{shown(seen.text)}", highlight=False)
    # At the turn limit the episode is over, as in training.
    return task, turns, dataclasses.replace(seen, done=seen.done or len(turns) == limit)


def ask(admissible: Sequence[str], console: Console) -> tuple[str, str] | None:
    """(command, reason) that the player chooses, or None to leave. Asks again for a number that is not listed."""
    lines = [f"{number:3} {shown(command)}" for number, command in enumerate(admissible, 1)]
    console.print(Columns(lines, column_first=True, padding=(0, 2)) if len(lines) > 8 else "\n".join(lines))
    while True:
        typed = read_line("> ", console)
        if typed is None or typed in ("q", "quit"):
            return None
        if not typed:
            continue
        match = NUMBERED.fullmatch(typed)
        if match is None:
            return typed, ""
        number, reason = int(match.group(1)), (match.group(2) or "").strip()
        if not 1 <= number <= len(admissible):
            console.print(f"There is no {number}; need 1 to {len(admissible)}, or a command.")
            continue
        command = admissible[number - 1]
        if command != SEARCH_COMMAND:
            return command, reason
        words = read_line("search for: ", console)
        if words is None:
            return None
        if words:
            return f"search[{re.sub(r'[][]', ' ', words)}]", reason


def read_line(prompt: str, console: Console) -> str | None:
    """A line that is typed, stripped; None at the end of the input."""
    try:
        return console.input(prompt, markup=False).strip()
    except EOFError:
        console.print()
        return None


def shown(text: str) -> str:
    """The text without characters that a terminal would obey; line breaks stay."""
    return "".join(c if c == "\n" or c.isprintable() else "?" for c in text)
