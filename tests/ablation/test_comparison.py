"""Methods compared over cases and seeds: the measures against slow versions, and pages that follow from the numbers."""

import csv
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, trim_mean

from proxmo_jax.ablation import runner, tuning
from proxmo_jax.ablation.comparison import (
    compare_all,
    holm,
    interquartile_mean,
    interval,
    probability_of_improvement,
    profile,
    rank_sum_test,
    resampled,
    styles_of,
)
from proxmo_jax.ablation.study import Cell, Results, Study, write
from proxmo_jax.ablation.tuning import trials
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.presets import dr_grpo, empg, gagpo, gigpo, gigpo_similarity

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(0, 1000))


def drawn(shape, offset=0):
    """Scores with ties."""
    cases, runs, seed = shape
    return np.random.default_rng(seed + offset).integers(0, 6, (cases, runs)) / 5


@given(SHAPES)
def test_interquartile_means_leave_a_quarter_out_at_each_end(shape):
    scores = drawn(shape)
    np.testing.assert_allclose(interquartile_mean(scores), trim_mean(scores.ravel(), 0.25), atol=1e-12)
    two = interquartile_mean(np.stack([scores, scores + 1]))
    np.testing.assert_allclose(two[1] - two[0], 1, atol=1e-12)


@given(SHAPES)
def test_improvement_is_counted_over_all_pairs_of_runs(shape):
    one, other = drawn(shape), drawn(shape, 5000)
    cases = [
        math.fsum((a > b) + 0.5 * (a == b) for a, b in itertools.product(x, y)) / (len(x) * len(y))
        for x, y in zip(one, other, strict=True)
    ]
    np.testing.assert_allclose(probability_of_improvement(one, other), np.mean(cases), atol=1e-12)
    np.testing.assert_allclose(
        probability_of_improvement(one, other) + probability_of_improvement(other, one), 1, atol=1e-12
    )


@given(SHAPES)
def test_the_test_of_one_case_is_mann_whitney(shape):
    one, other = drawn(shape)[:1], drawn(shape, 5000)[:1]
    if len({*one.flat, *other.flat}) == 1:
        assert rank_sum_test(one, other) == 1
        return
    expected = mannwhitneyu(one[0], other[0], method="asymptotic", use_continuity=False).pvalue
    np.testing.assert_allclose(rank_sum_test(one, other), expected, rtol=1e-9)


def test_cases_add_up_and_do_not_mix():
    """A difference in every case is found though the cases lie further apart than the methods."""
    rng = np.random.default_rng(0)
    level = np.array([0.1, 0.4, 0.7])[:, None]
    one, other = (level + 0.02 * rng.normal(size=(3, 16)) + shift for shift in (0.02, 0.0))
    together, mixed = rank_sum_test(one, other), rank_sum_test(one.reshape(1, -1), other.reshape(1, -1))
    assert together < 0.01 < mixed
    assert together < min(rank_sum_test(one[c : c + 1], other[c : c + 1]) for c in range(3))


def test_the_test_is_wrong_as_often_as_it_says():
    rng = np.random.default_rng(1)
    p = [rank_sum_test(*rng.normal(size=(2, 4, 12))) for _ in range(1500)]
    assert abs(np.mean(np.array(p) < 0.05) - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 1500)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_steps_down(p):
    expected, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        expected[i] = largest
    found = holm(np.array(p))
    np.testing.assert_allclose(sorted(found), sorted(expected), atol=1e-12)
    assert all(abs(a - b) < 1e-12 for a, b, x in zip(found, expected, p, strict=True) if p.count(x) == 1)


def test_profiles_count_runs_above_a_threshold():
    scores = np.array([[0.0, 0.555], [0.255, 1.0]])
    found = profile(scores)
    for at in (0, 10, 25, 26, 55, 56, 99, 100):
        assert found[at] == sum(x > at / 100 for x in scores.flat) / 4


def test_draws_stay_in_their_case():
    scores = np.arange(12.0).reshape(3, 4)
    many = resampled(scores, np.random.default_rng(0), 200)
    assert many.shape == (200, 3, 4)
    for c in range(3):
        assert set(many[:, c].flat) == set(scores[c])
    same = np.repeat([[0.2], [0.9]], 5, axis=1)  # no spread inside the cases: no uncertainty
    assert len({round(x, 12) for x in interval(interquartile_mean, same)}) == 1


