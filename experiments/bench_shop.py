"""Time the shop engine: steps per second, search in a large catalogue, memory of many environments.

    proxmo bench shop                                 # generated products: 4,000, and a million to search in
    proxmo bench shop --catalogue DIR --traces FILE   # the steps of recorded episodes, on their catalogue

The upstream engine makes 50 to 80 steps per second (12 to 25 ms each, measured on a thousand products). The report is
printed and appended to BENCHMARKS.md.
"""

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from envs_bridge.shop.catalogue import Catalogue, Lines, prepare
from envs_bridge.shop.engine import Shopping
from envs_bridge.shop.expert import demonstrate
from envs_bridge.shop.generate import KINDS, generate_catalogue
from envs_bridge.shop.search import build_index
from experiments import bench
from proxmo_jax.agent.report import progress_bar, terminal

UPSTREAM = 80  # steps per second at best


@dataclass(frozen=True)
class Config:
    """What to time."""

    catalogue: Path | None = None
    """Folder with WebShop's data files; default: generated products."""
    traces: Path | None = None
    """Recorded episodes whose actions are replayed; default: a demonstrator's."""
    products: int = 1_000_000
    """Products of the catalogue for the search; word frequencies follow Zipf's law."""
    queries: int = 50
    environments: int = 128
    seconds: float = 5.0
    append: Path | None = Path("BENCHMARKS.md")
    """File to append the report to."""


def main(config: Config, console: Console | None = None) -> str:
    """Run the benchmark; returns the Markdown that was appended."""
    console = console or terminal()
    return bench.publish(measure(config, console), config.append, console)


def measure(config: Config, console: Console) -> str:
    """The measurements as Markdown."""
    bench.require_positive(config, ("products", "queries", "environments"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = config.catalogue or generate_catalogue(folder / "data")
        prepared = prepare(data, cache=folder)
        episodes = recorded(prepared, config.traces) if config.traces else demonstrated(prepared)
        small = time_engine({
            "folder": str(prepared), "episodes": episodes, "queries": [], "environments": config.environments,
            "seconds": config.seconds,
        })  # fmt: skip
        console.print(
            f"{small['steps_per_second']:,.0f} steps per second; next: search in {config.products:,} products"
        )
        began = time.time()
        with progress_bar(console) as bar:
            task = bar.add_task("indexing products", total=config.products, note="")
            large = large_catalogue(
                folder / "large", prepared, config.products, lambda count: bar.update(task, completed=count)
            )
        built = time.time() - began
        rng = random.Random(1)
        queries = [" ".join(words(rng, rng.randint(3, 20))) for _ in range(config.queries)]
        found = time_engine({
            "folder": str(large), "episodes": [], "queries": queries, "environments": config.environments, "seconds": 0,
        })  # fmt: skip
        size = sum(path.stat().st_size for path in large.iterdir() if not path.is_symlink()) / 2**20
    took, memory = sorted(found["queries"]), found["memory"]
    return "\n".join([
        bench.heading("Shop", "proxmo bench shop" + (" --catalogue DIR" if config.catalogue else "")
                      + (" --traces FILE" if config.traces else "")), "",
        f"{bench.host()}, one process.", "",
        f"{len(episodes)} episodes of {sum(len(a) for _, a in episodes)} steps: {small['steps_per_second']:,.0f} steps"
        f" per second with memoised searches, as in a training run, which is"
        f" {small['steps_per_second'] / UPSTREAM:.0f} times the {UPSTREAM} of the upstream engine;"
        f" {small['steps_per_second_anew']:,.0f} steps per second, {small['steps_per_second_anew'] / UPSTREAM:.0f}"
        f" times, if every session searches anew.",
        f"Search in {config.products:,} products, {config.queries} queries of 3 to 20 words: median"
        f" {statistics.median(took):.1f} ms, 95th percentile {took[int(0.95 * len(took))]:.1f} ms, maximum"
        f" {took[-1]:.1f} ms. The index takes {size:,.0f} MiB on disk and {built:.0f} s to build.",
        f"{config.environments} environments in one process share the index: {memory['own']:.0f} MiB of private"
        f" memory ({memory['own'] - memory['before']:.1f} of them for the environments and their searches) and"
        f" {memory['mapped']:,.0f} MiB mapped from files, which further processes share.",
    ])  # fmt: skip


def recorded(prepared: Path, traces: Path) -> list[tuple[int, list[str]]]:
    """(Goal number, recorded actions) per episode; only the goal's product matters for the speed of a session."""
    catalogue = Catalogue(prepared)
    goals = {catalogue.goal(i)["asin"]: i for i in range(catalogue.goal_count)}
    episodes = json.loads(traces.read_text(encoding="utf-8"))
    return [(goals.get(e["goal"]["asin"], 0), [s["action"] for s in e["steps"]]) for e in episodes]


def demonstrated(prepared: Path) -> list[tuple[int, list[str]]]:
    """(Goal number, actions) per episode of a demonstrator with some careless turns."""
    catalogue = Catalogue(prepared)
    return [
        (
            i,
            [
                turn.command
                for turn in demonstrate(Shopping(catalogue, catalogue.goal(i)), random.Random(i), 0.3, max_turns=15)
            ],
        )
        for i in range(min(64, catalogue.goal_count))
    ]


def words(rng: random.Random, count: int) -> list[str]:
    """Words with Zipf-distributed frequencies; the frequent ones are product words."""
    known = [word for kind in KINDS for word in kind.noun.split()]
    ranks = [int(30_000 ** rng.random()) for _ in range(count)]
    return [known[rank] if rank < len(known) else f"word{rank}" for rank in ranks]


def large_catalogue(folder: Path, prepared: Path, products: int, on_products: Callable[[int], None]) -> Path:
    """Write a catalogue of products with texts of about sixty words, and return its folder.

    Args:
        folder: to be created.
        prepared: the catalogue whose goals are used.
        products: their number.
        on_products: called with the number of products after every ten thousand.
    """
    folder.mkdir()
    for name in ("goals.jsonl", "goals.npy", "query.json", "category.json"):
        (folder / name).symlink_to(prepared / name)
    rows = np.arange(products, dtype=np.int32)
    for name, array in (
        ("asins", np.char.add("B", np.char.zfill(rows.astype(str), 9)).astype("S10")), ("rows", rows), ("ranks", rows),
        ("prices", rows + 1.0), ("query", 0 * rows), ("category", 0 * rows),
    ):  # fmt: skip
        np.save(folder / f"{name}.npy", array)

    def texts() -> Iterator[str]:
        rng = random.Random(0)
        with Lines(folder / "products") as lines:
            for row in range(products):
                text = " ".join(words(rng, rng.randint(20, 100)))
                lines.add({"asin": f"B{row:09d}", "title": text[:80], "price_tag": f"${row + 1.0}", "text": text})
                yield text
                if row % 10_000 == 9999:
                    on_products(row + 1)

    build_index(folder, texts())
    return folder


def time_engine(request: dict) -> dict:
    """The result of `experiments.shop_timing`."""
    command = [sys.executable, "-m", "experiments.shop_timing"]
    return json.loads(bench.run_child("timing the shop", command, request=request))
