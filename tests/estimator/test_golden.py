"""Every recorded output of the official code, reproduced."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from proxmo_jax.estimator.batch import batch_advantages
from proxmo_jax.estimator.types import Group, Settings

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
SIGMOID_OF_ONE = 1 / (1 + np.exp(-1))


def batch(data, case):
    names = ("group", "trajectory", "step", "reward", "success", "action_valid")
    steps = {name: data[name] for name in names}
    texts = [str(text) for text in data["texts"]]
    threshold = case["similarity_threshold"] if case["similarity_grouping"] else None
    return Group.from_steps(**steps, texts=texts, similarity_threshold=threshold)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_official_code(name):
    data, case = np.load(GOLDEN / f"{name}.npz"), CASES[name]
    group, packing = batch(data, case)
    soft, std = case["mode"] == "soft_grouping", case["mode"] == "mean_std_norm"
    settings = Settings(
        discount=case["gamma"],
        invalid_penalty=case["invalid_penalty"],
        alpha=case["alpha"],
        modulation_range=case["beta"] * (SIGMOID_OF_ONE - 0.5) * case["modulation"],
        temperature=case["temperature"],
        step_weight=case["omega"],
        epsilon=case["epsilon"],
        aggregation="soft" if soft else "similar" if case["similarity_grouping"] else "hard",
        episode_std=std,
        step_std=std,
        success_rate="official",
        lone_step="official",
        max_features=case["max_features"],
    )
    answer = jax.jit(batch_advantages)(group, settings)
    wanted = {"episode_advantage": "episode", "step_advantage": "step", "advantage": "joint"}
    np.testing.assert_allclose(packing.unpack(answer.returns), data["discounted_return"], rtol=1e-4, atol=1e-5)
    for theirs, ours in wanted.items():
        mine = packing.unpack(getattr(answer, ours))[:, None] * data["response_mask"]
        np.testing.assert_allclose(mine, data[theirs], rtol=1e-4, atol=1e-5, err_msg=theirs)


def test_the_official_rule_switches_the_modulation_off_at_reward_ten():
    """With a reward of 10 the official p is 1 in any group with wins, the paper's p is not."""
    data, case = np.load(GOLDEN / "alf_soft_scale10.npz"), CASES["alf_soft_scale10"]
    group, _ = batch(data, case)
    rates = {
        rule: np.asarray(jax.jit(batch_advantages)(group, Settings(success_rate=rule)).success_rate)
        for rule in ("official", "trajectories")
    }
    wins = np.asarray(group.success).sum(1)
    assert (rates["official"][wins > 0] == 1.0).all()
    assert (rates["trajectories"][wins > 0] < 1.0).any()
