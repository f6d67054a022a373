"""`proxmo train`, stopped again and again: each process is a fork of this one, so that the imports are paid once.

python tests/killed_runs.py FOLDER EVENTS SEED OPTION...

Trains FOLDER/whole without a break, and FOLDER/broken with a signal at each of EVENTS, resumed after each; prints a
JSON list of what happened. An event is the signal (kill, term or int), and when: `warm` (after a checkpoint of the warm
start), `save` (while one of the iterations is written) or `run` (after an iteration).
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from proxmo_jax import cli
from proxmo_jax.agent import train  # noqa: F401  (imported before the first fork; no device is touched)

LIMIT = 600.0  # seconds until an event
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
UNFINISHED = "checkpoints/*.orbax-checkpoint-tmp*"


def start(arguments: list[str], log: Path) -> int:
    """Run the command in a process of its own; its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
        code = cli.main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def status(child: int) -> int:
    """Its exit status once it has ended; minus the signal's number for a killed one."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count(folder: Path, pattern: str) -> int:
    return len(list(folder.glob(pattern)))


def progress(out: Path, when: str) -> int:
    """What grows when the moment has come."""
    if when == "warm":
        names = [path.name for path in (out / "warm_start" / "checkpoints").glob("*")]
        return max((int(name) for name in names if name.isdecimal()), default=0)
    return count(out, UNFINISHED) if when == "save" else rows(out)


def rows(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0


def main(folder: Path, events: list[str], seed: int, options: list[str]) -> None:
    rng, log = random.Random(seed), folder / "log.txt"
    whole = ["train", "--out", str(folder / "whole"), *options]
    story = [{"event": "whole", "status": status(start(whole, log))}]
    out, resume = folder / "broken", []
    for event in events:
        name, when = event.split("-")
        before = progress(out, when) if when != "save" else 0
        child, began = start(["train", "--out", str(out), *(resume or options)], log), time.time()
        while not ended(child) and time.time() < began + LIMIT:
            if progress(out, when) > before:
                if when != "save":
                    break
                os.kill(child, signal.SIGSTOP)  # the save could end before the next signal
                if progress(out, when) > before:
                    break
                os.kill(child, signal.SIGCONT)
            time.sleep(0.001)
        if when != "save":
            time.sleep(rng.uniform(0.0, 0.15))
        os.kill(child, SIGNALS[name])
        sent = time.time()
        found = {"event": event, "status": status(child), "seconds": round(time.time() - sent, 2), "rows": rows(out)}
        story.append({**found, "unfinished": count(out, UNFINISHED) + count(out, f"warm_start/{UNFINISHED}")})
        resume = ["--resume"]
    story.append({"event": "end", "status": status(start(["train", "--out", str(out), *resume], log))})
    print(json.dumps(story))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3]), sys.argv[4:])
