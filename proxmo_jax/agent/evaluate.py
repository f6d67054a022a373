"""Success of a trained run on games it did not train on: a table by task type and split, as in the paper.

    proxmo eval runs/household                         # the newest checkpoint on the run's held-out games
    proxmo eval runs/household --env alfworld --data DIR --greedy
    proxmo eval runs/shop                              # mean score and success, as WebShop counts them
    proxmo eval RUN --panel FILE                       # on a fixed panel (proxmo panel), task by task
    proxmo eval RUN --panel FILE --against OTHER.json  # and compared with another result, pair by pair
    proxmo eval RUN.json --against OTHER.json          # two results, nothing played

The sampling temperature is the published one, 0.4. Counts and 95% intervals (Wilson) stand beside every rate; all of it
goes into a JSON file, too.
"""

import dataclasses
import functools
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
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
from proxmo_jax.agent import paired
from proxmo_jax.agent.make_player import (
    fresh_params,
    make_player,
    new_state,
    pretrained_params,
    run_optimizer,
    untrained_params,
    warm_params,
)
from proxmo_jax.agent.panel import (
    Panel,
    panel_games,
    read_panel,
    refuse_shared,
    training_of,
    with_panel,
)
from proxmo_jax.agent.player import Player
from proxmo_jax.agent.report import bootstrap, progress_bar, terminal, wilson
from proxmo_jax.agent.rollout import NothingPlayed, collect
from proxmo_jax.agent.run_files import of_another_run, stored_config
from proxmo_jax.agent.settings import Config as TrainConfig
from proxmo_jax.agent.settings import check, for_playing, has_warm_start
from proxmo_jax.agent.tasks import environment, make_pool, tasks_of
from proxmo_jax.errors import UserError
from proxmo_jax.paths import write_whole
from proxmo_jax.policy import adapters
from proxmo_jax.policy.sharding import make_mesh
from proxmo_jax.training.checkpoint import Checkpoints

PLACES = ("data", "webshop", "engine", "python", "workers")
COLUMNS = dict(zip(TASK_TYPES, ("Pick", "Look", "Clean", "Heat", "Cool", "Pick2"), strict=True))  # the paper's names


@dataclass(frozen=True)
class Config:
    """What to evaluate, where, and how."""

    run: tyro.conf.Positional[Path]
    """Folder of a training run; with --against, it may be the JSON file of an evaluation, and nothing is played."""
    checkpoint: int | Literal["best"] | None = None
    """Iteration of the checkpoint, or best: the best one in the run's evaluations (default: the newest); 0 is the warm
    start."""
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
    """Seed of sampling; a panel has its own."""
    batch: int = 64
    """Episodes played side by side."""
    workers: int | None = None
    """Worker processes; default: the run's."""
    out: Path | None = None
    """JSON file to write; default: eval.json in the run's folder."""
    panel: Path | None = None
    """A fixed panel (proxmo panel): its tasks, seeds and turn limit in place of the run's held-out games."""
    against: Path | None = None
    """The JSON file of another evaluation on the same panel, to compare with pair by pair."""


def main(config: Config, console: Console | None = None) -> dict:
    """Evaluate, print the table, write the JSON; returns what was written, or the comparison of two files."""
    console = console or terminal()
    if config.against is None:
        return evaluate(config, console)
    if not config.run.is_file():
        if config.panel is None:
            raise UserError("--against compares results on a panel; name it with --panel")
        temperature = 0.0 if config.greedy else config.temperature
        if config.against.resolve() == target_of(config).resolve():
            raise UserError(f"--against: {config.against} is what this evaluation writes; name another file with --out")
        planned = {"run": config.run, "panel": {"hash": read_panel(config.panel).hash}, "temperature": temperature}
        paired.refuse_mixed(paired.read_result(config.against), planned)  # before anything is played
        evaluate(config, console)
    result = config.run if config.run.is_file() else target_of(config)
    names, panel, found = paired.load_and_compare(config.against, result)
    console.print(paired.comparison_table(names, panel, found))
    console.print(paired.verdict(names, found))
    return found


