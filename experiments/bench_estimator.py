"""Time the estimator on steps played in large generated houses, and the official code if a checkout of it is given.

    proxmo bench estimator                          # our estimator alone
    proxmo bench estimator --official ~/ProxMO-RL   # and the official code, which needs torch and scikit-learn

`raw` starts from Python lists of texts, ids and rewards and returns advantages in the same order, with nothing counted
in advance. `counts` starts from word counts on the device, as a rollout leaves them. Compilation is excluded. The
report is printed and appended to BENCHMARKS.md.
"""

import json
import os
import random
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from envs_bridge.household.engine import Household
from envs_bridge.household.expert import Habits, demonstrate
from envs_bridge.household.generate import generate_games
from experiments import bench
from experiments.timing import timed
from proxmo_jax.agent.report import terminal, watched
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.batch import batch_advantages
from proxmo_jax.estimator.presets import PRESETS, official, proxmo
from proxmo_jax.estimator.steps_file import steps_advantages
from proxmo_jax.estimator.types import Group

OFFICIAL = Path(__file__).with_name("official_timing.py")
MEMORY_AT = (50, 100, 200, 400, 800)  # turns


@dataclass(frozen=True)
class Config:
    """What to time."""

    official: Path | None = None
    """A checkout of the official code (the folder that holds proxmo/core_proxmo.py)."""
    official_python: Path = Path(sys.executable)
    """The interpreter to run it with; it needs torch and scikit-learn."""
    groups: tuple[int, ...] = (16, 24, 64, 96, 256)
    """Numbers of groups of 8 trajectories with at most 50 turns, 26 on average."""
    preset_groups: tuple[int, ...] = (24, 96)
    """Numbers of groups for the table of presets: 5,000 and 20,000 steps."""
    official_groups: int = 96
    """Time and memory of the official code grow quadratically: it is timed up to this many groups."""
    million: bool = True
    """Also estimate a million steps in a process of its own and report its peak memory."""
    seed: int = 0
    repeat: int = 9
    append: Path | None = Path("BENCHMARKS.md")
    """File to append the report to."""


