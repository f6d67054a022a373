"""Time the shop engine in this process; `bench_shop` starts such processes. Imports no JAX.

Standard input: {"folder": prepared catalogue, "episodes": [[goal number, [action, ...]], ...], "queries": [...],
"environments": N, "seconds": S}. Standard output, one JSON line: steps per second over the episodes, repeated for S
seconds, with memoised searches and without; milliseconds of each query; MiB of private memory before and after N
environments were opened and had searched, and MiB mapped from the catalogue's files, which processes share.
"""

import json
import os
import sys
import time
from pathlib import Path

from envs_bridge.shop.catalogue import Catalogue
from envs_bridge.shop.engine import Shopping


def main() -> None:
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    catalogue = Catalogue(Path(request["folder"]))
    result: dict = {"queries": [milliseconds(catalogue, query) for query in request["queries"]]}
    before = memory()["own"]
    worlds = [Shopping(catalogue, catalogue.goal(i % catalogue.goal_count)) for i in range(request["environments"])]
    for world in worlds:
        world.reset()
        world.step(f"search[{world.task}]")
    result["memory"] = {"before": before, **memory()}
    for name, forget in (("steps_per_second", False), ("steps_per_second_anew", True)):
        result[name] = steps_per_second(catalogue, request["episodes"], request["seconds"], forget)
    print(json.dumps(result), file=pipe, flush=True)


def milliseconds(catalogue: Catalogue, query: str) -> float:
    """Milliseconds of a search that is not memoised; a first search brings its postings into the page cache."""
    catalogue._results(query)
    began = time.perf_counter()
    catalogue._results(query)
    return 1e3 * (time.perf_counter() - began)


def steps_per_second(catalogue: Catalogue, episodes: list, seconds: float, forget: bool) -> float:
    """Steps per second over new sessions of the same episodes.

    Searches and products are memoised between sessions, as in a run whose groups share a goal; with `forget` the caches
    are cleared before each session.
    """
    count, began = 0, time.perf_counter()
    while episodes and time.perf_counter() - began < seconds:
        for number, actions in episodes:
            if forget:
                catalogue.search.cache_clear()
                catalogue.product.cache_clear()
            world = Shopping(catalogue, catalogue.goal(number))
            world.reset()
            for action in actions:
                world.step(action)
            count += len(actions)
    return count / max(time.perf_counter() - began, 1e-9)


def memory() -> dict[str, float]:
    """MiB of private memory and of mapped files."""
    found = {"own": 0.0, "mapped": 0.0}
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == "Anonymous":
            found["own"] = int(value.split()[0]) / 1024
        elif name == "Rss":
            found["mapped"] = int(value.split()[0]) / 1024
    return {"own": found["own"], "mapped": found["mapped"] - found["own"]}


if __name__ == "__main__":
    main()
