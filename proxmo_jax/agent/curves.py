"""Learning curves as plain numbers, from the rows of metrics.jsonl."""

import math
from collections.abc import Sequence
from typing import Any

from proxmo_jax.agent.report import wilson

MOST_POINTS = 600  # of a curve; more are averaged
SHARES = ("rollout", "estimator", "update", "eval")
MORE = {
    "train/valid_action_rate": "valid actions",
    "train/mixed_groups": "mixed groups",
    "train/turns": "turns of an episode",
    "train/reward": "reward",
    "loss/entropy": "entropy of tokens",
    "loss/kl": "KL to the reference",
}


def curves(rows: Sequence[dict]) -> dict[str, Any]:
    """What the page draws of a run.

    Args:
        rows: of metrics.jsonl.

    Returns:
        `train` and each of `kinds` and `more`: points [iteration, value]; `eval`: [iteration, rate, low, high], with
        the 95% interval; `kinds_of`: whose success the task types' is; `time`: [iteration, seconds] by part.
    """
    held_out = []
    for row in rows:
        rate, games = _number(row, "eval/success_rate"), _number(row, "eval/games")
        if rate is not None and games:
            held_out.append([row["iteration"], rate, *wilson(round(rate * games), round(games))])
    tested = any(name.startswith("eval/success_rate/") for row in rows for name in row)
    prefix = "eval/success_rate/" if tested else "train/success_rate/"
    kinds = sorted({name for row in rows for name in row if name.startswith(prefix)})
    return {
        "train": _points(rows, "train/success_rate"),
        "eval": held_out,
        "kinds": {name.removeprefix(prefix): _points(rows, name) for name in kinds},
        "kinds_of": "held-out tasks" if tested else "training tasks",
        "time": {part: points for part in SHARES if (points := _points(rows, f"time/{part}"))},
        "more": {label: points for name, label in MORE.items() if (points := _points(rows, name))},
    }


def _points(rows: Sequence[dict], name: str) -> list[list[float]]:
    """[iteration, value] of a metric; several that follow each other are averaged where there would be too many."""
    found = [(row["iteration"], value) for row in rows if (value := _number(row, name)) is not None]
    size = math.ceil(len(found) / MOST_POINTS) or 1
    parts = [found[at : at + size] for at in range(0, len(found), size)]
    return [[part[-1][0], float(f"{sum(y for _, y in part) / len(part):.5g}")] for part in parts]


def _number(row: dict, name: str) -> float | None:
    """A metric of a row, None if it is not a finite number."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
