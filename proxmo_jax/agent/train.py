"""Train a language-model agent on household games or in a shop with ProxMO, from nothing to a learning curve.

    proxmo train                          # the defaults: a few minutes on two CPU cores
    proxmo train --preset gigpo --out runs/gigpo --seed 1
    proxmo train --env shop               # generated products under WebShop's rules
    proxmo train --resume

Read `main` from top to bottom: games -> tokenizer -> warm start -> loop (rollout, estimate, update) -> report.
"""

import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress

from envs_bridge.pool import Pool
from envs_bridge.turn import Game
from proxmo_jax.agent import hosts
from proxmo_jax.agent.join import join_episodes, join_texts
from proxmo_jax.agent.kept_rollouts import drop_after, is_kept, keep
from proxmo_jax.agent.loop import Loop, note, steps_of
from proxmo_jax.agent.make_player import make_player, new_state, run_optimizer
from proxmo_jax.agent.metrics import Trackers
from proxmo_jax.agent.page_file import page_of_run
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
from proxmo_jax.agent.rollout import Rollout, collect
from proxmo_jax.agent.run_files import default as default  # the command line's
from proxmo_jax.agent.run_files import flat, open_folder, resumed
from proxmo_jax.agent.saves import CHECKPOINTS, Saves
from proxmo_jax.agent.settings import Config, check, has_warm_start, need
from proxmo_jax.agent.stop import StopOnSignal, Stopped
from proxmo_jax.agent.tasks import environment, make_pool, make_tasks
from proxmo_jax.agent.warm_start import (
    careful_and_careless,
    needs_demonstrations,
    refuse_missing_demonstrations,
    starting_point,
)
from proxmo_jax.agent.watchdog import Watchdog
from proxmo_jax.estimator.steps_file import write_steps
from proxmo_jax.policy import adapters
from proxmo_jax.policy.sharding import make_mesh
from proxmo_jax.training.checkpoint import Checkpoints
from proxmo_jax.training.update import TrainState


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
    console = (console or terminal()) if hosts.is_first() else Console(quiet=True)
    began = time.time()
    hosts.check_same({name: value for name, value in flat(config).items() if name != "hosts.index"})
    with hosts.together("settings"):
        if config.resume:
            config, ignored = resumed(config)
            if ignored:
                console.print(
                    f"--resume goes on with the run's own settings; ignored: {', '.join(ignored)}", soft_wrap=True
                )
        check(config)
        refuse_missing_demonstrations(config)
        mesh = make_mesh(0, config.mesh.fsdp, config.mesh.tensor)
        # A model or data set that cannot be read is refused before a folder is made.
        language_model = make_player(config, mesh) if config.model.path else None
        tasks = make_tasks(config, console) if config.env.data is not None else None
    with hosts.first_before_others("the run's folder"):
        open_run(config)
    folder, finished = config.output.dir, False
    say = partial(console.print, soft_wrap=True)
    with (
        StopOnSignal(console, config.output.grace_seconds, hosts.any_host) as stop,
        Watchdog(folder, config.output.watchdog_seconds, say) as watch,
        contextlib.suppress(Stopped),
    ):
        stop.where = lambda: watch.part
        watch("the games")
        with hosts.first_before_others("tasks"):
            train_games, eval_games = tasks or make_tasks(config, console)
        finished = run(config, mesh, train_games, eval_games, language_model, console, watch, stop)
    hosts.finish()
    seconds = f"{time.time() - began:.0f} s"
    if finished:
        kept = ", rollouts" if config.output.keep_rollouts else ""
        longer = (
            f" To train longer, at the final learning rate: proxmo train --out {folder} --resume --iterations"
            f" {2 * config.iterations}"
        )
        console.print(
            f"Done in {seconds}: {folder}/ holds metrics.jsonl, learning_curve.png, episodes_before.txt,"
            f" episodes_after.txt, rollout.npz{kept} and checkpoints."
            f"{longer if config.optimizer.final_rate else ''}"
        )
        if config.output.page and hosts.is_first():
            console.print(page_at_the_end(folder, console), soft_wrap=True)
    else:
        console.print(f"Stopped and saved after {seconds}. To go on: proxmo train --out {folder} --resume")
    return folder


def before_jax_starts(config: Config) -> None:
    """Join the other hosts; called by the command line."""
    hosts.start(config.hosts)


