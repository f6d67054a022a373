"""Comparison of methods over cases and seeds: interquartile means, probability of improvement, performance profiles.

The measures are those of Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice (arXiv
2108.13264). Scores of a method are float [cases, runs]; bootstrap draws resample the runs of each case by themselves.
"""

import csv
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

DRAWS = 2000
THRESHOLDS = np.linspace(0, 1, 101)
WORDS = {"mean": "over the whole run", "end": "at the end"}


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half of all runs of all cases; a quarter, rounded down, is left out at each end.

    Args:
        scores: float [..., cases, runs].

    Returns:
        float [...].
    """
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = flat.shape[-1] // 4
    return flat[..., cut : flat.shape[-1] - cut].mean(-1)


def resampled(scores: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    """Bootstrap draws of scores [cases, runs], of each case's runs with replacement: float [draws, cases, runs]."""
    return np.take_along_axis(scores[None], rng.integers(0, scores.shape[1], (draws, *scores.shape)), axis=-1)


def interval(
    statistic: Callable[..., np.ndarray], *scores: np.ndarray, draws: int = DRAWS
) -> tuple[float, float, float]:
    """(value, low, high): a statistic of scores [cases, runs] and its 95% percentile interval."""
    rng = np.random.default_rng(0)
    drawn = statistic(*(resampled(one, rng, draws) for one in scores))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(statistic(*scores)), float(low), float(high)


