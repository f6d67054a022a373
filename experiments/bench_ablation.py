"""Time ablations: a grid of the estimator, a study of whole runs against sequential runs, and scaling over devices.

    proxmo bench ablation                           # about ten minutes on two cores
    proxmo bench ablation --official ~/ProxMO-RL    # compare the grid with the official code, one call per setting

The study has five variants (mean-centred GRPO, GiGPO, GiGPO with modulation, GiGPO with proximity, ProxMO), each from
16 seeds. The sequential runs have the same policy, update and houses, but play in the text engine; Python parses its
texts and matches its commands. A few iterations of one such run are timed and the total is extrapolated. The report is
printed and appended to BENCHMARKS.md.
"""

import dataclasses
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from envs_bridge.household.engine import Household
from envs_bridge.household.game import TASK_TYPES, Game, build_game
from envs_bridge.household.generate import make_game
from experiments import bench, bench_estimator
from experiments.timing import timed
from proxmo_jax.ablation import grid as ablate_estimator
from proxmo_jax.ablation import runner as ablation
from proxmo_jax.ablation import vector_household as vh
from proxmo_jax.ablation.runner import before_jax_starts as before_jax_starts  # the command line's
from proxmo_jax.ablation.vector_agent import (
    Knobs,
    Rollout,
    Scores,
    Seen,
    Spec,
    fresh,
    make_optimizer,
    make_run,
    make_update,
)
from proxmo_jax.agent.report import terminal
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.presets import proxmo
from proxmo_jax.estimator.steps_file import needed
from proxmo_jax.estimator.types import Group

GRID = "temperature=0.05:0.8:32 alpha=1,2,4,8 step_weight=0.25,0.5,1 modulation=on,off aggregation=none,hard,soft"
OFFICIAL_SECONDS = 0.77  # of the official code on 4,897 steps (BENCHMARKS.md, Estimator); used without a checkout


@dataclass(frozen=True)
class Config:
    """What to time."""

    seeds: int = 16
    iterations: int = 160
    text_iterations: int = 8
    """Iterations of a run in the text engine to time."""
    scaling: bool = True
    """Also time 1 to 8 virtual devices and 1 to 64 concurrent runs, in processes of their own."""
    official: Path | None = None
    """A checkout of the official code, which is timed on the grid's batch."""
    official_python: Path = Path(sys.executable)
    """The interpreter to run it with; it needs torch and scikit-learn."""
    append: Path | None = Path("BENCHMARKS.md")
    """File to append the report to."""


def main(config: Config, console: Console | None = None) -> str:
    """Run the benchmark; returns the Markdown that was appended."""
    console = console or terminal()
    bench.require_positive(config, ("seeds", "iterations", "text_iterations"))
    if config.iterations % 10:
        raise UserError(f"--iterations must be a multiple of 10, got {config.iterations}")
    lines = [
        bench.heading("Ablations", "proxmo bench ablation"), "", f"{bench.host_and_devices()}.", "",
        *time_grid(config, console), "", *time_study(config, console),
    ]  # fmt: skip
    if config.scaling:
        lines += ["", *time_scaling(console)]
    return bench.publish("\n".join(lines), config.append, console)


def time_grid(config: Config, console: Console) -> list[str]:
    """Time a grid of settings on a batch of about 5,000 steps, with and without compilation."""
    steps = bench_estimator.play(24, 0, console)
    group, _ = Group.from_steps(**needed(steps, texts=True))
    grid = ablate_estimator.settings_of(ablate_estimator.parse(GRID))
    took = timed(lambda: ablate_estimator.estimate(group, grid, 64), 3)
    count, seconds = sum(len(points) for _, points in grid), took["seconds"]
    one, source = OFFICIAL_SECONDS, f"{OFFICIAL_SECONDS} s (measured in another run)"
    if config.official is not None:
        options = bench_estimator.Config(official=config.official, official_python=config.official_python)
        one = bench_estimator.time_official(options, steps)["official"]
        source = f"{one:.2f} s (measured in this run)"
    return [
        f"Estimator grid: {count} settings of {len(steps['texts'])} steps, with the metrics of each setting:"
        f" {seconds:.2f} s, {count / seconds:.0f} settings per second; {took['first']:.1f} s for the first call, which"
        f" includes compilation. The official code takes {source} for one setting: {count / seconds * one:.0f} times"
        f" as long per setting ({count / took['first'] * one:.0f} times with compilation included)."
    ]


