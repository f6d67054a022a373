"""What a study is, and what is left of it: results.csv, summary.csv, curves.png and a page written from the numbers."""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from envs_bridge.household.game import TASK_TYPES
from proxmo_jax.estimator.types import Settings

# Of the training rollouts: success, share of groups with wins and losses, turns, log-probability of the commands given.
CURVES = ("success", "mixed", "turns", "log_prob")


@dataclass(frozen=True)
class Cell:
    """One setting of a study. level: easy, medium, hard, or several joined by `+`, in equal shares."""

    label: str
    settings: Settings
    level: str = "easy"
    groups: int = 8
    members: int = 8
    turns: int = 20
    paraphrase: float = 0.0
    baseline: str = ""
    """Label of the cell that this one is compared with; default: the study's first."""


@dataclass(frozen=True)
class Study:
    """question: what the study asks, one sentence. cells: the first is what the others are compared with."""

    name: str
    question: str
    cells: Sequence[Cell]
    iterations: int = 160
    remark: str = ""


@dataclass
class Results:
    """eval float32 [cells, seeds, points], success on held-out houses; by_kind [cells, seeds, 6], at the end; curves:
    means over the iterations between evaluations [cells, seeds, points - 1]."""

    labels: list[str]
    iterations: np.ndarray
    eval: np.ndarray
    by_kind: np.ndarray
    curves: dict[str, np.ndarray] = field(default_factory=dict)