def main(config: Config, console: Console | None = None) -> str:
    """Run the benchmark; returns the Markdown that was appended."""
    console = console or terminal()
    if config.official is not None and not (config.official / "proxmo" / "core_proxmo.py").is_file():
        raise UserError(f"--official: {config.official} holds no proxmo/core_proxmo.py; name a checkout of ProxMO-RL")
    if not config.groups or min(config.groups) < 1:
        raise UserError(f"--groups: need numbers of at least 1, got {config.groups}")
    if config.preset_groups and min(config.preset_groups) < 1:
        raise UserError(f"--preset-groups: need numbers of at least 1, got {config.preset_groups}")
    rows = []
    played = play(max(*config.groups, *config.preset_groups), config.seed, console)
    batches = [first_groups(played, groups) for groups in config.groups]
    for steps in [*batches, all_distinct(batches[0])]:
        row = time_ours(steps, config.repeat)
        groups = row["groups"]
        if config.official is not None and groups <= config.official_groups:
            row |= time_official(config, steps)
        rows.append(row)
        console.print(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    of_presets = [time_presets(first_groups(played, groups), config.repeat) for groups in config.preset_groups]
    million = million_steps() if config.million else None
    text = report(config, rows, of_presets, kernel_memory(), million)
    return bench.publish(text, config.append, console)


def play(groups: int, seed: int, console: Console, members: int = 8, turns: int = 50) -> dict[str, Any]:
    """Play episodes in large houses with a demonstrator that searches and makes mistakes.

    Args:
        groups: number of houses.
        seed: of the houses and the demonstrator.
        console: where the progress is shown.
        members: trajectories per group.
        turns: at most so many per trajectory.

    Returns:
        The columns of a file of steps, group after group: lists or arrays of one entry per step.
    """
    steps: dict[str, list] = {
        name: []
        for name in (
            "texts",
            "next_texts",
            "group",
            "trajectory",
            "step",
            "reward",
            "success",
            "action_valid",
            "entropy",
        )
    }
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        games = generate_games(Path(folder), split="train", count=groups, seed=seed, level="hard")
        for g, game in enumerate(watched(games, "playing", console, len(games))):
            world = Household.load(str(game))
            for m in range(members):
                habits = Habits(search_rate=0.95, mistake_rate=rng.choice((0.8, 1.0)))
                done = demonstrate(world, random.Random(f"{seed}/{g}/{m}"), habits, max_turns=turns)
                for t, (seen, command, _) in enumerate(done):
                    last = t == len(done) - 1
                    steps["texts"].append(seen.text)
                    steps["next_texts"].append("The end." if last else done[t + 1][0].text)
                    steps["entropy"].append(rng.random())
                    steps["group"].append(f"task-{g:06d}")
                    steps["trajectory"].append(f"trajectory-{g:06d}-{m}")
                    steps["step"].append(t)
                    steps["reward"].append(10.0 * (last and world.done))
                    steps["success"].append(world.done)
                    steps["action_valid"].append(command in seen.admissible)
    return {name: values if name.endswith("texts") else np.array(values) for name, values in steps.items()}


def first_groups(steps: dict[str, Any], groups: int) -> dict[str, Any]:
    """The steps of the first groups; steps are ordered by group."""
    end = np.searchsorted(steps["group"], f"task-{groups:06d}")
    return {name: values[:end] for name, values in steps.items()}


def all_distinct(steps: dict[str, Any]) -> dict[str, Any]:
    """The same steps with every text made distinct by a pair of added words.

    There are few added words, so that the vocabulary is not truncated: the official code breaks ties there in another
    way.
    """
    side = int(len(steps["texts"]) ** 0.5) + 1
    return {**steps, "texts": [f"{text} mark{i // side} spot{i % side}" for i, text in enumerate(steps["texts"])]}


def time_ours(steps: dict[str, Any], repeat: int) -> dict[str, Any]:
    """Sizes of a batch, and seconds from raw texts and from counts on the device."""
    settings = proxmo()
    batch, _ = Group.from_steps(**steps)
    batch = jax.device_put(batch)
    run = jax.jit(batch_advantages)
    return {
        "groups": batch.reward.shape[0],
        "steps": len(steps["texts"]),
        "texts": len(set(steps["texts"])),
        "raw": timed(lambda: steps_advantages(steps, settings), repeat)["seconds"],
        "counts": timed(lambda: run(batch, settings), repeat)["seconds"],
    }


def time_presets(steps: dict[str, Any], repeat: int) -> dict[str, Any]:
    """Milliseconds from raw texts and from a packed batch on the device, by preset; and the number of steps."""
    took: dict[str, Any] = {}
    for name, preset in PRESETS.items():
        if name == "gigpo_similarity":  # minutes of difflib on the host
            continue
        settings = preset()
        batch, _ = Group.from_steps(**steps)
        batch, run = jax.device_put(batch), jax.jit(batch_advantages)
        raw = timed(lambda settings=settings: steps_advantages(steps, settings), repeat)["seconds"]
        packed = timed(lambda run=run, batch=batch, settings=settings: run(batch, settings), repeat)["seconds"]
        took[name] = f"{1e3 * raw:.1f} / {1e3 * packed:.1f}"
    return {"steps": len(steps["texts"]), "took": took}


def time_official(config: Config, steps: dict[str, Any]) -> dict[str, float]:
    """Seconds of the official code on the same steps, and its maximum difference from ours under its own rules."""
    assert config.official is not None
    ours = steps_advantages(steps, official())["advantage"]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "steps.npz", Path(folder) / "result.npz"
        np.savez(source, **{**steps, "texts": np.array(steps["texts"])})
        command = [str(config.official_python), str(OFFICIAL), str(config.official), str(source), str(target)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        bench.run_child(f"--official: timing the official code under {config.official_python}", command,
                        environment=environment)  # fmt: skip
        with np.load(target) as theirs:
            difference = float(np.abs(theirs["advantage"] - ours).max())
            return {"official": float(theirs["seconds"]), "difference": difference}


def kernel_memory() -> dict[str, dict[int, int]]:
    """Temporary memory in bytes of the compiled program, by kernel and turns; one group, all texts distinct."""
    memory: dict[str, dict[int, int]] = {"dense": {}, "blockwise": {}}
    for kernel, sizes in memory.items():
        for turns in MEMORY_AT:
            shape: tuple[int, ...] = (1, 8, turns)
            like: Any = jax.ShapeDtypeStruct
            group = Group(
                reward=like(shape, np.float32), mask=like(shape, bool), success=like((1, 8), bool),
                action_valid=like(shape, bool), embedding=like((*shape, 64), np.float32),
            )  # fmt: skip
            compiled = jax.jit(batch_advantages).lower(group, proxmo(kernel=kernel)).compile()
            analysis: Any = compiled.memory_analysis()
            sizes[turns] = analysis.temp_size_in_bytes
    return memory


def million_steps() -> dict[str, float]:
    """`print_million_steps` in a process of its own, whose peak memory is that of this work alone."""
    command = [sys.executable, "-c", "from experiments.bench_estimator import print_million_steps as f; f()"]
    return json.loads(bench.run_child("the run over a million steps", command))


def print_million_steps() -> None:
    """Print seconds for a million steps from raw texts, compilation included, and this process's peak memory."""
    steps = play(128, 1, Console(stderr=True))
    count = len(steps["texts"])
    copies = -(-1_000_000 // count)
    many = {name: np.tile(steps[name], copies) for name in ("step", "reward", "success", "action_valid")}
    many["texts"] = steps["texts"] * copies
    for name in ("group", "trajectory"):
        _, number = np.unique(steps[name], return_inverse=True)
        many[name] = np.concatenate([number + i * (number.max() + 1) for i in range(copies)])
    began = time.perf_counter()
    estimated = steps_advantages(many, proxmo(), chunk=64)
    took = time.perf_counter() - began
    assert np.isfinite(estimated["advantage"]).all()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"steps": count * copies, "seconds": took, "gigabytes": peak}))