def open_run(config: Config) -> None:
    """Make the run's folder on host 0; the other hosts find it. Raises UserError if they do not."""
    folder = config.output.dir
    if hosts.is_first():
        open_folder(config)
    else:
        found = (folder / "config.json").is_file()
        need(found, f"--out: {folder} is not the folder that host 0 has made; need one that all hosts share")


def run(
    config: Config,
    mesh: Mesh,
    train_games: list[Game],
    eval_games: list[Game],
    language_model: Player | None,
    console: Console,
    watch: Watchdog,
    stop: StopOnSignal,
) -> bool:
    """Policy, warm start, iterations and figures of a run whose folder is open; whether it came to its end.

    Raises:
        Stopped: before its first iteration.
    """
    folder = config.output.dir
    title = f"{config.env.level} household" if config.env.name == "household" else environment(config).title
    announce(config, title, len(train_games), len(eval_games), console)
    watch("the demonstrations")
    demos = careful_and_careless(config, train_games, console) if needs_demonstrations(config) else []
    with hosts.first_before_others("the tokenizer"):
        player = language_model or make_player(config, mesh, [example for part in demos for example in part])
    player.say = functools.cache(partial(console.print, markup=False, highlight=False, soft_wrap=True))  # each once
    key = jax.random.key(config.seed)
    optimizer = run_optimizer(config)

    with contextlib.ExitStack() as opened, make_pool(config) as pool:
        reference = starting_point(config, player, demos, jax.random.fold_in(key, 0), console, watch, stop)
        if stop:
            raise Stopped
        state = new_state(player, reference, optimizer)
        with contextlib.closing(Checkpoints(folder / CHECKPOINTS, keep=config.output.keep)) as checkpoints:
            saves = Saves(config, checkpoints, stop)
            first, state, progress = saves.newest(state, console) or (0, state, {})
            rows = hosts.of_first("metrics", read_metrics(folder / "metrics.jsonl"))
            rows = [row for row in rows if row["iteration"] <= first]
            evaluated, keep_until = goes_on_from(first, progress, rows)
            metrics = Metrics(folder / "metrics.jsonl", keep_until) if hosts.is_first() else None
            trackers = opened.enter_context(contextlib.closing(Trackers(config, keep_until, console)))
            if hosts.is_first():
                drop_after(folder, first)

            def record(row: dict) -> None:
                if metrics:
                    metrics.write(row)
                trackers.write(row)

            last_row = progress.get("row") or [{}, *rows][-1]
            evaluation = Evaluation(config, player, pool, eval_games, watch, stop)
            if not first:
                label = "warm start" if has_warm_start(config) else "before training"
                with progress_bar(console) as bar:
                    record({"iteration": 0, **evaluation.run(reference, bar, label, "episodes_before.txt")})
                trackers.episodes(folder / "episodes_before.txt", 0)
            loop = Loop(
                config, player, pool, train_games, mesh, optimizer, reference, last_row, watch, stop,
                progress.get("numbered"),
            )  # fmt: skip
            warn_if_over(folder, config.output.profile, first, console)
            iterations(loop, saves, record, evaluation, (first, state, last_row, evaluated), key, console)
        if loop.played:
            steps = steps_of(join_texts(loop.played), config.rollout.group_size)
            if hosts.is_first():
                write_steps(folder / "rollout.npz", steps)

        rows = read_metrics(folder / "metrics.jsonl")
        if hosts.is_first():
            learning_curve(folder / "learning_curve.png", [(config.preset, rows)], f"{config.preset}, {title} games")
        finished = bool(rows) and rows[-1]["iteration"] >= config.iterations
        if rows:
            trackers.curve(folder / "learning_curve.png", rows[-1]["iteration"])
        if finished:
            trackers.episodes(folder / "episodes_after.txt", rows[-1]["iteration"])
        return finished


def goes_on_from(first: int, progress: dict, rows: list[dict]) -> tuple[bool, int | None]:
    """Where a run goes on that has a checkpoint of iteration `first` (0: none).

    Returns:
        Whether that iteration has been evaluated if it is to be: a checkpoint may be older than its evaluation, after
        which the row of metrics is written. And the last row of metrics to keep; None for none.
    """
    evaluated = progress.get("evaluated", True) or any(row["iteration"] == first for row in rows)
    return evaluated, first - (not evaluated) if first else None


