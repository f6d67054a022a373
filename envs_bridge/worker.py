"""A worker process: plays many environments for the pool, one batched message per turn. Never imports JAX.

Started as `python -m envs_bridge.worker ENGINE`: `fast` (ours) or `textworld` (ALFWorld's own). JSON lines over stdin
and a private copy of stdout (libraries print). Requests: {"reset": [[slot, game file], ...]} and {"step": [[slot,
command], ...]}; the answer is a list with one [text, admissible, reward, done, won, task] per entry, or a sentence for
an entry that could not be done.
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
    replies: list = []
    for verb in ("reset", "step"):
        for slot, text in request.get(verb, []):
            try:
                if verb == "reset":
                    worlds.pop(slot, None)
                    worlds[slot] = engine.load(text)
                    seen = worlds[slot].reset()
                elif slot in worlds:
                    seen = worlds[slot].step(text)
                else:
                    raise ValueError(f"slot {slot} has no game")
                replies.append(_fields(seen, worlds[slot].task))
            except Exception as error:  # one broken game is not the end of the others
                replies.append(str(error) or type(error).__name__)
    return replies


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worlds: dict[int, Environment] = {}
    engine = ENGINES[sys.argv[1]]
    print(json.dumps({"version": VERSION}), file=pipe, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), worlds, engine)), file=pipe, flush=True)


if __name__ == "__main__":
    main()