def report(
    config: Config, rows: list[dict], of_presets: list[dict], memory: dict[str, dict[int, int]], million: dict | None
) -> str:
    """The measurements as Markdown."""
    command = "proxmo bench estimator" + (" --official CHECKOUT" if config.official else "")
    lines = [
        bench.heading("Estimator", command),
        "",
        f"{bench.host_and_devices()}. Medians of {config.repeat} runs, compilation excluded. Groups of 8 trajectories"
        " with at most 50 turns in large generated houses. `raw` starts from Python lists of texts and returns"
        " advantages in the same order, with nothing counted in advance. `counts` starts from word counts on the"
        " device. In the last row every text is made distinct, the worst case.",
        "",
        "| groups | steps | distinct texts | raw, ms | counts, ms | raw, us / step | official, ms | speed-up, raw |"
        " speed-up, counts | max. abs. difference (official rules) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["groups"], row["steps"], row["texts"], f"{1e3 * row['raw']:.1f}", f"{1e3 * row['counts']:.1f}"]
        cells.append(f"{1e6 * row['raw'] / row['steps']:.2f}")
        if "official" in row:
            cells += [f"{1e3 * row['official']:.0f}", f"{row['official'] / row['raw']:.0f}"]
            cells += [f"{row['official'] / row['counts']:.0f}", f"{row['difference']:.1e}"]
        else:
            cells += ["-"] * 4
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if of_presets:
        lines += ["", "Milliseconds by preset, from raw texts / from a packed batch on the device:", ""]
        lines += ["| preset | " + " | ".join(f"{each['steps']:,} steps" for each in of_presets) + " |"]
        lines += ["|---" * (len(of_presets) + 1) + "|"]
        for name in of_presets[0]["took"]:
            lines.append(f"| {name} | " + " | ".join(each["took"][name] for each in of_presets) + " |")
    lines += [
        "",
        "Temporary memory of the compiled program for one group of 8 trajectories, every text distinct:",
        "",
    ]
    turns = list(memory["dense"])
    lines += ["| kernel | " + " | ".join(f"{t} turns" for t in turns) + " |", "|---" * (len(turns) + 1) + "|"]
    lines += [
        f"| {kernel} | " + " | ".join(f"{size / 2**20:.1f} MiB" for size in sizes.values()) + " |"
        for kernel, sizes in memory.items()
    ]
    if million:
        lines += [
            "",
            f"{million['steps']:,} steps from raw texts, 64 groups at a time, compilation included:"
            f" {million['seconds']:.1f} s; peak memory of the whole process {million['gigabytes']:.1f} GiB.",
        ]
    return "\n".join(lines)
