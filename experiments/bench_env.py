"""Time the household engines on the same games, the overhead of the worker pool, and the shop (`bench_shop`).

    proxmo bench env                                    # our engine alone, on generated games
    proxmo bench env --games DIR --python PY            # and ALFWorld's engine, from the packages of PY

Every engine plays the same commands on the same games in a process of its own; the transcripts must be identical. The
pool plays 128 environments on `--workers` processes. Its overhead is the time of a turn minus that of the environments
themselves: the same steps in as many concurrent processes that exchange no messages. The report is printed and appended
to BENCHMARKS.md.
"""

import json
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from envs_bridge.household.engine import Household
from envs_bridge.household.generate import generate_games
from envs_bridge.household.verify import command_for
from envs_bridge.pool import Pool
from experiments import bench, bench_shop
from proxmo_jax.agent.report import terminal, watched
from proxmo_jax.errors import UserError

NAMES = {"fast": "proxmo-jax", "textworld": "TextWorld, memoised", "textworld-stock": "TextWorld, unmodified"}


@dataclass(frozen=True)
class Config:
    """What to time."""

    games: Path | None = None
    """Folder with game.tw-pddl files, at any depth; default: large generated houses."""
    at_most: int = 8
    """Number of its games to play."""
    steps: int = 30
    """Commands per game."""
    python: Path | None = None
    """Interpreter that has the packages alfworld and textworld; without it only our engine is timed."""
    environments: int = 128
    """Environments in the pool."""
    turns: int = 200
    workers: int = 2
    seed: int = 0
    shop_products: int = 1_000_000
    """Products of the shop's catalogue for the search; 0: the shop is not timed."""
    append: Path | None = Path("BENCHMARKS.md")
    """File to append the report to."""


def main(config: Config, console: Console | None = None) -> str:
    """Run the benchmark; returns the Markdown that was appended."""
    console = console or terminal()
    if config.shop_products < 0:
        raise UserError(f"--shop-products must be at least 0, got {config.shop_products}")
    bench.require_positive(config, ("at_most", "steps", "environments", "turns", "workers"))
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
    return bench.publish(text, config.append, console)


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
    return time_child(python, {"engine": engine, "episodes": episodes, "further": 256 if engine == "fast" else 8})


def time_child(python: str, request: dict) -> dict:
    """The result of `experiments.engine_timing` under an interpreter."""
    return json.loads(bench.run_child("timing an engine", [python, "-m", "experiments.engine_timing"], request=request))


def time_pool(games: list[str], config: Config) -> dict[str, float]:
    """Median seconds of a turn of the pool, and of the same turn in as many processes without messages."""
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
            stepped = pool.step(list(enumerate(turns[-1])))
            took.append(time.perf_counter() - began)
            seen = [new or old for new, old in zip(stepped, seen, strict=True)]
    # A game that is won repeats its last observation, so both sides can go on after the end of an episode.
    shares = [[slot for slot in range(count) if slot // 8 % config.workers == w] for w in range(config.workers)]
    at = time.time() + 2.0  # by then all have loaded their games
    requests = [
        {"games": [files[i] for i in slots], "turns": [[turn[i] for i in slots] for turn in turns], "at": at}
        for slots in shares
    ]
    with ThreadPoolExecutor(len(shares)) as threads:
        own = [timing["turn"] for timing in threads.map(partial(time_child, sys.executable), requests)]
    return {"turn": statistics.median(took), "own": max(own)}


def report(config: Config, games: int, timings: dict[str, dict], pool: dict[str, float]) -> str:
    """The measurements as Markdown."""
    options = f"{' --games DIR' if config.games else ''}{' --python PY' if config.python else ''}"
    what = "ALFWorld games" if config.games else "large generated houses"
    slowest = timings.get("textworld-stock")
    lines = [
        bench.heading("Environments", f"proxmo bench env{options}"),
        "",
        f"{bench.host()}. {games} {what}, the same {timings['fast']['steps']} commands in each engine, one process per"
        " engine; medians over games. Speed-ups are over unmodified TextWorld.",
        "",
        "| engine | ms / step | steps / s | speed-up | load and first reset, ms | speed-up | later reset, ms |"
        " speed-up | MiB per further environment | identical transcripts |",
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
        cells.append("yes" if timing["transcript"] == timings["fast"]["transcript"] else "NO")
        lines.append("| " + " | ".join(cells) + " |")
    overhead = pool["turn"] - pool["own"]
    lines += [
        "",
        f"Worker pool: a turn of {config.environments} environments on {config.workers} workers takes"
        f" {1e3 * pool['turn']:.2f} ms, of which the environments themselves take {1e3 * pool['own']:.2f} ms. The"
        f" overhead of the pool is {1e3 * overhead:.2f} ms (medians of {config.turns} turns).",
    ]
    return "\n".join(lines)
