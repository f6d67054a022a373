"""The learning rate of each cell of a study, chosen on seeds of its own.

Cells that are tuned together (`Cell.tuned_with`) get one rate: the best of the study's `learning_rates` in the cell
they name, by mean success over whole runs. Every method has the same rates, seeds and iterations for it.
"""

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from proxmo_jax.ablation.study import Cell, Results, Study, measures

FIRST_SEED = 1_000_000  # of the runs for tuning, so that the study's own runs have other seeds


def trials(study: Study) -> Study:
    """The runs for tuning: every cell that gives others its rate, with every rate."""
    tuned = [cell for cell in study.cells if cell.tuned_with in ("", cell.label)]
    cells = [
        replace(cell, label=f"{cell.label}, learning rate {rate:g}", learning_rate=rate, baseline="", tuned_with="")
        for cell in tuned
        for rate in study.learning_rates
    ]
    return replace(study, name=f"{study.name}, learning rates", cells=cells)


def seeds_of(study: Study, *, quick: bool) -> range:
    """The seeds of the trials."""
    return range(FIRST_SEED, FIRST_SEED + (2 if quick else study.tuning_seeds))


def tuned(study: Study, results: Results) -> tuple[Study, list[dict[str, str]]]:
    """Give every cell the rate that was best in the trials.

    Args:
        study: with `learning_rates`.
        results: of `trials(study)`.

    Returns:
        The study, and the rows of tuning.csv.
    """
    rates = np.array(study.learning_rates)
    score = measures(results)["mean"].mean(1).reshape(-1, len(rates))
    names = [cell.label for cell in study.cells if cell.tuned_with in ("", cell.label)]
    best = dict(zip(names, rates[score.argmax(1)].tolist(), strict=True))
    rows = [
        {"cell": name, "learning rate": f"{rate:g}", "mean success": f"{value:.4f}", "chosen": str(rate == best[name])}
        for name, own in zip(names, score, strict=True)
        for rate, value in zip(rates, own, strict=True)
    ]

    def with_rate(cell: Cell) -> Cell:
        return replace(cell, learning_rate=best[cell.tuned_with or cell.label])

    ends = sum(rate in (rates.min(), rates.max()) for rate in best.values())
    said = (
        f"Learning rates ({', '.join(f'{rate:g}' for rate in rates)}) were chosen on {results.eval.shape[1]} other"
        " seeds by mean success over the run; tuning.csv has them."
        f" {ends} of {len(best)} choices are at an end of the grid."
    )
    remark = f"{study.remark} {said}".strip()
    return replace(study, cells=[with_rate(cell) for cell in study.cells], remark=remark), rows


def write_rates(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write tuning.csv: the mean success of every trial, and which rate was chosen."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
