"""What a person sees of a run: progress on the terminal, `metrics.jsonl`, the learning curve, sample episodes."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar(console: Console) -> Progress:
    """Shows how far, the time left, and what is measured (`note`, two short lines, to fit 80 columns)."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


class Metrics:
    """`metrics.jsonl`: one object a line, flushed as it is written. Lines after `keep_until` are dropped at start."""

    def __init__(self, path: Path, keep_until: int | None = None):
        self.path = path
        kept = [row for row in read_metrics(path) if keep_until is not None and row["iteration"] <= keep_until]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(path)

    def write(self, row: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics file; a last line cut off by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def wilson(wins: int, count: int) -> tuple[float, float]:
    """95% Wilson interval of a success rate."""
    if count == 0:
        return 0.0, 1.0
    z, p = 1.96, wins / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def learning_curve(path: Path, runs: Sequence[tuple[str, list[dict]]], title: str) -> None:
    """Success on held-out games (with 95% intervals) over iterations, and in training, one colour per run."""
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150)
    for i, (label, rows) in enumerate(runs):
        colour = f"C{i}"
        trained = [(r["iteration"], r["train/success_rate"]) for r in rows if "train/success_rate" in r]
        if trained:
            x, y = zip(*trained, strict=True)
            window = max(1, len(y) // 40)
            smooth = [
                sum(y[max(0, k - window + 1) : k + 1]) / len(y[max(0, k - window + 1) : k + 1]) for k in range(len(y))
            ]
            axes.plot(x, smooth, color=colour, alpha=0.35, linewidth=1.2, label=f"{label}: training (sampled)")
        tested = [(r["iteration"], r["eval/success_rate"], r["eval/games"]) for r in rows if "eval/success_rate" in r]
        if tested:
            x, y, count = zip(*tested, strict=True)
            bounds = [wilson(round(p * n), n) for p, n in zip(y, count, strict=True)]
            axes.plot(x, y, color=colour, marker="o", markersize=4, label=f"{label}: held-out games")
            axes.fill_between(x, [b[0] for b in bounds], [b[1] for b in bounds], color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="iteration", ylabel="success rate", ylim=(0, 1), title=title)
    axes.grid(alpha=0.3)
    if len(runs) == 1:
        axes.legend(loc="lower right", fontsize=8)
    else:  # below, where it hides no curve
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=len(runs), fontsize=6)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def write_episodes(
    path: Path, tasks: Sequence[str], transcripts: Sequence[Sequence[tuple[str, str]]], won: Sequence[bool]
) -> None:
    """Sample episodes as text: what was seen (indented) and what was answered."""
    parts = []
    for task, turns, success in zip(tasks, transcripts, won, strict=True):
        parts.append(f"=== {task} — {'solved' if success else 'not solved'} in {len(turns)} turns\n")
        for seen, answer in turns:
            parts.append("".join(f"    {line}\n" for line in seen.splitlines() if line.strip()) + f"> {answer}\n")
        parts.append("\n")
    path.write_text("".join(parts))