def page_at_the_end(folder: Path, console: Console) -> str:
    """Write the run's page, and say where it is. Whatever goes wrong there, the run has ended well."""
    try:
        path, said = page_of_run(folder, console=console)
    except Exception as error:
        return f"The page could not be made ({type(error).__name__}: {error}); again: proxmo report {folder}"
    return " ".join([*said, f"{path} shows its turns, each with what every estimator gives it: open it in a browser."])


def iterations(
    loop: Loop,
    saves: Saves,
    record: Callable[[dict], None],
    evaluation: "Evaluation",
    begin: tuple[int, TrainState, dict, bool],
    key: jax.Array,
    console: Console,
) -> None:
    """Train to the last iteration or to a signal, and save.

    Args:
        loop, saves, evaluation: of the run.
        record: writes a row of metrics.
        begin: the last iteration done, the state and the metrics row after it, and whether its evaluation is done, too
            (False if a signal came before).
        key: random key of the run.
        console: where progress is shown.
    """
    config, folder = loop.config, loop.config.output.dir
    done, state, row, evaluated = begin
    score_name = "eval/score" if config.env.reward == "score" else "eval/success_rate"

    def progress() -> dict:
        return {"row": row, "evaluated": evaluated, "numbered": loop.numbered()}

    def is_evaluated(iteration: int) -> bool:
        return iteration % config.output.eval_every == 0 or iteration == config.iterations

    with progress_bar(console) as bar, contextlib.suppress(Stopped):
        task = bar.add_task("training", total=config.iterations, completed=done - (not evaluated), note="")
        while done < config.iterations or not evaluated:
            if evaluated:
                with profiled(folder, done + 1 == config.output.profile and hosts.is_first(), console):
                    state, row = loop.iteration(state, done + 1, jax.random.fold_in(key, done + 1))
                done, evaluated = done + 1, False
                row = {"iteration": done, **row, "time/save": saves.stall}
                saves.stall = 0.0
                saves.note(done, state, progress())
                if loop.played and is_kept(config.output.keep_rollouts, done, done == config.iterations):
                    keep(folder, done, loop.played, loop.player, config.rollout.group_size)
            last = done == config.iterations
            best = False
            if is_evaluated(done):
                params = adapters.join(loop.frozen, state.params)
                row = row | evaluation.run(params, bar, f"iteration {done}", "episodes_after.txt" if last else None)
                best = saves.checkpoints.note_score(done, row[score_name])
            evaluated = True
            record(row)
            saves.note(done, state, progress())
            bar.update(task, completed=done, note=note(row))
            if saves.due() or best or done % config.output.save_every == 0 or last:
                saves.save(done, state, progress())
            if saves.stopping:
                return
    if done:  # stopped between two turns, of the next iteration or of this one's evaluation
        saves.save(done, state, progress())


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
    watch: Callable[[str], None] = lambda part: None
    stop: StopOnSignal = field(default_factory=StopOnSignal)

    def __post_init__(self) -> None:
        self.environment = environment(self.config)

    def run(self, params, bar: Progress, label: str, episodes: str | None = None) -> dict:
        """Play the held-out games; their row of metrics. Raises Stopped between two turns."""
        began = time.time()
        key, own = jax.random.key(self.config.seed + 1), hosts.share(len(self.games))
        games = self.games[own]
        task = bar.add_task("held-out games", total=len(games), note="")

        def on_turn(turn: int, active: int) -> None:
            bar.update(task, completed=len(games) - active, note=f"turn {turn + 1}")
            self.watch(f"evaluation, turn {turn + 1}")
            self.stop.check()

        rollout: Rollout | None = None
        with hosts.together(label), contextlib.suppress(Stopped):
            rollout = collect(
                self.player, params, self.pool, games, key, temperature=self.config.output.eval_temperature,
                on_turn=on_turn, turns=self.config.output.eval_turns, first=own.start,
            )  # fmt: skip
        bar.remove_task(task)
        if self.stop or rollout is None:  # all hosts ask here
            raise Stopped
        rollout = join_episodes(rollout)
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
            rollout = join_texts(rollout)
        if episodes and hosts.is_first():
            played = np.flatnonzero(rollout.finished)
            shown = played[np.unique([0, count // 3, 2 * count // 3])]
            write_episodes(
                self.config.output.dir / episodes,
                [rollout.tasks[i] for i in shown],
                [rollout.transcripts[i] for i in shown],
                [bool(rollout.won[i]) for i in shown],
            )
        return row
