"""A worker process: plays many environments for the pool, one batched message per turn. Never imports JAX.

Started as `python -m envs_bridge.worker ENGINE`: `fast` (ours) or `textworld` (ALFWorld's own). JSON lines over stdin
and a private copy of stdout (libraries print). Requests: {"reset": [[slot, game file], ...]} and {"step": [[slot,
command], ...]}; the answer is a list with one [text, admissible, reward, done, won, task] per entry, or {"error":
sentence}.
"""

import json
import os
import signal
import sys

from envs_bridge.household.engine import Household
from envs_bridge.household.genuine import GenuineHousehold
from envs_bridge.turn import Environment, Observation

VERSION = 1
ENGINES = {"fast": Household, "textworld": GenuineHousehold}


def _fields(seen: Observation, task: str) -> list:
    return [seen.text, seen.admissible, seen.reward, seen.done, seen.won, task]


def answer(request: dict, worlds: dict[int, Environment], engine) -> list:
    """Do one request on the worlds of this worker."""
    replies = []
    for slot, path in request.get("reset", []):
        worlds[slot] = engine.load(path)
        replies.append(_fields(worlds[slot].reset(), worlds[slot].task))
    for slot, command in request.get("step", []):
        replies.append(_fields(worlds[slot].step(command), worlds[slot].task))
    return replies


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worlds: dict[int, Environment] = {}
    engine = ENGINES[sys.argv[1]]
    print(json.dumps({"version": VERSION}), file=pipe, flush=True)
    for line in sys.stdin:
        try:
            reply: object = answer(json.loads(line), worlds, engine)
        except Exception as error:  # the trainer decides what to do about it; the worker lives on
            reply = {"error": str(error) or type(error).__name__}
        print(json.dumps(reply), file=pipe, flush=True)


if __name__ == "__main__":
    main()