def time_study(config: Config, console: Console) -> list[str]:
    """Time a study of five variants, and the same runs sequentially in the text engine."""
    components = ablation.load("components")
    cells = [dataclasses.replace(cell, baseline="") for cell in components.cells if not cell.settings.episode_std]
    study = ablation.Study("bench", components.question, cells, config.iterations)
    took = []
    with tempfile.TemporaryDirectory() as folder:
        ablation.remember_programs(Path(folder) / "study")
        for again in ("first", "again"):  # the second pass uses cached programs
            began = time.perf_counter()
            results = ablation.train_all(ablation.Config(seeds=config.seeds), study, Path(folder) / again, console)
            took.append(time.perf_counter() - began)
    console.print(f"study: {took[0]:.0f} and {took[1]:.0f} s; next: one run in the text engine")
    update, turn = time_text(config.text_iterations)
    runs, iterations, evaluations = len(cells) * config.seeds, config.iterations, config.iterations // 10 + 1
    unseen = ablation.held_out_count(ablation.Config().houses)
    turns = float(
        results.curves["turns"].mean()
    )  # of an episode, mean over all runs; evaluations are taken to have as many
    text = runs * (iterations * update + (64 * iterations + unseen * evaluations) * turns * turn)
    ends = ", ".join(
        f"{label} {x:.0%}" for label, x in zip(results.labels, results.eval[:, :, -1].mean(1), strict=True)
    )
    return [
        f"Study: {len(cells)} variants x {config.seeds} seeds, {iterations} iterations of 8 groups of 8 episodes with"
        f" at most 20 turns in easy houses, evaluated in {unseen} other houses every ten iterations: {took[0]:.0f} s"
        f" with compilation; {took[1]:.0f} s, {took[1] / runs:.2f} s per run, with compiled programs cached. Success on"
        f" held-out houses at the end: {ends}. The same runs one after the other through the text engine:"
        f" {1e6 * turn:.0f} us for each of the {turns:.1f} turns that an episode takes on average,"
        f" {1e3 * update:.1f} ms for estimator and update (medians of {config.text_iterations} iterations),"
        f" {text / 60:.0f} min in all. That is {text / took[0]:.0f} times as long, {text / took[1]:.0f} times without"
        " compilation."
    ]


# The same agent in the text engine.


def time_text(iterations: int) -> tuple[float, float]:
    """Median seconds of estimator and update, as in the array runs, and of one turn in the text engine."""
    games = [build_game(make_game("train", i, 0, "easy", TASK_TYPES[i % 6])[1]) for i in range(60)]
    houses, texts = vh.build(games, paraphrases=False)
    spec, knobs = Spec(), Knobs(proxmo(), learning_rate=0.01)
    net, optimizer = Scores(len(texts.pieces), spec.hidden), make_optimizer()
    params = fresh(net, vh.pick(houses, 0), jax.random.key(0))
    opt_state = optimizer.init(params)
    update = jax.jit(make_update(net, texts, spec, optimizer, [knobs.estimator]))
    score = jax.jit(
        lambda params, at, seen: jax.vmap(jax.vmap(partial(net.apply, {"params": params}), (None, 0)))(at, seen)
    )
    players = [TextPlayer(game, texts, houses, i) for i, game in enumerate(games)]
    rng, updates, turns = np.random.default_rng(0), [], []
    for _ in range(iterations + 1):
        began = time.perf_counter()
        chosen = rng.choice(len(games), spec.groups, replace=False)
        at = vh.pick(houses, chosen)
        rollout = play_text([players[i] for i in chosen], spec, partial(score, params, at), rng)
        turns.append((time.perf_counter() - began) / int(rollout.mask.sum()))
        began = time.perf_counter()
        params, opt_state = jax.block_until_ready(update(params, opt_state, at, rollout, knobs, 0))
        updates.append(time.perf_counter() - began)
    return statistics.median(updates[1:]), statistics.median(turns[1:])