def bootstrap(values: np.ndarray, draws: int = 10_000) -> tuple[float, float, float]:
    """(mean, low, high): the mean over seeds [S] and its 95% percentile bootstrap interval."""
    index = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(values[index].mean(1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def measures(results: Results) -> dict[str, np.ndarray]:
    """Per run [cells, seeds]: success at the end (the last three evaluations), its mean over the run, and the
    iterations to 80% (the run's length where it is never reached)."""
    reached = results.eval >= 0.8
    first = np.where(reached.any(2), reached.argmax(2), results.eval.shape[2] - 1)
    return {
        "end": results.eval[:, :, -3:].mean(2),
        "mean": results.eval.mean(2),
        "to_80": results.iterations[first].astype(float),
    }


def write(
    folder: Path, study: Study, results: Results, *, houses: tuple[int, int], quick: bool, seconds: float
) -> None:
    """Tables, figure and page.

    houses: how many were trained in and evaluated in. results.csv: every evaluation of every run, and what its training
    rollouts since the last one were like; summary.csv: each cell's measures and their differences from the cell it is
    compared with.
    """
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["cell", "seed", "iteration", "eval_success", *(f"train_{name}" for name in results.curves)])
        for c, seed, i in np.ndindex(results.eval.shape):
            training = [number(curve[c, seed, i - 1]) if i else "" for curve in results.curves.values()]
            evaluated = number(float(results.eval[c, seed, i]))
            table.writerow([results.labels[c], seed, int(results.iterations[i]), evaluated, *training])
    found = measures(results)
    rows = []
    for c, (cell, label) in enumerate(zip(study.cells, results.labels, strict=True)):
        base = results.labels.index(cell.baseline) if cell.baseline else 0
        row: dict[str, str] = {"cell": label, "compared with": results.labels[base] if c != base else ""}
        for name, values in found.items():
            row |= zip((name, f"{name} low", f"{name} high"), map(number, bootstrap(values[c])), strict=True)
            difference = bootstrap(values[c] - values[base])
            names = (f"{name} difference", f"{name} difference low", f"{name} difference high")
            row |= zip(names, map(number, difference) if c != base else ("", "", ""), strict=True)
        rows.append(row)
    with (folder / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure(folder / "curves.png", study, results)
    (folder / "report.md").write_text(page(study, results, rows, houses, quick, seconds), encoding="utf-8")


def number(value: float) -> str:
    return f"{value:.4f}"


def figure(path: Path, study: Study, results: Results) -> None:
    """Success on held-out houses, mean over seeds with its bootstrap interval; a panel for each cell that is compared
    with no other, and what is compared with it, or with what is compared with it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    compared = {cell.label: cell.baseline or study.cells[0].label for cell in study.cells}

    def root(label: str) -> str:
        for _ in compared:
            label = compared[label]
        return label

    panels: dict[str, list[int]] = {}
    for c, label in enumerate(results.labels):
        panels.setdefault(root(label), []).append(c)
    shown = [
        [results.labels.index(base), *(c for c in cells if results.labels[c] != base)] for base, cells in panels.items()
    ]
    columns = min(len(shown), 3)
    lines = -(-len(shown) // columns)
    drawn, axes = plt.subplots(lines, columns, figsize=(5.2 * columns + 1, 3.8 * lines), sharey=True, squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, cells in zip(axes.flat, shown, strict=False):
        for i, c in enumerate(cells):
            colour = "black" if i == 0 else plt.get_cmap("viridis" if len(cells) > 6 else "tab10")(
                (i - 1) / max(len(cells) - 2, 1) if len(cells) > 6 else i - 1
            )  # fmt: skip
            low, high = np.array([bootstrap(x, 1000)[1:] for x in results.eval[c].T]).T
            axis.plot(results.iterations, results.eval[c].mean(0), color=colour, label=results.labels[c], lw=1.6)
            axis.fill_between(results.iterations, low, high, color=colour, alpha=0.12, lw=0)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="lower right")
    for line in axes:
        line[0].set_ylabel("success, held-out houses")
        line[0].set_ylim(0, 1)
    drawn.suptitle(f"{study.name}: {results.eval.shape[1]} seeds, mean and 95% interval")
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)
    plt.close(drawn)


def page(
    study: Study, results: Results, rows: list[dict[str, str]], houses: tuple[int, int], quick: bool, seconds: float
) -> str:
    """The study as Markdown; its sentences are made from the numbers."""
    seeds = results.eval.shape[1]
    lines = [
        f"# {study.name}", "", study.question, "",
        f"{seeds} seeds, {int(results.iterations[-1])} iterations, {houses[0]} houses to"
        f" train in and {houses[1]} others to be evaluated in;"
        " commands are sampled there, as in training. The policy is a small network that scores the possible commands"
        " (`experiments/vector_agent.py` says what that leaves out). Intervals: 95%, bootstrap over seeds;"
        " differences are between runs of the same seed. `end`: mean of the last three evaluations; `mean`: over"
        " the whole run;"
        " `to 80%`: iterations until the first evaluation of 80%.", "",
        "| setting | end | mean | to 80% | compared with | difference of the means |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        end, mean = (
            f"{float(row[n]):.1%} ({float(row[n + ' low']):.1%} to {float(row[n + ' high']):.1%})"
            for n in ("end", "mean")
        )
        other = row["compared with"]
        difference = (
            f"{float(row['mean difference']):+.1%} ({float(row['mean difference low']):+.1%} to"
            f" {float(row['mean difference high']):+.1%})"
            if other
            else ""
        )
        lines.append(f"| {row['cell']} | {end} | {mean} | {float(row['to_80']):.0f} | {other} | {difference} |")
    lines += ["", "![learning curves](curves.png)", "", "## What was found", ""]
    lines += [f"- {sentence}" for sentence in findings(rows)]
    kinds = ["| setting | " + " | ".join(TASK_TYPES) + " |", "|---" * 7 + "|"]
    for label, rates in zip(results.labels, results.by_kind.mean(1), strict=True):
        kinds.append(f"| {label} | " + " | ".join(f"{rate:.0%}" for rate in rates) + " |")
    lines += ["", "## By task type, at the end", "", *kinds]
    if study.remark:
        lines += ["", study.remark]
    if quick:
        lines += ["", "**A quick run: too short to find anything.**"]
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores"
    lines += ["", f"Took {seconds:.0f} s on {device} (this call; chunks done before are not in it)."]
    return "\n".join(lines) + "\n"


def findings(rows: list[dict[str, str]]) -> list[str]:
    """One sentence for each comparison: what can be told apart, and what cannot."""
    sentences = []
    for row in rows:
        other = row["compared with"]
        if not other:
            continue
        parts = []
        for name, words in (("mean", "over the whole run"), ("end", "at the end")):
            middle, low, high = (float(row[f"{name} difference{x}"]) for x in ("", " low", " high"))
            told = "better" if low > 0 else "worse" if high < 0 else "not told apart"
            size = f"{middle:+.1%}, {low:+.1%} to {high:+.1%}"
            parts.append(f"{told} {words} ({size})")
        sentences.append(f"{row['cell']} against {other}: {', '.join(parts)}.")
    return sentences
