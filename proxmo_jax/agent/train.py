"""Train a language-model agent on household games or in a shop with ProxMO, from nothing to a learning curve.

    proxmo train                          # the defaults: a few minutes on two CPU cores
    proxmo train --preset gigpo --out runs/gigpo --seed 1
    proxmo train --env shop               # invented products under WebShop's rules
    proxmo train --resume

Read `main` from top to bottom: games -> tokenizer -> warm start -> loop (rollout, estimate, update) -> report.
"""

import functools
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress

from envs_bridge.pool import Pool
from envs_bridge.turn import Game
from proxmo_jax.agent.loop import Loop, note, steps_of
from proxmo_jax.agent.make_player import make_player, new_state, run_optimizer
from proxmo_jax.agent.player import Player
from proxmo_jax.agent.profile import profiled, warn_if_over
from proxmo_jax.agent.report import (
    Metrics,
    learning_curve,
    progress_bar,
    read_metrics,
    terminal,
    wilson,
    write_episodes,
)
from proxmo_jax.agent.rollout import collect
from proxmo_jax.agent.run_files import default as default  # the command line's
from proxmo_jax.agent.run_files import open_folder, resumed
from proxmo_jax.agent.settings import Config, check, has_warm_start
from proxmo_jax.agent.stop import StopOnSignal
from proxmo_jax.agent.tasks import environment, make_pool, make_tasks
from proxmo_jax.agent.warm_start import careful_and_careless, needs_demonstrations, starting_point
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.steps_file import write_steps
from proxmo_jax.policy import adapters
from proxmo_jax.policy.sharding import make_mesh
from proxmo_jax.training.checkpoint import Checkpoints


def main(config: Config, console: Console | None = None) -> Path:
    """Run, or resume, one training run.

    Args:
        config: its settings.
        console: where it reports; default: the terminal.

    Returns:
        The run's folder.

    Raises:
        UserError: for settings, data or a folder that cannot be used; nothing is written then.
    """
    console = console or terminal()
    began = time.time()
    if config.resume:
        config, ignored = resumed(config)
        if ignored:
            console.print(
                f"--resume goes on with the run's own settings; ignored: {', '.join(ignored)}", soft_wrap=True
            )
    check(config)
    if needs_demonstrations(config) and environment(config).demonstrations is None:
        raise UserError(
            f"--env {config.env.name} has no demonstrations for a warm start; need a --model and --warm-start.steps 0"
        )
    mesh = make_mesh(0, config.mesh.fsdp, config.mesh.tensor)
    # A model or data set that cannot be read is refused before a folder is made.
    language_model = make_player(config, mesh) if config.model.path else None
    tasks = make_tasks(config, console) if config.env.data is not None else None
    open_folder(config)
    with StopOnSignal(console) as stop:
        train_games, eval_games = tasks or make_tasks(config, console)
        finished = run(config, mesh, train_games, eval_games, language_model, console, stop)
    seconds = f"{time.time() - began:.0f} s"
    folder = config.output.dir
    if finished:
        console.print(
            f"Done in {seconds}: {folder}/ holds metrics.jsonl, learning_curve.png, episodes_before.txt,"
            " episodes_after.txt, rollout.npz and checkpoints. To train longer, at the final learning rate:"
            f" proxmo train --out {folder} --resume --iterations {2 * config.iterations}"
        )
    else:
        console.print(f"Stopped and saved after {seconds}. To go on: proxmo train --out {folder} --resume")
    return folder