class TextPlayer:
    """Encodes one game's texts and commands as the policy's inputs."""

    def __init__(self, game: Game, texts: vh.Texts, houses: vh.Houses, number: int):
        """number: the game's index in `houses`, which hold its first text."""
        self.game, self.places, self.things = game, houses.receptacle.shape[1], houses.object.shape[1]
        self.length = max(houses.start.shape[1], 9 + 3 * self.things)
        self.piece = {text: i for i, text in enumerate(texts.pieces)}
        self.split = re.compile("|".join(re.escape(t) for t in sorted(texts.pieces, key=len, reverse=True) if t))
        self.number = dict(self.commands())
        # Memoised splits of texts; in the first text the task is split into words.
        first = [i for i in np.asarray(houses.start[number]).tolist() if i]
        self.pieces_of = {vh.say(texts, np.array(first)): first}

    def commands(self):
        """(text, number) of every command of this house."""
        game, first = self.game, len(vh.COMMANDS)
        yield from (("look", vh.LOOK), ("inventory", vh.INVENTORY), ("help", vh.HELP))
        for r, place in enumerate(game.receptacles):
            yield f"go to {place}", first + r
            yield from ((f"examine {place}", vh.EXAMINE), (f"open {place}", vh.OPEN), (f"close {place}", vh.CLOSE))
            for o, thing in enumerate(game.objects):
                yield f"take {thing} from {place}", first + self.places + o
                yield f"move {thing} to {place}", vh.PUT
                for verb, number in (("clean", vh.CLEAN), ("heat", vh.HEAT), ("cool", vh.COOL)):
                    yield f"{verb} {thing} with {place}", number
        for o, thing in enumerate(game.objects):
            yield f"examine {thing}", vh.EXAMINE_HELD
            yield f"use {thing}", first + self.places + self.things + o
            for knife in game.objects:
                yield f"slice {thing} with {knife}", first + self.places + 2 * self.things + o

    def see(self, world: Household, text: str, used: np.ndarray, last: int) -> tuple[Seen, dict[int, str]]:
        """The policy's input and the text of each admissible command."""
        words = {self.number[command]: command for command in world.commands}
        possible = np.zeros(len(used), np.int8)
        possible[list(words)] = 1
        if text not in self.pieces_of:
            self.pieces_of[text] = [self.piece[piece] for piece in self.split.findall(text)]
        pieces = self.pieces_of[text]
        goal, game = world.game.goal, world.game
        target = [
            kind == goal.object_type and flags.issuperset(goal.abilities)
            for kind, flags in zip(game.object_type, world.flags, strict=True)
        ]
        ready = [t and flags.issuperset(goal.states) for t, flags in zip(target, world.flags, strict=True)]
        here = [r for r, where in enumerate(game.receptacle_location) if where == world.location]
        places = {r for r, kind in enumerate(game.receptacle_type) if kind == goal.receptacle_type}
        held, lamp = np.zeros(self.things, bool), False
        if world.holding >= 0:
            held[world.holding] = True
        in_place = np.zeros(self.things, bool)
        for o, inside in enumerate(world.inside):
            in_place[o] = ready[o] and any(r in places for r in inside)
            lamp |= bool(goal.lamp_type) and game.object_type[o] == goal.lamp_type and any(r in here for r in inside)
        flags = np.array([
            world.holding >= 0 and target[world.holding], world.holding >= 0 and ready[world.holding],
            any(r in places for r in here), lamp,
        ])  # fmt: skip
        text_row = np.zeros(self.length, np.int32)
        text_row[: len(pieces)] = pieces
        bag = np.bincount(pieces, minlength=len(self.piece)).astype(np.float32)
        again = (np.arange(len(used)) == last).astype(np.float32)
        # NumPy arrays, since a transfer to the device for each field would slow the text engine down.
        arrays: Any = (text_row, bag, held, flags, np.log1p(used), again, in_place, possible)
        return Seen(*arrays), words