def target_of(config: Config) -> Path:
    """The JSON file to write."""
    return config.out or config.run / "eval.json"


def evaluate(config: Config, console: Console) -> dict:
    """Play, print the table, write the JSON; returns what was written."""
    if config.panel is None:
        stored = run_settings(config)
        return play_all(config, stored, held_out_games(config, stored, console), None, console)
    panel = read_panel(config.panel)
    fixed = {"--splits": config.splits, "--games": config.games, "--seed": config.seed}
    if given := [name for name, value in fixed.items() if value]:
        raise UserError(f"--panel: fixes {', '.join(given)}; leave that out, or write another panel")
    if config.env not in (None, panel.env):
        raise UserError(f"--panel: {config.panel} is a panel of {panel.env}, got --env {config.env}")
    stored = run_settings(dataclasses.replace(config, env=panel.env))
    with tempfile.TemporaryDirectory(prefix="proxmo-panel-") as folder:
        here = with_panel(panel, stored, Path(folder))
        games = panel_games(panel, here, console)
        check_training(config, panel, console)
        here = dataclasses.replace(here, output=stored.output, seed=stored.seed)  # the policy is the run's
        return play_all(config, here, games, panel, console)


def check_training(config: Config, panel: Panel, console: Console) -> None:
    """Refuse a run that was trained on tasks of the panel; say so where its training tasks are not here."""
    settings = stored_config(config.run)
    try:
        training = training_of(settings, console)
    except (UserError, EnvironmentUserError, OSError) as error:
        console.print(f"The run's training tasks are not compared with the panel: {error}", soft_wrap=True)
        return
    refuse_shared(panel, training, config.run)
    if not training.count:
        console.print("The run's training tasks are not compared with the panel: none is in its folder.")
    seed = panel.source.get("seed", settings.seed)
    if panel.env == settings.env.name == "household" and seed != settings.seed:
        console.print(
            f"The panel's houses are those of seed {seed}, the run's of seed {settings.seed}: valid_seen is new to it."
        )


def play_all(
    config: Config, stored: TrainConfig, games: dict[str, list[Game]], panel: Panel | None, console: Console
) -> dict:
    """Play the games of every split, once with each seed; print and write the result."""
    mesh = make_mesh(0, stored.mesh.fsdp, stored.mesh.tensor)
    player = make_player(stored, mesh)
    player.decoding = dataclasses.replace(player.decoding, greedy=config.greedy)
    player.say = functools.cache(partial(console.print, markup=False, highlight=False, soft_wrap=True))  # each once
    params, iteration = trained_params(config, stored, player)
    temperature = 0.0 if config.greedy else config.temperature
    began = time.time()
    seeds = panel.seeds if panel else (config.seed,)
    turns = 0 if panel else stored.output.eval_turns  # a panel's are those of the rollout
    with make_pool(stored) as pool:
        results = {
            split: play(config, seeds, player, params, pool, games[split], split, turns, console) for split in games
        }
    answer = {
        "run": str(config.run),
        "iteration": iteration,
        "temperature": temperature,
        "seed": seeds[0],
        "env": stored.env.name,
        "engine": stored.env.engine,
        "seconds": round(time.time() - began, 1),
        "splits": {
            split: rates([environment(stored).kind(game) for game in games[split]], *result, environment(stored).scored)
            for split, result in results.items()
        },
    }
    if panel:
        answer["panel"] = {"hash": panel.hash, "file": str(config.panel), "turns": panel.turns, "seeds": seeds}
        answer["episodes"] = episodes_of(panel, results)
    console.print(table(answer))
    target = target_of(config)
    write_whole(target, json.dumps(answer, indent=1) + "\n")
    on = f"on panel {panel.hash[:12]} " if panel else ""
    console.print(f"{target} holds these numbers {on}".rstrip() + ".")
    return answer


