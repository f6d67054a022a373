"""Time the shop engine: steps a second, search over a large catalogue, memory of many environments.

    proxmo bench shop                                 # invented products: 4,000, and a million to search in
    proxmo bench shop --catalogue DIR --traces FILE   # the steps of recorded episodes, on their catalogue

The genuine engine makes 50 to 80 steps a second (12 to 25 ms each, measured on a thousand products). The table is
printed and appended to BENCHMARKS.md.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from rich.console import Console

from envs_bridge.shop.catalogue import Catalogue, Lines, prepare
from envs_bridge.shop.engine import Shopping
from envs_bridge.shop.expert import demonstrate
from envs_bridge.shop.generate import KINDS, generate_catalogue
from envs_bridge.shop.search import build_index
from proxmo_jax.agent.report import progress_bar, terminal
from proxmo_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
GENUINE = 80  # steps a second at best


@dataclass(frozen=True)
class Config:
    """What to time."""

    catalogue: Path | None = None
    """Folder with WebShop's data files; default: invented products."""
    traces: Path | None = None
    """Recorded episodes whose actions are played; default: a demonstrator's."""
    products: int = 1_000_000
    """Products of the catalogue that is searched in: texts of words as frequent as in a language."""
    queries: int = 50
    environments: int = 128
    seconds: float = 5.0
    append: Path | None = Path("BENCHMARKS.md")
    """File to append the table to."""


def main(config: Config, console: Console | None = None) -> str:
    """Run the benchmark; returns the Markdown that was appended."""
    console = console or terminal()
    text = measure(config, console)
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    if config.append is not None:
        with config.append.open("a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")
    return text


def measure(config: Config, console: Console) -> str:
    """The measurements as Markdown."""
    for name in ("products", "queries", "environments"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(config, name)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = config.catalogue or generate_catalogue(folder / "data")
        prepared = prepare(data, cache=folder)
        episodes = recorded(prepared, config.traces) if config.traces else demonstrated(prepared)
        small = ask({
            "folder": str(prepared), "episodes": episodes, "queries": [], "environments": config.environments,
            "seconds": config.seconds,
        })  # fmt: skip
        console.print(f"{small['steps_per_second']:,.0f} steps a second; now {config.products:,} products to search in")
        began = time.time()
        with progress_bar(console) as bar:
            task = bar.add_task("laying out products", total=config.products, note="")
            large = large_catalogue(
                folder / "large", prepared, config.products, lambda count: bar.update(task, completed=count)
            )
        built = time.time() - began
        rng = random.Random(1)
        queries = [" ".join(words(rng, rng.randint(3, 20))) for _ in range(config.queries)]
        found = ask({
            "folder": str(large), "episodes": [], "queries": queries, "environments": config.environments, "seconds": 0,
        })  # fmt: skip
        size = sum(path.stat().st_size for path in large.iterdir() if not path.is_symlink()) / 2**20
    took, memory = sorted(found["queries"]), found["memory"]
    return "\n".join([
        f"## Shop, {date.today().isoformat()}: `proxmo bench shop"
        f"{' --catalogue DIR' if config.catalogue else ''}{' --traces FILE' if config.traces else ''}`", "",
        f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, one process.", "",
        f"{len(episodes)} episodes of {sum(len(a) for _, a in episodes)} steps: {small['steps_per_second']:,.0f} steps"
        f" a second, {small['steps_per_second'] / GENUINE:.0f} times the genuine engine's {GENUINE}, what was searched"
        f" for remembered, as in a run; {small['steps_per_second_anew']:,.0f},"
        f" {small['steps_per_second_anew'] / GENUINE:.0f} times, where every session searches anew.",
        f"Search in {config.products:,} products, {config.queries} queries of 3 to 20 words: median"
        f" {statistics.median(took):.1f} ms, 95% {took[int(0.95 * len(took))]:.1f} ms, slowest {took[-1]:.1f} ms. The"
        f" index takes {size:,.0f} MiB on disk and {built:.0f} s to build.",
        f"{config.environments} environments in one process share it: {memory['own']:.0f} MiB of the process's own"
        f" ({memory['own'] - memory['before']:.1f} of them the environments' and their searches'),"
        f" {memory['mapped']:,.0f} MiB mapped from files, which further processes share.",
    ])  # fmt: skip


def recorded(prepared: Path, traces: Path) -> list[tuple[int, list[str]]]:
    """The recorded actions, each beside the goal of the same product (what a session does depends on no more)."""
    catalogue = Catalogue(prepared)
    goals = {catalogue.goal(i)["asin"]: i for i in range(catalogue.goal_count)}
    episodes = json.loads(traces.read_text(encoding="utf-8"))
    return [(goals.get(e["goal"]["asin"], 0), [s["action"] for s in e["steps"]]) for e in episodes]


def demonstrated(prepared: Path) -> list[tuple[int, list[str]]]:
    """Episodes of a demonstrator that is careless now and then."""
    catalogue = Catalogue(prepared)
    return [
        (i, [c for _, c in demonstrate(Shopping(catalogue, catalogue.goal(i)), random.Random(i), 0.3, max_turns=15)])
        for i in range(min(64, catalogue.goal_count))
    ]


def words(rng: random.Random, count: int) -> list[str]:
    """Words as frequent as in a language (Zipf), the frequent ones product words."""
    known = [word for kind in KINDS for word in kind.noun.split()]
    ranks = [int(30_000 ** rng.random()) for _ in range(count)]
    return [known[rank] if rank < len(known) else f"word{rank}" for rank in ranks]


def large_catalogue(folder: Path, prepared: Path, products: int, on_products: Callable[[int], None]) -> Path:
    """A catalogue of so many products with texts of some sixty words; the goals are another's. `on_products(count)` is
    told of every ten thousand."""
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


def ask(request: dict) -> dict:
    """`shop_timing`'s answer. Raises UserError with what it said last."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.shop_timing"], input=json.dumps(request), cwd=ROOT, check=False,
        capture_output=True, encoding="utf-8", errors="replace",
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"timing the shop failed: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
