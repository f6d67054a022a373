"""Time one household engine in this process; `bench_env` starts one such process per engine. Imports no JAX.

Standard input: {"engine": ..., "episodes": [[game file, [command, ...]], ...], "further": N}. Standard output, one JSON
line: seconds of the first load and reset and of a later reset, by game; seconds and number of steps; MiB per further
environment, over N of them; a hash of the transcripts. Or input {"games": [game file, ...], "turns": [[a command for
each game], ...], "at": unix time}: many environments of our engine, stepped together from that time on; output: median
seconds of a turn.
"""

import gc
import hashlib
import json
import os
import statistics
import sys
import time
from pathlib import Path

from envs_bridge.worker import ENGINES


def main() -> None:
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print to standard output
    request = json.load(sys.stdin)
    result = side_by_side(request) if "turns" in request else one_by_one(request)
    print(json.dumps(result), file=pipe, flush=True)


def side_by_side(request: dict) -> dict:
    """Step all environments in every turn; the start time lets several processes play concurrently."""
    worlds = [ENGINES["fast"](game) for game in request["games"]]
    for world in worlds:
        world.reset()
    took = []
    time.sleep(max(request["at"] - time.time(), 0))
    for commands in request["turns"]:
        began = time.perf_counter()
        for world, command in zip(worlds, commands, strict=True):
            world.step(command)
        took.append(time.perf_counter() - began)
    return {"turn": statistics.median(took)}


def one_by_one(request: dict) -> dict:
    """Play one episode after the other."""
    load = ENGINES[request["engine"]]
    first, again, steps, count = [], [], 0.0, 0
    transcript = hashlib.sha256()
    for game, commands in request["episodes"]:
        began = time.perf_counter()
        world = load(game)
        world.reset()
        loaded = time.perf_counter()
        seen = world.reset()
        first.append(loaded - began)
        again.append(time.perf_counter() - loaded)
        observations = [seen]
        began = time.perf_counter()
        for command in commands:
            observations.append(world.step(command))
        steps += time.perf_counter() - began
        count += len(commands)
        transcript.update(repr([(s.text, s.admissible, s.won) for s in observations]).encode())
    games = [game for game, _ in request["episodes"]]
    gc.collect()
    before = resident()
    worlds = [load(games[i % len(games)]) for i in range(request["further"])]
    for world in worlds:
        world.reset()
    gc.collect()
    further = (resident() - before) / max(len(worlds), 1)
    times = {"first": first, "again": again, "seconds": steps, "steps": count}
    return {**times, "mib": further, "transcript": transcript.hexdigest()}


def resident() -> float:
    """Resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