def test_intervals_cover_as_they_say():
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(150):
        one, other = rng.normal(size=(2, 3, 20))
        _, low, high = interval(probability_of_improvement, one, other, draws=300)
        inside += low <= 0.5 <= high
    assert inside / 150 > 0.87


METHODS = {"a": 0.5, "b": 0.7, "soft c": 0.3, "d": 0.5}
CASES = ("easy, few", "easy, many")


def made() -> tuple[Study, Results]:
    cells = [
        Cell(f"{name}, {case}", dr_grpo(step_weight=w), baseline=f"a, {case}", method=name, case=case)
        for case in CASES
        for w, name in enumerate(METHODS)
    ]
    rng = np.random.default_rng(0)
    level = np.array([METHODS[cell.method] + 0.1 * (cell.case == CASES[1]) for cell in cells])
    noise = 0.02 * np.tile(rng.permuted(np.tile(np.arange(8.0), (4, 1)), axis=1), (2, 1))
    points = level[:, None, None] + noise[:, :, None] + np.zeros(4)
    curves = {"turns": 0 * points[:, :, 1:]}
    study = Study("made", "Which is best?", cells, reference="a")
    return study, Results([cell.label for cell in cells], 10 * np.arange(4), points, np.zeros((8, 8, 6)), curves)


