"""Time the household engines on the same games, what the worker pool adds to them, and the shop (`bench_shop`).

    proxmo bench env                                    # ours alone, on generated games
    proxmo bench env --games DIR --python PY            # beside ALFWorld's own, which PY has, on genuine games

Every engine plays the same commands on the same games in a process of its own, and must say the same. The pool plays
128 environments on `--workers` processes; what it adds is a turn's time less the environments' own, which is what the
same steps take in as many processes that play at once and say nothing. The table is printed and appended to
BENCHMARKS.md.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

from rich.console import Console

from envs_bridge.household.engine import Household
from envs_bridge.household.generate import generate_games
from envs_bridge.household.verify import command_for
from envs_bridge.pool import Pool
from experiments import bench_shop
from proxmo_jax.agent.report import terminal, watched
from proxmo_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    "fast": "ours",
    "textworld": "TextWorld, repeated work remembered",
    "textworld-stock": "TextWorld as it is",
}


@dataclass(frozen=True)
class Config:
    """What to time."""

    games: Path | None = None
    """Folder with game.tw-pddl files, at any depth; default: large generated houses."""
    at_most: int = 8
    """Games to play of it."""
    steps: int = 30
    """Commands in each game."""
    python: Path | None = None
    """Interpreter that has the packages alfworld and textworld; without it ours is timed alone."""
    environments: int = 128
    """Environments in the pool."""
    turns: int = 200
    workers: int = 2
    seed: int = 0
    shop_products: int = 1_000_000
    """Products of the shop's catalogue that is searched in; 0: the shop is not timed."""
    append: Path | None = Path("BENCHMARKS.md")
    """File to append the table to."""


def main(config: Config, console: Console | None = None) -> str:
    """Run the benchmark; returns the Markdown that was appended."""
    console = console or terminal()
    if config.shop_products < 0:
        raise UserError(f"--shop-products must be at least 0, got {config.shop_products}")
    for name in ("at_most", "steps", "environments", "turns", "workers"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    with tempfile.TemporaryDirectory() as folder:
        if config.games is None:
            games = generate_games(Path(folder), split="train", count=config.at_most, seed=config.seed, level="hard")
        else:
            games = sorted(config.games.rglob("game.tw-pddl"))
            games = games[:: -(-len(games) // config.at_most)] if games else []
            if not games:
                raise UserError(f"--games: {config.games} holds no game.tw-pddl file")
        episodes = [(str(game), script(str(game), config.steps, config.seed)) for game in games]
        engines = ["fast"] if config.python is None else list(NAMES)
        timings = {}
        for engine in watched(engines, "timing engines", console, len(engines)):
            timings[engine] = time_engine(engine, episodes, config)
        pool = time_pool([game for game, _ in episodes], config)
    text = report(config, len(games), timings, pool)
    if config.shop_products:
        options = bench_shop.Config(products=config.shop_products, append=None)
        text += "\n\n" + bench_shop.measure(options, console)
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    if config.append is not None:
        with config.append.open("a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")
    return text


def script(game: str, steps: int, seed: int) -> list[str]:
    """Commands for one game, half of them the expert's, until it is won."""
    world, rng = Household.load(game), random.Random(f"{seed}/{game}")
    seen, commands = world.reset(), []
    for _ in range(steps):
        commands.append(command_for(world, seen, rng, 0.5))
        seen = world.step(commands[-1])
        if seen.done:
            break
    return commands


def time_engine(engine: str, episodes: list, config: Config) -> dict:
    """One engine in a process of its own."""
    python = str(config.python) if config.python and engine != "fast" else sys.executable
    return ask_timing(python, {"engine": engine, "episodes": episodes, "further": 256 if engine == "fast" else 8})


def ask_timing(python: str, request: dict) -> dict:
    """`experiments.engine_timing`'s answer. Raises UserError with what it said last."""
    done = subprocess.run(
        [python, "-m", "experiments.engine_timing"],
        input=json.dumps(request),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        cwd=ROOT,
        check=False,
    )
    if done.returncode:
        raise UserError(f"timing an engine failed: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def time_pool(games: list[str], config: Config) -> dict[str, float]:
    """Median seconds of a turn of the pool, and of the same turn in as many processes that say nothing to anybody."""
    count, rng = config.environments, random.Random(config.seed)
    files = [games[i // 8 % len(games)] for i in range(count)]
    took, turns = [], []
    with Pool(config.workers) as pool:
        seen = [started[0] for started in pool.reset(list(enumerate(files))) if started]
        if len(seen) < count:
            raise UserError(f"the pool could not start its games: {pool.fault}")
        for _ in range(config.turns):
            turns.append([rng.choice(s.admissible) for s in seen])
            began = time.perf_counter()
            answers = pool.step(list(enumerate(turns[-1])))
            took.append(time.perf_counter() - began)
            seen = [answer or s for answer, s in zip(answers, seen, strict=True)]
    # A game that is won says the same for ever, here and there.
    shares = [[slot for slot in range(count) if slot // 8 % config.workers == w] for w in range(config.workers)]
    at = time.time() + 2.0  # by then all have loaded their games
    requests = [
        {"games": [files[i] for i in slots], "turns": [[turn[i] for i in slots] for turn in turns], "at": at}
        for slots in shares
    ]
    with ThreadPoolExecutor(len(shares)) as threads:
        own = [answer["turn"] for answer in threads.map(partial(ask_timing, sys.executable), requests)]
    return {"turn": statistics.median(took), "own": max(own)}


def report(config: Config, games: int, timings: dict[str, dict], pool: dict[str, float]) -> str:
    """The measurements as Markdown."""
    options = f"{' --games DIR' if config.games else ''}{' --python PY' if config.python else ''}"
    what = "genuine games" if config.games else "large generated houses"
    slowest = timings.get("textworld-stock")
    lines = [
        f"## Environments, {date.today().isoformat()}: `proxmo bench env{options}`",
        "",
        f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}; {games} {what}, the"
        f" same {timings['fast']['steps']} commands in each engine, one process each; medians over games.",
        "",
        "| engine | ms a step | steps / s | times stock | load and first reset ms | times stock | later reset ms |"
        " times stock | MiB a further environment | says the same |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for engine, timing in timings.items():
        step = timing["seconds"] / timing["steps"]
        first, again = (statistics.median(timing[name]) for name in ("first", "again"))
        cells = [NAMES[engine], f"{1e3 * step:.3f}", f"{1 / step:,.0f}"]
        if slowest:
            stock = [
                slowest["seconds"] / slowest["steps"],
                *(statistics.median(slowest[n]) for n in ("first", "again")),
            ]
            ratios = [f"{slow / fast:,.0f}" for slow, fast in zip(stock, (step, first, again), strict=True)]
        else:
            ratios = ["-"] * 3
        cells += [ratios[0], f"{1e3 * first:.2f}", ratios[1], f"{1e3 * again:.3f}", ratios[2], f"{timing['mib']:.3f}"]
        cells.append("yes" if timing["said"] == timings["fast"]["said"] else "NO")
        lines.append("| " + " | ".join(cells) + " |")
    added = pool["turn"] - pool["own"]
    lines += [
        "",
        f"Pool: {config.environments} environments on {config.workers} workers, {1e3 * pool['turn']:.2f} ms a turn, of"
        f" which {1e3 * pool['own']:.2f} ms are the environments' own; added: {1e3 * added:.2f} ms (medians of"
        f" {config.turns} turns).",
    ]
    return "\n".join(lines)
