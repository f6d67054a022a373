"""Compare finished runs: print a Markdown table of held-out success and times, and draw a figure.

python -m experiments.compare runs/proxmo-0 runs/gigpo-0 ... --figure compare.png
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from proxmo_jax.agent.report import learning_curve, read_metrics, wilson
from proxmo_jax.agent.settings import of_preset
from proxmo_jax.errors import UserError

HEADER = (
    "| method | seed | success after warm start | success after training | 95% interval | iterations | s / iteration |"
    " estimator share of the time |"
)


def main(runs: tyro.conf.Positional[tuple[Path, ...]], figure: Path | None = None) -> None:
    """Print one row per run; draw the learning curve of each method, averaged over its seeds."""
    print(HEADER)
    print("|---" * 8 + "|")
    by_method: dict[str, list[list[dict]]] = {}
    environments: dict[str, None] = {}
    for run in runs:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        method, rows = method_of(config), read_metrics(run / "metrics.jsonl")
        tested = [r for r in rows if "eval/success_rate" in r]
        trained = [r for r in rows if "time/iteration" in r]
        if not (tested and trained):
            raise UserError(f"{run}: has no iteration or no evaluation yet; need a run that has both")
        count = tested[-1]["eval/games"]
        low, high = wilson(round(tested[-1]["eval/success_rate"] * count), count)
        seconds = np.median([r["time/iteration"] for r in trained])
        share = np.median([r["time/estimator"] / r["time/iteration"] for r in trained])
        print(
            f"| {method} | {config['seed']} | {tested[0]['eval/success_rate']:.0%} |"
            f" {tested[-1]['eval/success_rate']:.0%} | {low:.0%} to {high:.0%} | {rows[-1]['iteration']} |"
            f" {seconds:.2f} | {share:.2%} |"
        )
        by_method.setdefault(method, []).append(rows)
        environments.setdefault(config["env"]["name"])
    if figure:
        curves = [
            (f"{m} ({len(all_rows)} {'run' if len(all_rows) == 1 else 'runs'})", _average(all_rows))
            for m, all_rows in by_method.items()
        ]
        learning_curve(figure, curves, f"held-out {' and '.join(environments)} games, mean over runs")


def method_of(config: dict[str, Any]) -> str:
    """The preset of a run's settings, and what its estimator has otherwise: 'gagpo, aggregation soft'."""
    usual = dataclasses.asdict(of_preset(config["preset"]).estimator)
    found = config.get("estimator", {})
    return ", ".join([config["preset"], *(f"{k} {found[k]}" for k in usual if found.get(k, usual[k]) != usual[k])])


def _average(runs: list[list[dict]]) -> list[dict]:
    """Mean of the rows of several runs at iterations that all of them have; numbers of games are added up."""
    averaged = []
    for parts in zip(*runs, strict=False):
        row = {"iteration": parts[0]["iteration"]}
        for key in ("train/success_rate", "eval/success_rate"):
            if all(key in part for part in parts):
                row[key] = float(np.mean([part[key] for part in parts]))
        if "eval/success_rate" in row:
            row["eval/games"] = sum(part["eval/games"] for part in parts)
        averaged.append(row)
    return averaged


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UserError as error:
        sys.exit(str(error))
