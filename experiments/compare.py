"""Compare finished runs: print a Markdown table of held-out success and times, and draw a figure.

python -m experiments.compare runs/proxmo-0 runs/gigpo-0 ... --figure compare.png
"""

import json
from pathlib import Path

import numpy as np
import tyro

from proxmo_jax.agent.report import learning_curve, read_metrics, wilson

HEADER = (
    "| method | seed | success after warm start | success after training | 95% interval | iterations | s / iteration |"
    " estimator share of the time |"
)


def main(runs: tyro.conf.Positional[tuple[Path, ...]], figure: Path | None = None) -> None:
    """Print one row per run; draw the learning curve of each method, averaged over its seeds."""
    print(HEADER)
    print("|---" * 8 + "|")
    by_method: dict[str, list[list[dict]]] = {}
    for run in runs:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        rows = read_metrics(run / "metrics.jsonl")
        tested = [r for r in rows if "eval/success_rate" in r]
        trained = [r for r in rows if "time/iteration" in r]
        count = tested[-1]["eval/games"]
        low, high = wilson(round(tested[-1]["eval/success_rate"] * count), count)
        seconds = np.median([r["time/iteration"] for r in trained])
        share = np.median([r["time/estimator"] / r["time/iteration"] for r in trained])
        print(
            f"| {config['preset']} | {config['seed']} | {tested[0]['eval/success_rate']:.0%} |"
            f" {tested[-1]['eval/success_rate']:.0%} | {low:.0%} to {high:.0%} | {rows[-1]['iteration']} |"
            f" {seconds:.2f} | {share:.2%} |"
        )
        by_method.setdefault(config["preset"], []).append(rows)
    if figure:
        curves = [
            (f"{m} ({len(all_rows)} {'run' if len(all_rows) == 1 else 'runs'})", _average(all_rows))
            for m, all_rows in by_method.items()
        ]
        learning_curve(figure, curves, "held-out household games, mean over runs")


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
    tyro.cli(main)
