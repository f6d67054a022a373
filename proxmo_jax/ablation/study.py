"""Studies and their output: results.csv, summary.csv, curves.png and a report written from the numbers."""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from envs_bridge.household.game import TASK_TYPES
from proxmo_jax.ablation.comparison import case_tables, compare_all, draw_profiles, section, styles_of, write_table
from proxmo_jax.agent.report import bootstrap
from proxmo_jax.estimator.types import Settings

# Of the training rollouts: success, share of groups with wins and losses, turns, log-probability of the commands drawn.
CURVES = ("success", "mixed", "turns", "log_prob")
FEWEST_SEEDS = 5  # with fewer, an interval of a bootstrap over seeds is hardly more than their range


@dataclass(frozen=True)
class Cell:
    """One setting of a study. `level`: easy, medium, hard, or several joined by `+`, in equal shares."""

    label: str
    settings: Settings
    level: str = "easy"
    groups: int = 8
    members: int = 8
    turns: int = 20
    paraphrase: float = 0.0
    states: bool = False
    """Whether observations are equal only in the same state of the house (`vector_agent.Spec.states`)."""
    baseline: str = ""
    """Label of the cell that this one is compared with; default: the study's first cell."""
    learning_rate: float | None = None
    """Default: that of the command line."""
    tuned_with: str = ""
    """Label of the cell whose learning rate it gets where a study tunes it; default: its own."""
    method: str = ""
    """Name of its estimator, where the study compares methods over cases (`Study.reference`)."""
    case: str = ""
    """Name of its houses, group size and texts there; each method has one cell in each case."""


@dataclass(frozen=True)
class Study:
    """A question and the settings that answer it. A cell is compared with its `baseline` or with the first cell.

    seeds: their number unless the command line gives one. reference: the method that others are compared with over all
    cases; "" for no such comparison. learning_rates: the grid for tuning (`tuning.py`), each from `tuning_seeds` seeds;
    empty for no tuning.
    """

    name: str
    question: str
    cells: Sequence[Cell]
    iterations: int = 160
    remark: str = ""
    seeds: int = 16
    reference: str = ""
    learning_rates: tuple[float, ...] = ()
    tuning_seeds: int = 8


@dataclass
class Results:
    """The numbers of a study.

    labels: of the cells. iterations int [points]: when runs were evaluated. eval float32 [cells, seeds, points]:
    success in held-out houses. by_kind float32 [cells, seeds, 6]: the last evaluation by task type. curves float32
    [cells, seeds, points - 1]: means over the iterations between evaluations, by name.
    """

    labels: list[str]
    iterations: np.ndarray
    eval: np.ndarray
    by_kind: np.ndarray
    curves: dict[str, np.ndarray] = field(default_factory=dict)


def measures(results: Results) -> dict[str, np.ndarray]:
    """Metrics of each run, [cells, seeds]: success at the end (mean of the last three evaluations), mean success over
    the run, and iterations to 80% success (the length of the run if it is never reached)."""
    reached = results.eval >= 0.8
    first = np.where(reached.any(2), reached.argmax(2), results.eval.shape[2] - 1)
    return {
        "end": results.eval[:, :, -3:].mean(2),
        "mean": results.eval.mean(2),
        "to_80": results.iterations[first].astype(float),
    }


def over_cases(study: Study, results: Results) -> tuple[list[str], dict[str, dict[str, np.ndarray]]]:
    """(cases, scores [cases, seeds] of each method by measure): the mean over the run, and the end."""
    cases = list(dict.fromkeys(cell.case for cell in study.cells))
    row = {(cell.method, cell.case): c for c, cell in enumerate(study.cells)}
    methods = list(dict.fromkeys(cell.method for cell in study.cells))
    found = measures(results)
    return cases, {
        name: {method: found[name][[row[method, case] for case in cases]] for method in methods}
        for name in ("mean", "end")
    }