def probability_of_improvement(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Probability that a run of one method is better than one of another, the mean over cases; a tie counts half.

    Args:
        one, other: float [..., cases, runs].

    Returns:
        float [...].
    """
    wins = np.zeros(one.shape[:-1])
    for run in range(one.shape[-1]):
        own = one[..., run, None]
        wins += (own > other).mean(-1) + 0.5 * (own == other).mean(-1)
    return (wins / one.shape[-1]).mean(-1)


def rank_sum_test(one: np.ndarray, other: np.ndarray) -> float:
    """Two-sided p of the Mann-Whitney test, stratified by case: the sum of U over the cases in its normal limit.

    var U = n m / 12 (N + 1 - sum (t^3 - t) / (N (N - 1))), with N = n + m runs of a case and t of each equal value.

    Args:
        one, other: float [cases, runs].

    Returns:
        p; 1 where all runs of each case are equal.
    """
    n, m = one.shape[1], other.shape[1]
    total = n + m
    excess = n * m * len(one) * (float(probability_of_improvement(one, other)) - 0.5)
    variance = 0.0
    for case in np.concatenate([one, other], axis=1):
        ties = np.unique(case, return_counts=True)[1].astype(float)
        variance += n * m / 12 * (total + 1 - (ties**3 - ties).sum() / (total * (total - 1)))
    return math.erfc(abs(excess) / math.sqrt(2 * variance)) if variance > 0 else 1.0


def holm(p: np.ndarray) -> np.ndarray:
    """Values of p corrected for their number by Holm's method: float [N]."""
    order = np.argsort(p)
    raised = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(raised, 1.0)
    return corrected


def profile(scores: np.ndarray) -> np.ndarray:
    """Share of runs whose score is above each of `THRESHOLDS`, the mean over cases: float [..., 101]."""
    return np.stack([(scores > threshold).mean((-2, -1)) for threshold in THRESHOLDS], -1)


def compare(scores: Mapping[str, np.ndarray], reference: str) -> list[dict[str, float | str]]:
    """Compare every method with the reference over all cases.

    Args:
        scores: of each method, float [cases, runs].
        reference: a method.

    Returns:
        A row for each method: method, iqm, better (probability of improvement over the reference) with their intervals
        (`... low`, `... high`), and p, not yet corrected; the reference has only its iqm.
    """
    rows = []
    for name, own in scores.items():
        row: dict[str, float | str] = {"method": name}
        row |= zip(("iqm", "iqm low", "iqm high"), interval(interquartile_mean, own), strict=True)
        if name != reference:
            found = interval(probability_of_improvement, own, scores[reference])
            row |= zip(("better", "better low", "better high"), found, strict=True)
            row["p"] = rank_sum_test(own, scores[reference])
        rows.append(row)
    return rows


def compare_all(
    measures: Mapping[str, Mapping[str, np.ndarray]], cases: list[str], reference: str
) -> list[dict[str, float | str]]:
    """Rows of `compare` by each measure, over all cases and in each.

    `p corrected` is Holm's over all methods and measures; only the comparisons over all cases are tested.

    Args:
        measures: scores [cases, runs] of each method, by the name of the measure.
        cases: their names.
        reference: the method that the others are compared with.
    """
    rows: list[dict[str, float | str]] = []
    for measure, scores in measures.items():
        rows += [{"measure": measure, "case": "all", **row} for row in compare(scores, reference)]
    tested = [row for row in rows if "p" in row]
    for row, p in zip(tested, holm(np.array([float(row["p"]) for row in tested])), strict=True):
        row["p corrected"] = float(p)
    for measure, scores in measures.items():
        for c, case in enumerate(cases):
            alone = {name: own[c : c + 1] for name, own in scores.items()}
            for row in compare(alone, reference):
                row.pop("p", None)
                rows.append({"measure": measure, "case": case, **row})
    return rows


def write_table(path: Path, rows: list[dict[str, float | str]]) -> None:
    """Write rows of `compare_all` as a table; what a row does not have stays empty."""
    names = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{x:.4g}" if isinstance(x, float) else x for name, x in row.items()})


def styles_of(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    """(colour, line style) of each method in figures: a method and its variants share a colour; "soft NAME" is dashed,
    "NAME on ..." dotted."""
    families = {name: name.removeprefix("soft ").partition(" on ")[0] for name in methods}
    number = {family: i for i, family in enumerate(dict.fromkeys(families.values()))}
    return {
        name: (f"C{number[family] % 10}", "--" if name.startswith("soft ") else "-" if name == family else ":")
        for name, family in families.items()
    }


def case_tables(measures: Mapping[str, Mapping[str, np.ndarray]], cases: list[str]) -> list[str]:
    """The lines of a report with a table for each measure: means over runs, a case per row, a method per column, the
    best of a row in bold. Arguments as of `compare_all`."""
    lines = ["The end is the mean of the last three evaluations; summary.csv has the intervals."]
    for measure, scores in measures.items():
        lines += ["", f"Success {WORDS[measure]}:", ""]
        lines += [f"| case | {' | '.join(scores)} |", "|---" * (len(scores) + 1) + "|"]
        for c, case in enumerate(cases):
            means = [float(own[c].mean()) for own in scores.values()]
            shown = [f"**{x:.0%}**" if x == max(means) else f"{x:.0%}" for x in means]
            lines.append(f"| {case} | {' | '.join(shown)} |")
    return lines


def draw_profiles(path: Path, scores: Mapping[str, np.ndarray], title: str) -> None:
    """Draw the performance profile of each method with its 95% interval, in `styles_of`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    styles = styles_of(scores)
    for name, own in scores.items():
        colour, style = styles[name]
        many = profile(resampled(own, np.random.default_rng(0), 500))
        low, high = np.percentile(many, [2.5, 97.5], axis=0)
        axis.plot(THRESHOLDS, profile(own), style, color=colour, label=name, lw=1.6)
        axis.fill_between(THRESHOLDS, low, high, color=colour, alpha=0.1, lw=0)
    axis.set_xlabel("success in held-out houses")
    axis.set_ylabel("share of runs above it")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    drawn.legend(fontsize=8, loc="outside right center")
    drawn.savefig(path, dpi=110)
    plt.close(drawn)


def section(rows: list[dict[str, float | str]], reference: str) -> list[str]:
    """The lines of a report on rows of `compare_all`; those that are worse come first."""
    tests = sum("p corrected" in row for row in rows)
    lines = [
        "## Methods over all cases", "",
        f"Interquartile means, and the probability that a run is better than one of {reference} in the same case, with"
        " 95% intervals by a bootstrap stratified by case (arXiv 2108.13264). p is of a Mann-Whitney test stratified by"
        f" case, corrected by Holm's method for {tests} comparisons.", "",
        f"| method | measure | interquartile mean | better than {reference} | p, corrected |", "|---|---|---|---|---|",
    ]  # fmt: skip
    sentences = []
    for row in (row for row in rows if row["case"] == "all"):
        middle = f"{row['iqm']:.1%} ({row['iqm low']:.1%} to {row['iqm high']:.1%})"
        better = p = ""
        if "p corrected" in row:
            chance, corrected = float(row["better"]), float(row["p corrected"])
            p = f"{corrected:.2g}" if corrected >= 1e-4 else "below 0.0001"
            better = f"{chance:.0%} ({row['better low']:.0%} to {row['better high']:.0%})"
            verdict = "not significantly different from"
            if corrected < 0.05:
                verdict = "significantly better than" if chance > 0.5 else "significantly worse than"
            words = WORDS[str(row["measure"])]
            pairs = f"better in {better} of pairs of runs, corrected p {p}"
            sentences.append((chance, f"- {row['method']}: {verdict} {reference} {words} ({pairs})."))
        lines.append(f"| {row['method']} | {row['measure']} | {middle} | {better} | {p} |")
    lines += ["", "![performance profiles](profiles.png)", "", "## Findings", ""]
    return lines + [sentence for _, sentence in sorted(sentences)]
