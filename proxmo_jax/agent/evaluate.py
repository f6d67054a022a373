"""Success of a trained run on games it did not train on: a table by task type and split, as in the paper.

    proxmo eval runs/household                         # the newest checkpoint on the run's held-out games
    proxmo eval runs/household --env alfworld --data DIR --greedy
    proxmo eval runs/shop                              # mean score and success, as WebShop counts them

The sampling temperature is the published one, 0.4. Counts and 95% intervals (Wilson) stand beside every rate; all of it
goes into a JSON file, too.
"""

import dataclasses
import functools
import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from envs_bridge.errors import UserError as EnvironmentUserError
from envs_bridge.household.game import TASK_TYPES
from envs_bridge.pool import Pool
from envs_bridge.turn import Game
from proxmo_jax.agent.make_player import (
    fresh_params,
    make_player,
    new_state,
    pretrained_params,
    run_optimizer,
    untrained_params,
    warm_params,
)
from proxmo_jax.agent.player import Player
from proxmo_jax.agent.report import bootstrap, progress_bar, terminal, wilson
from proxmo_jax.agent.rollout import collect
from proxmo_jax.agent.run_files import stored_config
from proxmo_jax.agent.settings import Config as TrainConfig
from proxmo_jax.agent.settings import check, has_warm_start
from proxmo_jax.agent.tasks import environment, make_pool, tasks_of
from proxmo_jax.errors import UserError
from proxmo_jax.policy import adapters
from proxmo_jax.policy.sharding import make_mesh
from proxmo_jax.training.checkpoint import Checkpoints

PLACES = ("data", "webshop", "engine", "python", "workers")
COLUMNS = dict(zip(TASK_TYPES, ("Pick", "Look", "Clean", "Heat", "Cool", "Pick2"), strict=True))  # the paper's names


@dataclass(frozen=True)
class Config:
    """What to evaluate, where, and how."""

    run: tyro.conf.Positional[Path]
    """Folder of a training run."""
    checkpoint: int | None = None
    """Iteration of the checkpoint (default: the newest); 0 is the warm start."""
    env: str | None = None
    """household (the run's own held-out games), alfworld or shop (those of --data), or webshop; default: as the run was
    trained."""
    data: Path | None = None
    """ALFWorld's data folder; default: the run's, or $ALFWORLD_DATA."""
    webshop: Path | None = None
    """Checkout of WebShop, for --env webshop; default: the run's."""
    engine: Literal["fast", "textworld", "textworld-stock"] | None = None
    """fast, textworld or textworld-stock; default: the run's."""
    python: str | None = None
    """Interpreter for the workers; default: the run's."""
    splits: tuple[str, ...] = ()
    """Default: valid_seen and valid_unseen, or of a shop valid; it also has test, and all have train."""
    games: int = 0
    """Games of each split at most, evenly spread over it; 0: all."""
    temperature: float = 0.4
    greedy: bool = False
    """Take the likeliest token instead of sampling."""
    seed: int = 0
    batch: int = 64
    """Episodes played side by side."""
    workers: int | None = None
    out: Path | None = None
    """JSON file to write; default: eval.json in the run's folder."""


def main(config: Config, console: Console | None = None) -> dict:
    """Evaluate, print the table, write the JSON; returns what was written."""
    console = console or terminal()
    stored = run_settings(config)
    games = held_out_games(config, stored, console)
    mesh = make_mesh(0, stored.mesh.fsdp, stored.mesh.tensor)
    player = make_player(stored, mesh)
    player.decoding = dataclasses.replace(player.decoding, greedy=config.greedy)
    player.say = functools.cache(partial(console.print, markup=False, highlight=False, soft_wrap=True))  # each once
    params, iteration = trained_params(config, stored, player)
    temperature = 0.0 if config.greedy else config.temperature
    began = time.time()
    with make_pool(stored) as pool:
        results = {
            split: play(config, player, params, pool, games[split], split, stored.output.eval_turns, console)
            for split in games
        }
    answer = {
        "run": str(config.run),
        "iteration": iteration,
        "temperature": temperature,
        "seed": config.seed,
        "env": stored.env.name,
        "engine": stored.env.engine,
        "seconds": round(time.time() - began, 1),
        "splits": {
            split: rates([environment(stored).kind(game) for game in games[split]], *result)
            for split, result in results.items()
        },
    }
    console.print(table(answer))
    target = config.out or config.run / "eval.json"
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    temporary.replace(target)
    console.print(f"{target} holds these numbers.")
    return answer


def run_settings(config: Config) -> TrainConfig:
    """The run's settings with what is asked for here in their place. Raises UserError for what cannot be."""
    if not (config.run / "config.json").is_file():
        raise UserError(f"{config.run} holds no run (no config.json)")
    if config.batch < 1 or config.games < 0:
        raise UserError(f"--batch must be at least 1 and --games at least 0, got {config.batch} and {config.games}")
    if config.temperature <= 0:
        raise UserError(f"--temperature must be > 0, got {config.temperature} (--greedy takes the likeliest token)")
    stored = stored_config(config.run)
    asked = {"name": config.env, **{name: getattr(config, name) for name in PLACES}}
    try:
        env = dataclasses.replace(stored.env, **{name: value for name, value in asked.items() if value is not None})
        stored = dataclasses.replace(stored, env=env)
        check(stored)
    except (UserError, EnvironmentUserError) as error:
        takes = "--env, --data, --webshop, --engine, --python and --workers"
        raise UserError(f"{config.run}: {error} ({takes} can be given here; the rest is in its config.json)") from error
    known = environment(stored).splits
    if unknown := sorted(set(config.splits) - set(known)):
        raise UserError(f"--splits must be of {', '.join(known)}; got {', '.join(unknown)}")
    return stored


