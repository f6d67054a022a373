"""Every recorded output of the official code, reproduced."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxmo_jax.advantages import advantages
from proxmo_jax.embeddings import Vocabulary, WordCounts, tfidf
from proxmo_jax.proximity import similar_anchors
from proxmo_jax.types import Group, Packing, Settings

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
SIGMOID_OF_ONE = 1 / (1 + np.exp(-1))


def batch(data, case) -> tuple[Packing, Group]:
    packing = Packing(data["group"], data["trajectory"], data["step"])
    texts = [str(text) for text in data["texts"]]
    if case["similarity_grouping"]:
        anchor = similar_anchors(texts, data["group"], case["similarity_threshold"])
    else:
        anchor = np.unique(data["texts"], return_inverse=True)[1].astype(np.int32)
    words = Vocabulary().counts(texts)
    mask = packing.pack(np.ones(len(texts), bool))
    packed = WordCounts(packing.pack(words.ids), packing.pack(words.counts), words.alphabetical)
    embedding, comparable = tfidf(packed, jnp.asarray(mask), max_features=case["max_features"])
    return packing, Group(
        reward=packing.pack(data["reward"]),
        mask=mask,
        success=packing.pack_trajectories(data["success"], "success"),
        action_valid=packing.pack(data["action_valid"]),
        anchor=packing.pack(anchor),
        embedding=embedding,
        comparable=comparable,
    )


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_official_code(name):
    data, case = np.load(GOLDEN / f"{name}.npz"), CASES[name]
    packing, group = batch(data, case)
    soft, std = case["mode"] == "soft_grouping", case["mode"] == "mean_std_norm"
    settings = Settings(
        discount=case["gamma"],
        invalid_penalty=case["invalid_penalty"],
        alpha=case["alpha"],
        modulation_range=case["beta"] * (SIGMOID_OF_ONE - 0.5) * case["modulation"],
        temperature=case["temperature"],
        step_weight=case["omega"],
        epsilon=case["epsilon"],
        aggregation="soft" if soft else "hard",
        episode_std=std,
        step_std=std,
        success_rate="official",
    )
    answer = jax.vmap(advantages, (0, None))(group, settings)
    wanted = {"episode_advantage": "episode", "step_advantage": "step", "advantage": "joint"}
    np.testing.assert_allclose(packing.unpack(answer.returns), data["discounted_return"], rtol=1e-4, atol=1e-5)
    for theirs, ours in wanted.items():
        mine = packing.unpack(getattr(answer, ours))[:, None] * data["response_mask"]
        np.testing.assert_allclose(mine, data[theirs], rtol=1e-4, atol=1e-5, err_msg=theirs)


def test_the_official_rule_switches_the_modulation_off_at_reward_ten():
    """With a reward of 10 the official p is 1 in any group with wins, the paper's p is not."""
    data, case = np.load(GOLDEN / "alf_soft_scale10.npz"), CASES["alf_soft_scale10"]
    _, group = batch(data, case)
    rates = {
        rule: np.asarray(jax.vmap(advantages, (0, None))(group, Settings(success_rate=rule)).success_rate)
        for rule in ("official", "trajectories")
    }
    wins = np.asarray(group.success).sum(1)
    assert (rates["official"][wins > 0] == 1.0).all()
    assert (rates["trajectories"][wins > 0] < 1.0).any()
