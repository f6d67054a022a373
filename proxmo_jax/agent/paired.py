"""Compare two evaluations on the same panel, task by task."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from envs_bridge.text import load_json
from proxmo_jax.agent.report import bootstrap
from proxmo_jax.errors import UserError

DRAWS = 10_000  # of the sign-flip test


@dataclass(frozen=True)
class Paired:
    """Two evaluations over the tasks that both have finished.

    Attributes:
        pairs: number of tasks.
        lost: tasks left out because an episode was lost in either.
        first, second: mean success (or score) of each.
        difference: second less first, with its 95% interval over tasks (low, high).
        better, worse: tasks at which the second is better, and worse.
        p: two-sided.
    """

    pairs: int
    lost: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    better: int
    worse: int
    p: float


def mcnemar(better: int, worse: int) -> float:
    """Two-sided p of McNemar's exact test: of a fair coin over the tasks at which two binary outcomes differ."""
    count = better + worse
    tail = sum(math.comb(count, i) for i in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**count)


def agresti_min(better: int, worse: int, count: int) -> tuple[float, float]:
    """95% interval of a difference of paired proportions (Agresti and Min, 2005): Wald's with half a task added to each
    cell, which has a width where no task differs."""
    total = count + 2
    centre = (better - worse) / total
    half = 1.96 * math.sqrt(better + worse + 1 - (better - worse) ** 2 / total) / total
    return max(-1.0, centre - half), min(1.0, centre + half)


def sign_flip(differences: np.ndarray) -> float:
    """Two-sided p of the paired permutation test of a mean: float [N] differences, signs drawn at random."""
    observed = abs(differences.mean())
    rng = np.random.default_rng(0)
    extreme = 0
    for _ in range(0, DRAWS, 1000):  # a thousand at a time, which bounds memory
        signs = rng.choice((-1.0, 1.0), (1000, len(differences)))
        extreme += int((np.abs((signs * differences).mean(1)) >= observed - 1e-12).sum())
    return (extreme + 1) / (DRAWS + 1)


def pair(one: np.ndarray, other: np.ndarray, finished: np.ndarray) -> Paired:
    """Compare outcomes of the same tasks.

    Args:
        one, other: float [tasks, attempts], success or score.
        finished: bool [tasks], whether both have all attempts.

    Returns:
        The comparison; of no task, with p 1. One attempt at success is compared by McNemar's exact test, with the
        interval of Agresti and Min; else by the paired sign-flip test, with a bootstrap interval.
    """
    first, second = one[finished], other[finished]
    lost = int((~finished).sum())
    if not len(first):
        return Paired(0, lost, 0.0, 0.0, 0.0, -1.0, 1.0, 0, 0, 1.0)
    binary = first.shape[1] == 1 and set(np.unique([first, second])) <= {0.0, 1.0}
    differences = second.mean(1) - first.mean(1)
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    if binary:
        low, high = agresti_min(better, worse, len(first))
        p = mcnemar(better, worse)
    else:
        _, low, high = bootstrap(differences)
        p = sign_flip(differences)
    means = float(first.mean()), float(second.mean()), float(differences.mean())
    return Paired(len(first), lost, *means, low, high, better, worse, p)


def read_result(path: Path) -> dict[str, Any]:
    """The JSON that `proxmo eval --panel` has written. Raises UserError for another file."""
    try:
        found = load_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: is no result of proxmo eval ({error})") from error
    if not isinstance(found, dict) or "splits" not in found or "temperature" not in found:
        raise UserError(f"{path}: is no result of proxmo eval; need the JSON file that it writes")
    if "panel" not in found:
        raise UserError(f"{path}: was not played on a panel, and cannot be compared task by task; need eval --panel")
    try:
        found["panel"]["hash"]
        for episode in found["episodes"]:
            played = [np.array(episode[name], float) for name in ("won", "finished", "score")]
            if len({values.shape for values in played}) != 1 or played[0].shape != (len(found["panel"]["seeds"]),):
                raise ValueError(f"{episode['name']} has not one outcome for each seed")
            _ = episode["content"], episode["split"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is damaged ({error!r}); evaluate again") from error
    return found


def refuse_mixed(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Raise UserError unless both were, or will be, played on the same panel at the same temperature."""
    first, second = one["panel"]["hash"][:12], other["panel"]["hash"][:12]
    if one["panel"]["hash"] != other["panel"]["hash"]:
        raise UserError(f"{one['run']} is of panel {first}, {other['run']} of panel {second}; need the same panel")
    if one["temperature"] != other["temperature"]:
        raise UserError(
            f"{one['run']} is of temperature {one['temperature']:g}, {other['run']} of {other['temperature']:g}; need"
            " the same (0 is greedy)"
        )


def compare(one: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Compare two results by split and measure.

    Args:
        one: what is compared with.
        other: what is compared.

    Returns:
        A `Paired` as a dict for each split and `All`; of a shop, also `All score`.

    Raises:
        UserError: the two were not played on the same panel under the same conditions.
    """
    refuse_mixed(one, other)
    if [e["content"] for e in one["episodes"]] != [e["content"] for e in other["episodes"]]:
        raise UserError(f"{one['run']} and {other['run']} name one panel and hold different tasks; evaluate again")

    def array(result: dict, name: str) -> np.ndarray:
        return np.array([episode[name] for episode in result["episodes"]], float)

    finished = (array(one, "finished") * array(other, "finished")).all(1)
    splits = np.array([episode["split"] for episode in one["episodes"]])
    won = array(one, "won"), array(other, "won")
    found = {
        split: vars(pair(won[0][splits == split], won[1][splits == split], finished[splits == split]))
        for split in dict.fromkeys(splits.tolist())
    }
    found["All"] = vars(pair(*won, finished))
    if "Score" in next(iter(one["splits"].values())):
        found["All score"] = vars(pair(array(one, "score"), array(other, "score"), finished))
    return found


def comparison_table(names: Sequence[str], panel: str, found: dict[str, dict[str, Any]]) -> Table:
    """The comparison as a table, in percent."""
    grid = Table(title=f"{names[1]} against {names[0]} on panel {panel[:12]}; percent, 95% interval over tasks")
    for column in ("split", "tasks", "other", "run", "difference", "+/-", "p"):
        grid.add_column(column, justify="left" if column == "split" else "right", no_wrap=column == "difference")
    for split, row in found.items():
        lost = f"\n{row['lost']} lost" if row["lost"] else ""
        span = f"{100 * row['difference']:+.1f} ({100 * row['low']:+.0f} to {100 * row['high']:+.0f})"
        grid.add_row(
            split, f"{row['pairs']}{lost}", f"{100 * row['first']:.1f}", f"{100 * row['second']:.1f}", span,
            f"{row['better']}/{row['worse']}", f"{row['p']:.2g}",
        )  # fmt: skip
    return grid


def verdict(names: Sequence[str], found: dict[str, dict[str, Any]]) -> str:
    """One sentence on the whole panel."""
    row = found["All"]
    if row["p"] >= 0.05:
        return f"{names[1]} and {names[0]} are not significantly different (p {row['p']:.2g})."
    word = "better" if row["difference"] > 0 else "worse"
    return f"{names[1]} is significantly {word} than {names[0]} (p {row['p']:.2g})."


def load_and_compare(first: Path, second: Path) -> tuple[tuple[str, str], str, dict[str, dict[str, Any]]]:
    """(names, panel hash, comparison) of two result files: `second` against `first`."""
    one, other = read_result(first), read_result(second)
    names = [f"{result['run']} ({result['iteration']})" for result in (one, other)]
    return (names[0], names[1]), one["panel"]["hash"], compare(one, other)
