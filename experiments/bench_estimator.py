"""Time the estimator on steps played in large generated houses, beside the official code where a checkout of it is.

    proxmo bench estimator                          # ours alone
    proxmo bench estimator --official ~/ProxMO-RL   # side by side; that side needs torch and scikit-learn

`raw` is from Python lists of texts, ids and rewards to advantages in the same order, nothing counted before; `counts`
from word counts that are on the device already, as a rollout leaves them. Everything is compiled before it is timed.
The table is printed and appended to BENCHMARKS.md.
"""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from envs_bridge.household.engine import Household
from envs_bridge.household.expert import Habits, demonstrate
from envs_bridge.household.generate import generate_games
from proxmo_jax.agent.report import terminal, watched
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.batch import batch_advantages
from proxmo_jax.estimator.presets import official, proxmo
from proxmo_jax.estimator.steps_file import steps_advantages
from proxmo_jax.estimator.types import Group

OFFICIAL = Path(__file__).with_name("official_timing.py")


@dataclass(frozen=True)
class Config:
    """What to time."""

    official: Path | None = None
    """A checkout of the official code (the folder that holds proxmo/core_proxmo.py)."""
    official_python: Path = Path(sys.executable)
    """The interpreter to run it with; it needs torch and scikit-learn."""
    groups: tuple[int, ...] = (16, 24, 64, 96, 256)
    """Numbers of groups of 8 attempts of at most 50 turns, each about 26."""
    official_groups: int = 96
    """The official code's time and memory grow with the square: it is timed up to this many groups."""
    million: bool = True
    """Also do a million steps in a process of its own, and note its peak memory."""
    seed: int = 0
    repeat: int = 9
    append: Path | None = Path("BENCHMARKS.md")
    """File to append the table to."""


def main(config: Config, console: Console | None = None) -> str:
    """Run the benchmark; returns the Markdown that was appended."""
    console = console or terminal()
    if config.official is not None and not (config.official / "proxmo" / "core_proxmo.py").is_file():
        raise UserError(f"--official: {config.official} holds no proxmo/core_proxmo.py; name a checkout of ProxMO-RL")
    if not config.groups or min(config.groups) < 1:
        raise UserError(f"--groups: need numbers of at least 1, got {config.groups}")
    rows = []
    played = play(max(config.groups), config.seed, console)
    batches = [first_groups(played, groups) for groups in config.groups]
    for steps in [*batches, all_distinct(batches[0])]:
        row = time_ours(steps, config.repeat)
        groups = row["groups"]
        if config.official is not None and groups <= config.official_groups:
            row |= time_official(config, steps)
        rows.append(row)
        console.print(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    text = report(config, rows, kernel_memory(), million_steps() if config.million else None)
    console.print(text, highlight=False, markup=False)
    if config.append is not None:
        with config.append.open("a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")
    return text


def play(groups: int, seed: int, console: Console, members: int = 8, turns: int = 50) -> dict[str, Any]:
    """Steps of `groups` x `members` attempts at large houses, by a demonstrator that searches and errs."""
    steps: dict[str, list] = {
        name: [] for name in ("texts", "group", "trajectory", "step", "reward", "success", "action_valid")
    }
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        games = generate_games(Path(folder), split="train", count=groups, seed=seed, level="hard")
        for g, game in enumerate(watched(games, "playing", console, len(games))):
            world = Household.load(str(game))
            for m in range(members):
                habits = Habits(search_rate=0.95, mistake_rate=rng.choice((0.8, 1.0)))
                done = demonstrate(world, random.Random(f"{seed}/{g}/{m}"), habits, max_turns=turns)
                for t, (seen, command) in enumerate(done):
                    last = t == len(done) - 1
                    steps["texts"].append(seen.text)
                    steps["group"].append(f"task-{g:06d}")
                    steps["trajectory"].append(f"trajectory-{g:06d}-{m}")
                    steps["step"].append(t)
                    steps["reward"].append(10.0 * (last and world.done))
                    steps["success"].append(world.done)
                    steps["action_valid"].append(command in seen.admissible)
    return {name: values if name == "texts" else np.array(values) for name, values in steps.items()}


def first_groups(steps: dict[str, Any], groups: int) -> dict[str, Any]:
    """The steps of the first `groups` groups; they lie group after group."""
    end = np.searchsorted(steps["group"], f"task-{groups:06d}")
    return {name: values[:end] for name, values in steps.items()}


def all_distinct(steps: dict[str, Any]) -> dict[str, Any]:
    """The same steps with two more words in every text that no other has together: nothing is counted once for many.

    Pairs of few words, so that the vocabulary is not cut, where the official code's choice among ties is not ours.
    """
    side = int(len(steps["texts"]) ** 0.5) + 1
    return {**steps, "texts": [f"{text} mark{i // side} spot{i % side}" for i, text in enumerate(steps["texts"])]}


def seconds(run: Callable[[], Any], repeat: int) -> float:
    """Median time of `run`, after one run that does not count."""
    run()
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def time_ours(steps: dict[str, Any], repeat: int) -> dict[str, Any]:
    """Seconds from raw texts and from counts on the device."""
    settings = proxmo()
    batch, _ = Group.from_steps(**steps)
    batch = jax.device_put(batch)
    run = jax.jit(batch_advantages)
    return {
        "groups": batch.reward.shape[0],
        "steps": len(steps["texts"]),
        "texts": len(set(steps["texts"])),
        "raw": seconds(lambda: steps_advantages(steps, settings), repeat),
        "counts": seconds(lambda: jax.block_until_ready(run(batch, settings)), repeat),
    }


def time_official(config: Config, steps: dict[str, Any]) -> dict[str, float]:
    """Seconds of the official code on the same steps, and how far its answers are from ours (by its own rules)."""
    assert config.official is not None
    ours = steps_advantages(steps, official())["advantage"]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "steps.npz", Path(folder) / "answer.npz"
        np.savez(source, **{**steps, "texts": np.array(steps["texts"])})
        command = [str(config.official_python), str(OFFICIAL), str(config.official), str(source), str(target)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=environment)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"--official: the official code failed under {config.official_python}: {last}")
        answer = np.load(target)
        return {"official": float(answer["seconds"]), "difference": float(np.abs(answer["advantage"] - ours).max())}


