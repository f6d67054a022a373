"""Grids of the estimator against one setting after the other, and what is said of grids that cannot be."""

import csv
import dataclasses

import jax
import numpy as np
import pytest
from scipy.stats import spearmanr

from proxmo_jax import cli
from proxmo_jax.ablation import grid as grid
from proxmo_jax.estimator.batch import batch_advantages
from proxmo_jax.estimator.presets import proxmo
from proxmo_jax.estimator.types import Group


def steps(groups=3, members=4, turns=5, seed=0) -> dict:
    rng = np.random.default_rng(seed)
    rows = [
        (g, g * members + m, t) for g in range(groups) for m in range(members) for t in range(rng.integers(2, turns))
    ]
    group, trajectory, step = np.array(rows).T
    won = rng.random(groups * members) < np.repeat(np.linspace(0, 1, groups), members)
    last = np.r_[trajectory[1:] != trajectory[:-1], True]
    words = ["red door", "blue door", "red lamp", "a long table", "blue lamp and door"]
    return {
        "group": group, "trajectory": trajectory, "step": step, "reward": 10.0 * (won[trajectory] & last),
        "success": won[trajectory], "action_valid": rng.random(len(rows)) < 0.8,
        "texts": np.array([words[i] for i in rng.integers(0, len(words), len(rows))]),
    }  # fmt: skip


GRID = "temperature=0.05:0.8:3 alpha=1,4 step_weight=0,1 modulation=on,off aggregation=none,hard,soft"


def batch():
    return Group.from_steps(**{**steps(), "texts": steps()["texts"].tolist()})


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_every_row_is_what_the_estimator_says_alone(chunk):
    group, packing = batch()
    table = grid.estimate(group, grid.settings_of(grid.parse(GRID)), chunk)
    assert len(table["aggregation"]) == 3 + 2 * 3 + 3 * 2 * 3  # what changes nothing is not repeated
    one = jax.jit(batch_advantages)
    reference = packing.unpack(one(group, proxmo()).joint)
    for i, aggregation in enumerate(table["aggregation"]):
        point = {
            name: table[name][i] for name in ("temperature", "alpha", "step_weight") if not np.isnan(table[name][i])
        }
        knobs = {name: float(value) for name, value in point.items()}
        if table["modulation"][i] == "off":
            knobs["modulation_range"] = 0.0
        found = one(group, proxmo(aggregation=str(aggregation), **knobs))
        joint = packing.unpack(found.joint)
        np.testing.assert_allclose(table["size"][i], np.abs(joint).mean(), rtol=1e-4)
        np.testing.assert_allclose(
            table["rank_correlation"][i], spearmanr(joint.round(4), reference.round(4)).statistic, atol=0.03
        )
        np.testing.assert_allclose(table["sign_flips"][i], (joint * reference < 0).mean(), atol=1e-6)
        won = packing.unpack(np.broadcast_to(group.success[:, :, None], group.mask.shape))
        np.testing.assert_allclose(
            table["mass_on_wins"][i], np.abs(joint)[won].sum() / np.abs(joint).sum(), rtol=1e-4, atol=1e-6
        )
        mass = sum(table[f"mass_in_{name}_groups"][i] for name in ("hard", "mixed", "easy"))
        np.testing.assert_allclose(mass, 1.0, rtol=1e-5)


def test_neighbours_are_those_of_the_weights():
    group, packing = batch()
    for temperature in (0.05, 0.5):
        points = grid.settings_of({"temperature": [temperature], "aggregation": ["soft"]})
        table = grid.estimate(group, points, 8)
        found = batch_advantages(group, proxmo(temperature=temperature), with_proximity=True)
        own = 1 / np.maximum(np.square(found.proximity).sum(-1), 1e-9)
        expected = packing.unpack(own.reshape(group.mask.shape)).mean()
        np.testing.assert_allclose(table["neighbours"][0], expected, rtol=1e-4)


def test_settings_of_one_program_are_compiled_once():
    group, _ = batch()
    grid.estimate(group, grid.settings_of(grid.parse("temperature=0.1:0.5:8")), 4)
    before = grid.measure._cache_size()
    grid.estimate(group, grid.settings_of(grid.parse("temperature=0.2:0.9:12")), 4)
    assert grid.measure._cache_size() == before


def test_the_command_writes_table_and_figures(tmp_path, capsys):
    np.savez(tmp_path / "rollout.npz", **steps())
    out = tmp_path / "out"
    assert cli.main(["ablate", "estimator", str(tmp_path / "rollout.npz"), "--grid", GRID, "--out", str(out)]) == 0
    with (out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 27
    assert rows[0]["temperature"] == ""
    with np.load(out / "table.npz") as data:
        np.testing.assert_allclose(data["size"], [float(row["size"]) for row in rows], rtol=1e-4)
    assert (out / "figures.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--grid: is empty"),
        ("colour=1", "--grid: unknown axis 'colour'; need some of temperature, alpha, step_weight"),
        ("alpha", "--grid: alpha has no values"),
        ("alpha=", "--grid: alpha has no values"),
        ("alpha=one", "--grid: alpha=one is neither a,b,c nor from:to:count"),
        ("alpha=1:2", "--grid: alpha=1:2 is neither"),
        ("alpha=1:2:0", "--grid: alpha=1:2:0 is neither"),
        ("temperature=0,0.1", "--grid: temperature must be at least 1e-06, got 0"),
        ("modulation_range=0.5,1.5", "--grid: modulation_range must be between 0 and 1, got 1.5"),
        ("discount=nan", "--grid: discount must be between 0 and 1, got nan"),
        ("aggregation=soft,mushy", "--grid: aggregation may be none, hard, soft; got 'mushy'"),
        ("alpha=1 alpha=2", "--grid: alpha is given twice"),
    ],
)
def test_grids_that_cannot_be_are_refused_before_anything_runs(tmp_path, capsys, text, message):
    np.savez(tmp_path / "rollout.npz", **steps())
    out = tmp_path / "out"
    assert cli.main(["ablate", "estimator", str(tmp_path / "rollout.npz"), "--grid", text, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_what_does_not_fit_is_cut_up_or_refused():
    group, _ = batch()
    assert grid.fitting(group, 64, 4.0) == 64
    assert 1 <= grid.fitting(group, 10_000, 0.001) < 10_000
    with pytest.raises(ValueError, match="--memory: one setting needs about"):
        grid.fitting(group, 64, 1e-7)


def test_files_without_texts_are_refused(tmp_path, capsys):
    data = steps()
    del data["texts"]
    np.savez(tmp_path / "rollout.npz", **data)
    assert cli.main(["ablate", "estimator", str(tmp_path / "rollout.npz"), "--out", str(tmp_path / "out")]) == 2
    assert "texts is missing" in capsys.readouterr().err


def test_settings_keep_their_own_defaults():
    ((settings, points),) = grid.settings_of({"step_weight": [0.5], "aggregation": ["hard"]})
    assert points == [{"aggregation": "hard", "modulation": "on", "step_weight": 0.5}]
    assert dataclasses.replace(settings, step_weight=1.0).alpha == proxmo().alpha