def test_a_page_over_cases_says_what_the_numbers_say(tmp_path):
    study, results = made()
    write(tmp_path, study, results, houses=(240, 128), quick=False, seconds=1.0)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    better, worse = "significantly better than a over the whole run", "significantly worse than a at the end"
    assert f"- b: {better} (better in 100% (100% to 100%) of pairs of runs, corrected p " in text
    assert f"- soft c: {worse} (better in 0% (0% to 0%) of pairs of runs, corrected p " in text
    assert "- d: not significantly different from a at the end (better in 50% (" in text
    assert text.index("- soft c:") < text.index("- d:") < text.index("- b:")
    assert "for 6 comparisons" in text
    assert "| case | a | b | soft c | d |" in text
    assert text.count("| easy, few | 57% | **77%** | 37% | 57% |") == 2  # over the run and at the end
    assert "| soft c | 0% | 0% | 0% | 0% | 0% | 0% |" in text
    assert (tmp_path / "profiles.png").stat().st_size > 0
    with (tmp_path / "comparison.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * 3
    assert {row["case"] for row in rows if row["p corrected"]} == {"all"}
    own = next(r for r in rows if (r["method"], r["case"], r["measure"]) == ("b", CASES[1], "end"))
    np.testing.assert_allclose(float(own["iqm"]), 0.7 + 0.1 + 0.02 * 3.5, rtol=1e-3)


def test_variants_of_a_method_share_its_colour():
    styles = styles_of(["a", "soft a", "b", "a on states", "soft b"])
    assert styles == {
        "a": ("C0", "-"), "soft a": ("C0", "--"), "b": ("C1", "-"), "a on states": ("C0", ":"), "soft b": ("C1", "--")
    }  # fmt: skip


def test_corrected_values_are_of_all_tests_together():
    rng = np.random.default_rng(0)
    scores = {m: {name: rng.random((2, 6)) for name in "abc"} for m in ("mean", "end")}
    rows = [row for row in compare_all(scores, ["x", "y"], "a") if "p" in row]
    assert len(rows) == 4
    np.testing.assert_allclose([r["p corrected"] for r in rows], holm(np.array([r["p"] for r in rows])))


def test_every_method_gets_the_rate_that_was_best_for_it():
    """In the cell that it is tuned in; another cell of the method gets the same."""
    study, _ = made()
    cells = [replace(cell, tuned_with=f"{cell.method}, {CASES[0]}") for cell in study.cells]
    study = replace(study, cells=cells, learning_rates=(0.1, 0.2, 0.4))
    tried = trials(study)
    assert [c.learning_rate for c in tried.cells] == [0.1, 0.2, 0.4] * 4
    assert {c.case for c in tried.cells} == {CASES[0]}
    score = np.array([[1, 3, 2], [9, 1, 1], [1, 2, 3], [5, 7, 6]]).reshape(12, 1, 1) / 10 + np.zeros((12, 2, 4))
    labels = [c.label for c in tried.cells]
    done, rows = tuning.tuned(study, Results(labels, 10 * np.arange(4), score, np.zeros((12, 2, 6))))
    assert [c.learning_rate for c in done.cells] == [0.2, 0.1, 0.4, 0.2] * 2
    assert "2 of 4 choices are at an end of the grid." in done.remark
    assert [row["cell"] for row in rows if row["chosen"] == "True"] == [f"{name}, {CASES[0]}" for name in METHODS]
    assert not set(tuning.seeds_of(study, quick=False)) & set(range(100_000))


def test_a_study_tunes_on_seeds_of_its_own_and_then_trains(tmp_path, monkeypatch):
    """Agents that learn best with a rate of 0.2 stand for the real ones."""
    trained = []

    def run_chunk(config, study, program, kind, part, size):
        cells = [study.cells[c] for c, _ in part]
        trained.extend(
            (cell.method, cell.case, cell.learning_rate, seed) for cell, (_, seed) in zip(cells, part, strict=True)
        )
        success = np.array([1 - abs(cell.learning_rate - 0.2) for cell in cells])
        curves = {name: np.zeros((len(part), 4)) for name in ("success", "mixed", "turns", "log_prob")}
        return {**curves, "eval": np.repeat(success[:, None], 5, 1), "by_kind": np.zeros((len(part), 6))}

    monkeypatch.setattr(runner, "compiled", lambda *_: "program")
    monkeypatch.setattr(runner, "remember_programs", lambda folder: None)
    monkeypatch.setattr(runner, "run_chunk", run_chunk)
    study, _ = made()
    cells = [replace(cell, tuned_with=f"{cell.method}, {CASES[0]}") for cell in study.cells]
    study = replace(study, cells=cells, learning_rates=(0.1, 0.2, 0.4), seeds=3, tuning_seeds=2)
    folder = runner.main(runner.Config(out=tmp_path), study, runner.Console(quiet=True))
    first = tuning.FIRST_SEED
    rates = itertools.product(METHODS, CASES[:1], (0.1, 0.2, 0.4), (first, first + 1))
    assert sorted(trained[:24]) == sorted(rates)
    assert sorted(trained[24:]) == sorted(itertools.product(METHODS, CASES, (0.2,), range(3)))
    assert len((folder / "tuning.csv").read_text(encoding="utf-8").splitlines()) == 1 + 4 * 3
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "Learning rates (0.1, 0.2, 0.4) were chosen on 2 other seeds" in text
    assert "0 of 4 choices are at an end of the grid." in text


def test_the_study_of_methods_has_every_method_in_every_case():
    study = runner.load("methods")
    assert len(study.cells) == 12 * 16
    assert study.seeds == 32
    assert len({cell.method for cell in study.cells}) == 12
    for case in {cell.case for cell in study.cells}:
        own = [cell for cell in study.cells if cell.case == case]
        assert len({cell.method for cell in own}) == 12
        assert len({(c.level, c.groups, c.members, c.turns, c.paraphrase) for c in own}) == 1  # equal budgets
    tried = trials(study)
    assert len(tried.cells) == 12 * 4 * 4
    assert {(cell.members, cell.paraphrase) for cell in tried.cells} == {(8, 0.0)}
    for cell in study.cells:
        other = next(c for c in study.cells if c.label == cell.tuned_with)
        assert (other.method, other.level) == (cell.method, cell.level)


@pytest.mark.parametrize("settings", [gigpo_similarity(), empg(), gagpo(values_over="batch")])
def test_estimators_that_need_what_arrays_lack_are_refused(settings):
    with pytest.raises(UserError, match="odd needs similar texts, entropies or values over the batch"):
        runner.check_study(Study("s", "?", [Cell("plain", gigpo()), Cell("odd", settings)]))


def test_methods_without_a_cell_in_each_case_are_refused():
    study, _ = made()
    runner.check_study(study)
    for odd in (replace(study, cells=study.cells[:-1]), replace(study, reference="z")):
        with pytest.raises(UserError, match="study made: each method needs one cell in each case"):
            runner.check_study(odd)