def kernel_memory() -> dict[str, dict[int, int]]:
    """Bytes of temporaries of the compiled program for one group of 8 x T turns of distinct texts, by kernel."""
    memory: dict[str, dict[int, int]] = {"dense": {}, "blockwise": {}}
    for kernel, sizes in memory.items():
        for turns in (50, 100, 200, 400, 800):
            shape, like = (1, 8, turns), jax.ShapeDtypeStruct
            group = Group(
                reward=like(shape, np.float32), mask=like(shape, bool), success=like((1, 8), bool),
                action_valid=like(shape, bool), embedding=like((*shape, 64), np.float32),
            )  # fmt: skip
            compiled = jax.jit(batch_advantages).lower(group, proxmo(kernel=kernel)).compile()
            analysis: Any = compiled.memory_analysis()
            sizes[turns] = analysis.temp_size_in_bytes
    return memory


MILLION = """
import json, resource, sys, time
import numpy as np
from rich.console import Console
from experiments.bench_estimator import play
from proxmo_jax.estimator.estimator import proxmo
from proxmo_jax.estimator.steps_file import steps_advantages
steps = play(128, 1, Console(stderr=True))
copies = -(-1_000_000 // len(steps["texts"]))
count = len(steps["texts"])
_, group = np.unique(steps["group"], return_inverse=True)
_, trajectory = np.unique(steps["trajectory"], return_inverse=True)
many = {name: np.tile(steps[name], copies) for name in ("step", "reward", "success", "action_valid")}
many["texts"] = steps["texts"] * copies
many["group"] = np.concatenate([group + i * (group.max() + 1) for i in range(copies)])
many["trajectory"] = np.concatenate([trajectory + i * (trajectory.max() + 1) for i in range(copies)])
began = time.perf_counter()
answer = steps_advantages(many, proxmo(), chunk=64)
took = time.perf_counter() - began
assert np.isfinite(answer["advantage"]).all()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"steps": count * copies, "seconds": took, "gigabytes": peak}))
"""


def million_steps() -> dict[str, float]:
    """A million steps from raw texts, compilation included, in a process of its own; its time and peak memory."""
    done = subprocess.run([sys.executable, "-c", MILLION], capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise UserError(f"the run over a million steps failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(config: Config, rows: list[dict], memory: dict[str, dict[int, int]], million: dict | None) -> str:
    """The measurements as Markdown."""
    device = jax.devices()[0]
    command = "proxmo bench estimator" + (" --official CHECKOUT" if config.official else "")
    lines = [
        f"## Estimator, {date.today().isoformat()}: `{command}`",
        "",
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {jax.device_count()} x {device.device_kind}; Python"
        f" {platform.python_version()}, jax {jax.__version__}, numpy {np.__version__}. Median of {config.repeat} runs;"
        " attempts of at most 50 turns at large generated houses, 8 a group. `raw`: from Python lists of texts to"
        " advantages in the same order, nothing counted before. `counts`: from word counts on the device. The last row:"
        " every text made distinct, the worst case.",
        "",
        "| groups | steps | distinct texts | raw ms | counts ms | us / step raw | official ms | raw times faster |"
        " counts times faster | largest difference (its rules) |",
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
    lines += ["", "Temporaries of the compiled program, one group of 8 attempts, every text distinct:", ""]
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
            f" {million['seconds']:.1f} s, the whole process at most {million['gigabytes']:.1f} GiB.",
        ]
    return "\n".join(lines)