def run(
    config: Config,
    mesh: Mesh,
    train_games: list[Game],
    eval_games: list[Game],
    language_model: Player | None,
    console: Console,
    stop: StopOnSignal,
) -> bool:
    """Policy, warm start, iterations and figures of a run whose folder is open; whether it came to its end."""
    folder = config.output.dir
    title = f"{config.env.level} household" if config.env.name == "household" else environment(config).title
    announce(config, title, len(train_games), len(eval_games), console)
    demos = careful_and_careless(config, train_games, console) if needs_demonstrations(config) else []
    player = language_model or make_player(config, mesh, [example for part in demos for example in part])
    player.say = functools.cache(partial(console.print, markup=False, highlight=False, soft_wrap=True))  # each once
    key = jax.random.key(config.seed)
    optimizer = run_optimizer(config)

    with make_pool(config) as pool, jax.set_mesh(mesh):
        reference = starting_point(config, player, demos, jax.random.fold_in(key, 0), console, stop)
        if stop:
            return False
        state = new_state(player, reference, optimizer)
        checkpoints = Checkpoints(folder / "checkpoints")
        first = checkpoints.latest() or 0
        if first:
            state, _ = checkpoints.restore(state)
        metrics = Metrics(folder / "metrics.jsonl", keep_until=first if first else None)
        evaluation = Evaluation(config, player, pool, eval_games)
        if not first:
            label = "warm start" if has_warm_start(config) else "before training"
            with progress_bar(console) as bar:
                metrics.write({"iteration": 0, **evaluation.run(reference, bar, label, "episodes_before.txt")})
        last_row = [{}, *read_metrics(folder / "metrics.jsonl")][-1]
        loop = Loop(config, player, pool, train_games, mesh, optimizer, reference, last_row)
        warn_if_over(folder, config.output.profile, first, console)
        with progress_bar(console) as bar:
            task = bar.add_task("training", total=config.iterations, completed=first, note="")
            for iteration in range(first + 1, config.iterations + 1):
                with profiled(folder, iteration == config.output.profile, console):
                    state, row = loop.iteration(state, iteration, jax.random.fold_in(key, iteration))
                last = iteration == config.iterations
                if iteration % config.output.eval_every == 0 or last:
                    params = adapters.join(loop.frozen, state.params)
                    episodes = "episodes_after.txt" if last else None
                    row |= evaluation.run(params, bar, f"iteration {iteration}", episodes)
                metrics.write({"iteration": iteration, **row})
                bar.update(task, advance=1, note=note(row))
                if iteration % config.output.save_every == 0 or last or stop:
                    checkpoints.save(iteration, state, {"iteration": iteration})
                if stop:
                    break
        checkpoints.close()
        if loop.played:
            write_steps(folder / "rollout.npz", steps_of(loop.played, config.rollout.group_size))

    rows = read_metrics(folder / "metrics.jsonl")
    learning_curve(folder / "learning_curve.png", [(config.preset, rows)], f"{config.preset}, {title} games")
    return bool(rows) and rows[-1]["iteration"] >= config.iterations


def announce(config: Config, title: str, training: int, held_out: int, console: Console) -> None:
    """Say what is about to be trained, on what."""
    console.print(
        f"{config.preset} on {training} {title} games, {held_out} held out;"
        f" {jax.device_count()} x {jax.devices()[0].platform}, seed {config.seed}"
    )
    settings = config.optimizer
    if 0 < settings.decay_iterations < config.iterations:
        console.print(
            f"The learning rate falls to {settings.final_rate:g} of {settings.learning_rate:g} by iteration"
            f" {settings.decay_iterations} and stays there to iteration {config.iterations}."
        )


@dataclass
class Evaluation:
    """Success on the held-out games, at the evaluation temperature and with the same random numbers each time."""

    config: Config
    player: Player
    pool: Pool
    games: list[Game]

    def __post_init__(self) -> None:
        self.environment = environment(self.config)

    def run(self, params, bar: Progress, label: str, episodes: str | None = None) -> dict:
        began = time.time()
        key = jax.random.key(self.config.seed + 1)
        task = bar.add_task("held-out games", total=len(self.games), note="")
        rollout = collect(
            self.player, params, self.pool, self.games, key, temperature=self.config.output.eval_temperature,
            turns=self.config.output.eval_turns,
            on_turn=lambda turn, active: bar.update(task, completed=len(self.games) - active, note=f"turn {turn + 1}"),
        )  # fmt: skip
        bar.remove_task(task)
        wins, count = int(rollout.won.sum()), int(rollout.finished.sum())
        row = {
            "eval/success_rate": wins / count,
            **({"eval/score": float(rollout.score[rollout.finished].mean())} if self.environment.scored else {}),
            "eval/games": count,
            "eval/turns": float((rollout.prompt_lengths > 0).sum(1)[rollout.finished].mean()),
            "time/eval": time.time() - began,
        }
        kinds = np.array([self.environment.kind(game) for game in self.games])
        for kind in np.unique(kinds):
            if ((kinds == kind) & rollout.finished).any():
                row[f"eval/success_rate/{kind}"] = float(rollout.won[(kinds == kind) & rollout.finished].mean())
        low, high = wilson(wins, count)
        score = f", mean score {row['eval/score']:.1%}" if "eval/score" in row else ""
        bar.console.print(
            f"{label}: {wins} of {count} held-out games solved ({wins / count:.0%}, 95% {low:.0%} to {high:.0%}){score}"
        )
        if episodes:
            played = np.flatnonzero(rollout.finished)
            shown = played[np.unique([0, count // 3, 2 * count // 3])]
            write_episodes(
                self.config.output.dir / episodes,
                [rollout.tasks[i] for i in shown],
                [rollout.transcripts[i] for i in shown],
                [bool(rollout.won[i]) for i in shown],
            )
        return row