def play_text(players: Sequence[TextPlayer], spec: Spec, score, rng: np.random.Generator) -> Rollout:
    """A rollout [G, M, T] in the text engine, all episodes in parallel."""
    groups, members = len(players), spec.members
    commands = len(vh.COMMANDS) + players[0].places + 3 * players[0].things
    worlds = [[Household(player.game) for _ in range(members)] for player in players]
    texts = [[world.reset().text for world in row] for row in worlds]
    used = np.zeros((groups, members, commands), np.float32)
    last = np.full((groups, members), -1)
    rows: list[Rollout] = []
    shown: list[list[Any]] = [[None] * members for _ in players]
    for _ in range(spec.turns):
        shown = [
            [
                player.see(worlds[g][m], texts[g][m], used[g, m], last[g, m]) if not worlds[g][m].done else shown[g][m]
                for m in range(members)
            ]
            for g, player in enumerate(players)
        ]
        seen: Any = jax.tree.map(lambda *x: np.stack(x), *[s for row in shown for s, _ in row])
        seen = jax.tree.map(lambda x: x.reshape(groups, members, *x.shape[1:]), seen)
        log_probs = np.asarray(jax.nn.log_softmax(score(seen)))
        number = (log_probs + rng.gumbel(size=log_probs.shape)).argmax(-1)
        mask, won = np.zeros((groups, members), bool), np.zeros((groups, members), bool)
        for g in range(groups):
            for m in range(members):
                world = worlds[g][m]
                if world.done:
                    continue
                mask[g, m], chosen = True, number[g, m]
                after = world.step(shown[g][m][1][chosen])
                texts[g][m], won[g, m] = after.text, after.won
                used[g, m, chosen] += 1
                last[g, m] = chosen
        log_prob = np.take_along_axis(log_probs, number[..., None], -1)[..., 0]
        row: Any = (seen, number, log_prob, mask, won)
        rows.append(Rollout(*row))
    return jax.tree.map(lambda *x: jnp.stack(x, axis=2), *rows)


# Scaling, in processes of their own: the number of virtual devices is fixed when a process starts.


def time_scaling(console: Console) -> list[str]:
    """Time runs by number of virtual devices and of concurrent runs."""
    lines = ["| virtual devices | concurrent runs | s for 10 iterations | run-iterations / s |", "|---|---|---|---|"]
    for devices, runs in ((1, 1), (1, 4), (1, 16), (1, 64), (2, 16), (4, 16), (8, 16)):
        command = [sys.executable, "-c", f"from experiments.bench_ablation import time_runs; time_runs({runs})"]
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment = {**bench.with_project(), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        seconds = float(json.loads(bench.run_child("timing the scaling", command, environment=environment)))
        console.print(f"{devices} devices, {runs} runs: {seconds:.2f} s")
        lines.append(f"| {devices} | {runs} | {seconds:.2f} | {10 * runs / seconds:.0f} |")
    return [
        "Scaling of the ProxMO run (ten iterations and two evaluations of as many episodes, compilation excluded):",
        "",
        *lines,
    ]


def time_runs(runs: int) -> None:
    """Print the median seconds of ten iterations of `runs` concurrent runs, split over this process's devices."""
    from proxmo_jax.policy.sharding import keep_freed_memory

    keep_freed_memory()
    spec = Spec(iterations=10, eval_every=10)
    train, _, texts = ablation.make_houses("easy", 60, paraphrases=False)
    held_out = vh.pick(train, jnp.arange(1))
    program = ablation.over_devices(make_run(train, held_out, texts, spec, [proxmo()]))
    one = Knobs(proxmo(), 0.01, 0.01, 0.0)
    knobs = jax.tree.map(lambda x: jnp.full(runs, x, jnp.float32), one)
    keys = jax.random.split(jax.random.key(0), runs)
    print(timed(lambda: program(knobs, keys, 0), 3)["seconds"])