def episodes_of(panel: Panel, results: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> list[dict]:
    """The outcomes of each task, in the panel's order, a value for each seed."""
    episodes = []
    for split, tasks in panel.splits().items():
        won, finished, score = results[split]
        episodes += [
            {"name": task["name"], "content": task["content"], "split": split, "won": won[:, i].tolist(),
             "finished": finished[:, i].tolist(), "score": [round(float(x), 6) for x in score[:, i]]}
            for i, task in enumerate(tasks)
        ]  # fmt: skip
    return episodes


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
        stored = for_playing(dataclasses.replace(stored, env=env), jax.device_count())
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
    checkpoints = Checkpoints(config.run / "checkpoints", writes=False)
    try:
        steps = checkpoints.steps()
        if config.checkpoint == "best":
            best = checkpoints.best()
            if best is None:
                raise UserError(f"--checkpoint best: {config.run} has no checkpoint of an iteration that was evaluated")
            wanted = best
        else:
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
        if config.checkpoint is None:
            newest = checkpoints.restore_newest(state, player.say, partial(of_another_run, stored_config(config.run)))
            assert newest is not None
            wanted, state, _ = newest
        else:
            state, _ = checkpoints.restore(state, wanted)
        return adapters.join(adapters.split(start)[0], state.params), wanted
    finally:
        checkpoints.close()


def play(
    config: Config,
    seeds: Sequence[int],
    player: Player,
    params,
    pool: Pool,
    games: list[Game],
    split: str,
    turns: int,
    console: Console,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(won bool, finished bool, score float32) [seeds, games] of a split, a batch at a time; turns: as in `collect`.

    Games that could not be played are not finished. Raises NothingPlayed if none could.
    """
    shape, fault = (len(seeds), len(games)), None
    won, finished, score = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape, np.float32)
    with progress_bar(console) as bar:
        task = bar.add_task(split, total=won.size, note="")
        for s, start in itertools.product(range(len(seeds)), range(0, len(games), config.batch)):
            part = slice(start, start + config.batch)
            try:
                rollout = collect(
                    player,
                    params,
                    pool,
                    games[part],
                    jax.random.key(seeds[s]),
                    temperature=0.0 if config.greedy else config.temperature,
                    turns=turns,
                    first=start,  # random numbers are those of the game's place, whatever the batch
                )
                won[s, part], finished[s, part], score[s, part] = rollout.won, rollout.finished, rollout.score
            except NothingPlayed as error:
                fault = error
            done = s * len(games) + min(start + config.batch, len(games))
            bar.update(task, completed=done, note=f"{won.sum()} solved")
    if fault and not finished.any():
        raise fault
    return won, finished, score


def rates(
    kind_of: list[str], won: np.ndarray, finished: np.ndarray, score: np.ndarray, scored: bool
) -> dict[str, dict]:
    """Wins, episodes, rate and interval by the paper's columns (a shop's categories) and All, and the mean score.

    Episodes that could not be played are left out.

    Args:
        kind_of: the type of each game.
        won, finished, score: [seeds, games]. Of several seeds, intervals are bootstrapped over games, since attempts
            at the same game are not independent.
        scored: whether the environment has scores.
    """
    kinds = np.array(kind_of)
    names = COLUMNS if set(kinds) <= set(COLUMNS) else {kind: kind for kind in sorted(set(kinds))}
    answer: dict[str, dict] = {}
    for name, chosen in [*((name, kinds == kind) for kind, name in names.items()), ("All", np.ones(len(kinds), bool))]:
        wins, count = int(won[:, chosen][finished[:, chosen]].sum()), int(finished[:, chosen].sum())
        low, high = wilson(wins, count)
        if len(won) > 1 and count:
            _, low, high = bootstrap(_means(won, finished)[chosen & finished.any(0)])
        answer[name] = {
            "wins": wins,
            "games": count,
            "rate": wins / count if count else None,
            "low": low,
            "high": high,
        }
    answer["All"]["lost"] = int((~finished).sum())
    if scored and finished.any():
        mean, low, high = bootstrap(_means(score, finished)[finished.any(0)])
        answer["Score"] = {"mean": mean, "low": low, "high": high, "games": int(finished.sum())}
    return answer


def _means(values: np.ndarray, finished: np.ndarray) -> np.ndarray:
    """The mean over the finished seeds of each game; 0 where there is none."""
    return (values * finished).sum(0) / np.maximum(finished.sum(0), 1)


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
