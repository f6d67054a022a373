"""Runs that are killed at any moment, or asked to stop, end with the numbers of a run that nothing interrupted.

PROXMO_KILLS=20 makes it twenty moments instead of three, drawn at random.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import ONE_DEVICE, SMALL

from proxmo_jax.agent.report import read_metrics

SCRIPT = Path(__file__).parents[1] / "killed_runs.py"


def numbers(folder: Path) -> list[dict]:
    """The metrics without what a clock has measured."""
    return [
        {name: value for name, value in row.items() if not name.startswith(("time/", "perf/"))}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def numbered(folder: Path, iteration: int) -> dict:
    """How words are numbered in a checkpoint."""
    path = folder / "checkpoints" / str(iteration) / "progress" / "metadata"
    found = json.loads(path.read_text(encoding="utf-8"))["numbered"]
    assert len(found["words"]) > 20
    return found


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_is_the_run_that_was_not(tmp_path):
    """Killed in the warm start and while a checkpoint is written; stopped by Ctrl-C in between."""
    events, steps, iterations = ["kill-warm", "kill-save", "int-run"], 12, 8
    if count := int(os.environ.get("PROXMO_KILLS", "0")):
        draw = random.Random(count)
        in_warm_start = sorted(draw.choice(("kill-warm", "term-warm")) for _ in range(count // 4))
        events = in_warm_start + [
            draw.choice(("kill-save", "kill-save", "kill-run", "term-run")) for _ in range(count - count // 4)
        ]
        steps, iterations = 4 * count, 10 + count
    # A checkpoint after every step and iteration.
    options = f"--output.save-minutes 1e-6 --warm-start.steps {steps} --iterations {iterations}".split()
    command = [sys.executable, str(SCRIPT), str(tmp_path), ",".join(events), "0", *SMALL, *options]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", timeout=3000, check=False,
        env={**os.environ, **ONE_DEVICE, "PYTHONPATH": str(SCRIPT.parents[1])},
    )  # fmt: skip
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert done.returncode == 0, done.stderr + log
    story = json.loads(done.stdout.splitlines()[-1])
    print(*story, sep="\n")
    for part in story:
        assert part["status"] == (-9 if part["event"].startswith("kill") else 0), (part, log)
        assert part["event"] != "kill-save" or part["unfinished"]  # it was killed while it wrote
    assert "The warm start goes on after step" in log
    assert log.count("Stopped and saved after") == sum(not event.startswith("kill") for event in events)
    whole, broken = numbers(tmp_path / "whole"), numbers(tmp_path / "broken")
    assert [row["iteration"] for row in whole] == list(range(iterations + 1))
    assert broken == whole
    # Advantages are rounded by it, which not every rollout shows.
    assert numbered(tmp_path / "broken", iterations) == numbered(tmp_path / "whole", iterations)
    assert not list((tmp_path / "broken").rglob("*.orbax-checkpoint-tmp*"))