def held_out_games(config: Config, stored: TrainConfig, console: Console) -> dict[str, list[Game]]:
    """Games by split. Raises UserError if there are none."""
    splits = config.splits or environment(stored).held_out
    games = tasks_of(stored, dict.fromkeys(splits, config.games or sys.maxsize), console)
    chosen = {split: files for split, files in games.items() if files}
    if not chosen:
        raise UserError(f"{config.run}: no game in {', '.join(splits)}")
    return chosen


def trained_params(config: Config, stored: TrainConfig, player: Player):
    """(parameters, iteration) of a checkpoint, or of the warm start for iteration 0."""
    checkpoints = Checkpoints(config.run / "checkpoints")
    try:
        steps = checkpoints.steps()
        wanted = config.checkpoint if config.checkpoint is not None else max(steps, default=0)
        if wanted == 0:
            untrained = untrained_params(stored, player, jax.random.key(0))
            return warm_params(config.run, untrained) if has_warm_start(stored) else untrained, 0
        if wanted not in steps:
            there = ", ".join(map(str, [0, *steps]))
            raise UserError(f"--checkpoint: {config.run} has none of iteration {wanted}; it has {there}")
        key = jax.random.key(0)
        start = pretrained_params(stored, player) if stored.model.lora_rank else fresh_params(player, key)
        state = new_state(player, start, run_optimizer(stored))
        learned = checkpoints.restore(state, wanted)[0].params
        return adapters.join(adapters.split(start)[0], learned), wanted
    finally:
        checkpoints.close()


def play(
    config: Config, player: Player, params, pool: Pool, games: list[Game], split: str, turns: int, console: Console
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(won bool, finished bool, score float32) of every game of a split, a batch at a time; `turns` as in `collect`."""
    won, finished, score = np.zeros(len(games), bool), np.zeros(len(games), bool), np.zeros(len(games), np.float32)
    key = jax.random.key(config.seed)
    with progress_bar(console) as bar:
        task = bar.add_task(split, total=len(games), note="")
        for start in range(0, len(games), config.batch):
            part = slice(start, start + config.batch)
            rollout = collect(
                player,
                params,
                pool,
                games[part],
                jax.random.fold_in(key, start),
                temperature=0.0 if config.greedy else config.temperature,
                turns=turns,
            )
            won[part], finished[part], score[part] = rollout.won, rollout.finished, rollout.score
            bar.update(task, completed=min(start + config.batch, len(games)), note=f"{won.sum()} solved")
    return won, finished, score


def rates(kind_of: list[str], won: np.ndarray, finished: np.ndarray, score: np.ndarray) -> dict[str, dict]:
    """Wins, games, rate and interval by the paper's columns (a shop's categories) and All, and a shop's mean score;
    games that could not be played are left out."""
    kinds = np.array(kind_of)
    household = set(kinds) <= set(COLUMNS)
    names = COLUMNS if household else {kind: kind for kind in sorted(set(kinds))}
    answer: dict[str, dict] = {}
    for name, chosen in [*((name, kinds == kind) for kind, name in names.items()), ("All", np.ones(len(kinds), bool))]:
        wins, count = int(won[chosen & finished].sum()), int((chosen & finished).sum())
        low, high = wilson(wins, count)
        answer[name] = {
            "wins": wins,
            "games": count,
            "rate": wins / count if count else None,
            "low": low,
            "high": high,
        }
    answer["All"]["lost"] = int((~finished).sum())
    if not household and finished.any():
        mean, low, high = bootstrap(score[finished])
        answer["Score"] = {"mean": mean, "low": low, "high": high, "games": int(finished.sum())}
    return answer


def table(answer: dict) -> Table:
    """The paper's table: a row for each split, percent with counts and intervals."""
    how = "greedy" if answer["temperature"] == 0 else f"temperature {answer['temperature']:g}"
    grid = Table(title=f"{answer['run']}, iteration {answer['iteration']}, {how}; percent, won/played, 95% interval")
    grid.add_column("split")
    names = list(dict.fromkeys(name for cells in answer["splits"].values() for name in cells))
    for name in names:
        grid.add_column("Succ." if name == "All" and "Score" in names else name, justify="right")
    for split, cells in answer["splits"].items():
        texts = [
            f"{100 * c['mean']:.1f}\n\n{100 * c['low']:.0f}-{100 * c['high']:.0f}"
            if "mean" in c
            else f"{100 * c['rate']:.1f}\n{c['wins']}/{c['games']}\n{100 * c['low']:.0f}-{100 * c['high']:.0f}"
            if c["games"]
            else "-"
            for c in (cells.get(name, {"games": 0}) for name in names)
        ]
        grid.add_row(split, *texts, end_section=True)
    return grid