def write(
    folder: Path, study: Study, results: Results, *, houses: tuple[int, int], quick: bool, seconds: float
) -> None:
    """Write tables, figure and report.

    results.csv has every evaluation of every run, and the means of its training rollouts since the previous one;
    summary.csv has the metrics of each cell and their differences from the cell it is compared with. A study with a
    reference has comparison.csv and profiles.png, too: its methods over all cases, and in each.

    Args:
        folder: where to write; it must exist.
        study: the question and its cells.
        results: of the study's cells, in their order.
        houses: the number of houses in training and in evaluation.
        quick: whether the run was too short to conclude anything.
        seconds: duration of this call.
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
    sentences = findings(rows, results.eval.shape[1])
    success, conclusion = settings_table(rows), ["## Findings", "", *(f"- {sentence}" for sentence in sentences)]
    if study.reference:
        cases, scores = over_cases(study, results)
        compared = compare_all(scores, cases, study.reference)
        write_table(folder / "comparison.csv", compared)
        draw_profiles(folder / "profiles.png", scores["end"], f"{study.name}: at the end, all cases")
        success, conclusion = case_tables(scores, cases), section(compared, study.reference)
    text = page(study, results, success, houses, quick, seconds, conclusion)
    (folder / "report.md").write_text(text, encoding="utf-8")


def number(value: float) -> str:
    """A number in the tables: four decimals."""
    return f"{value:.4f}"


def figure(path: Path, study: Study, results: Results) -> None:
    """Draw success in held-out houses: mean over seeds and its bootstrap interval.

    Each cell without a baseline has a panel, with the cells that are compared with it directly or through others;
    hence each case, where methods are compared.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    compared = {cell.label: cell.baseline or study.cells[0].label for cell in study.cells}

    def root(label: str) -> str:
        for _ in compared:
            label = compared[label]
        return label

    def shade(i: int, count: int):
        if i == 0:
            return "black"
        many = count > 6
        return plt.get_cmap("viridis" if many else "tab10")((i - 1) / (count - 2) if many else i - 1)

    panels: dict[str, list[int]] = {}
    for c, label in enumerate(results.labels):
        panels.setdefault(root(label), []).append(c)
    shown = [
        [results.labels.index(base), *(c for c in cells if results.labels[c] != base)] for base, cells in panels.items()
    ]
    most, wide, high = (4, 4.2, 3.4) if study.reference else (3, 5.2, 3.8)
    columns = min(len(shown), most)
    lines = -(-len(shown) // columns)
    drawn, axes = plt.subplots(
        lines, columns, figsize=(wide * columns + 1, high * lines), sharey=True, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    styles = styles_of(cell.method for cell in study.cells)
    for axis, cells in zip(axes.flat, shown, strict=False):
        for i, c in enumerate(cells):
            label = study.cells[c].method if study.reference else results.labels[c]
            colour, style = styles[label] if study.reference else (shade(i, len(cells)), "-")
            low, high = np.array([bootstrap(x, 1000)[1:] for x in results.eval[c].T]).T
            axis.plot(results.iterations, results.eval[c].mean(0), style, color=colour, label=label, lw=1.6)
            axis.fill_between(results.iterations, low, high, color=colour, alpha=0.12, lw=0)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
        if study.reference:
            axis.set_title(study.cells[cells[0]].case, fontsize=10)
        else:
            axis.legend(fontsize=7, loc="lower right")
    if study.reference:  # every panel has the same lines
        drawn.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    for line in axes:
        line[0].set_ylabel("success in held-out houses")
        line[0].set_ylim(0, 1)
    drawn.suptitle(f"{study.name}: {results.eval.shape[1]} seeds, mean and 95% interval")
    drawn.savefig(path, dpi=110)
    plt.close(drawn)


def page(
    study: Study, results: Results, success: list[str], houses: tuple[int, int], quick: bool, seconds: float,
    conclusion: list[str],
) -> str:  # fmt: skip
    """The report as Markdown; its sentences follow from the numbers.

    Args:
        study, results, houses, quick, seconds: as in `write`.
        success: lines with the success of every setting.
        conclusion: lines on what the numbers say.
    """
    lines = [
        f"# {study.name}", "", study.question, "",
        f"{results.eval.shape[1]} seeds, {int(results.iterations[-1])} iterations, {houses[0]} houses for training and"
        f" {houses[1]} held-out houses for evaluation, where commands are sampled as in training. The policy is a small"
        " network that scores the admissible commands (`proxmo_jax/ablation/vector_agent.py` lists its limits).",
        *success, "", "![learning curves](curves.png)", "", *conclusion,
        "", "## Success by task type at the end", "",
        f"| {'method, mean over its cases' if study.reference else 'setting'} | {' | '.join(TASK_TYPES)} |",
        "|---" * 7 + "|",
    ]  # fmt: skip
    names = [cell.method if study.reference else cell.label for cell in study.cells]
    for name in dict.fromkeys(names):
        rates = results.by_kind[[other == name for other in names]].mean((0, 1))
        lines.append(f"| {name} | " + " | ".join(f"{rate:.0%}" for rate in rates) + " |")
    if study.remark:
        lines += ["", study.remark]
    if quick:
        lines += ["", "**A quick run: too short for any conclusion.**"]
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores"
    lines += ["", f"This call took {seconds:.0f} s on {device}, without chunks that were finished before."]
    return "\n".join(lines) + "\n"


def settings_table(rows: list[dict[str, str]]) -> list[str]:
    """The lines of a report with every setting, its intervals, and its difference from the one it is compared with."""
    lines = [
        "Intervals are 95% bootstrap intervals over seeds; differences are between runs of the same seed. A difference"
        " is significant if its interval excludes 0. `end`: mean of the last three evaluations; `mean`: mean over the"
        " whole run; `to 80%`: iterations until an evaluation first reaches 80%.", "",
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
    return lines


def findings(rows: list[dict[str, str]], seeds: int) -> list[str]:
    """One sentence for each comparison: which differences are significant, if there are seeds enough to say."""
    if seeds < FEWEST_SEEDS:
        return [f"{seeds} of at least {FEWEST_SEEDS} seeds: too few for the intervals to mean something."]
    sentences = []
    for row in rows:
        other = row["compared with"]
        if not other:
            continue
        parts = []
        for name, words in (("mean", "over the whole run"), ("end", "at the end")):
            middle, low, high = (float(row[f"{name} difference{x}"]) for x in ("", " low", " high"))
            verdict = "better" if low > 0 else "worse" if high < 0 else "different"
            verdict = ("not " if verdict == "different" else "") + f"significantly {verdict}"
            size = f"{middle:+.1%}, {low:+.1%} to {high:+.1%}"
            parts.append(f"{verdict} {words} ({size})")
        sentences.append(f"{row['cell']} against {other}: {', '.join(parts)}.")
    return sentences
