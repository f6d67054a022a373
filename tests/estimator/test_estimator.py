import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from proxmo_jax.errors import UserError
from proxmo_jax.estimator.estimator import advantages, discounted_returns, modulation_weight
from proxmo_jax.estimator.presets import PRESETS, dr_grpo, gigpo, grpo, proxmo
from proxmo_jax.estimator.types import Group, Packing, Settings, sweep

OF_GROUPS = sorted(set(PRESETS) - {"empg"})  # whose statistics are of the whole batch


def random_group(seed: int, members=4, turns=5, features=6, texts=4) -> Group:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, turns + 1, members)
    mask = np.arange(turns)[None] < lengths[:, None]
    anchor = rng.integers(0, texts, (members, turns)).astype(np.int32)
    vectors = rng.random((texts, features))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    success = rng.random(members) < 0.5
    reward = np.where(np.arange(turns)[None] == lengths[:, None] - 1, 10.0 * success[:, None], 0.0)
    return Group(
        reward=reward.astype(np.float32),
        mask=mask,
        success=success,
        action_valid=rng.random((members, turns)) < 0.8,
        anchor=anchor,
        embedding=vectors[anchor].astype(np.float32),
        edge=np.stack([anchor, rng.integers(0, texts + 2, anchor.shape)], -1).astype(np.int32),
    )


def as_steps(group: Group) -> list[dict]:
    return [
        {
            "trajectory": m, "step": t, "reward": float(group.reward[m, t]), "success": bool(group.success[m]),
            "valid": bool(group.action_valid[m, t]), "text": int(group.anchor[m, t]), "vector": group.embedding[m, t],
        }
        for m, t in zip(*np.nonzero(group.mask), strict=True)
    ]  # fmt: skip


@given(st.integers(0, 10_000), st.sampled_from(["soft", "hard", "none"]))
def test_equals_plain_loops(seed, mode):
    group = random_group(seed)
    answer = advantages(group, Settings(aggregation=mode))
    episode, step, joint = reference.advantages(as_steps(group), mode=mode)
    at = np.nonzero(group.mask)
    np.testing.assert_allclose(np.asarray(answer.episode)[at], episode, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(np.asarray(answer.step)[at], step, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(np.asarray(answer.joint)[at], joint, rtol=1e-4, atol=4e-5)


def test_by_hand():
    """Two attempts, the second wins at its second turn; all observations equal."""
    group = Group(
        reward=np.array([[0.0, 0.0], [0.0, 1.0]], np.float32),
        mask=np.array([[True, False], [True, True]]),
        success=np.array([False, True]),
        action_valid=np.ones((2, 2), bool),
        anchor=np.zeros((2, 2), np.int32),
    )
    answer = advantages(group, gigpo(discount=0.5))
    np.testing.assert_allclose(answer.returns, [[0, 0], [0.5, 1]])
    np.testing.assert_allclose(answer.episode, [[-2 / 3, 0], [1 / 3, 1 / 3]], rtol=1e-6)
    np.testing.assert_allclose(answer.step, [[-0.5, 0], [0, 0.5]], atol=1e-7)


@given(st.integers(0, 10_000), st.sampled_from(OF_GROUPS))
def test_padding_changes_nothing(seed, preset):
    group, settings = random_group(seed), PRESETS[preset]()
    rng = np.random.default_rng(seed)

    def pad(x, value):
        wide = [(0, 2), (0, 3)] + [(0, 0)] * (np.ndim(x) - 2)
        return np.pad(x, wide, constant_values=value)

    padded = Group(
        reward=pad(group.reward, 99.0),
        mask=pad(group.mask, False),
        success=np.concatenate([group.success, [True, True]]),
        action_valid=pad(group.action_valid, False),
        anchor=pad(group.anchor, 0),
        embedding=pad(group.embedding, float(rng.random())),
        edge=pad(group.edge, 1),
    )
    small, large = advantages(group, settings), advantages(padded, settings)
    np.testing.assert_allclose(large.success_rate, small.success_rate, rtol=1e-6)
    for name in ("returns", "episode", "step", "joint"):
        inside = np.asarray(getattr(large, name))
        m, t = group.mask.shape
        np.testing.assert_allclose(inside[:m, :t], getattr(small, name), rtol=1e-5, atol=1e-5)
        assert not inside[m:].any()
        assert not inside[:, t:].any()


@given(st.integers(0, 10_000), st.sampled_from(OF_GROUPS))
def test_order_of_members_changes_nothing(seed, preset):
    group, settings = random_group(seed), PRESETS[preset]()
    order = np.random.default_rng(seed).permutation(len(group.success))
    shuffled = jax.tree.map(lambda x: x[order] if np.ndim(x) else x, group)
    np.testing.assert_allclose(
        advantages(shuffled, settings).joint, np.asarray(advantages(group, settings).joint)[order], rtol=1e-4, atol=2e-5
    )


@given(st.floats(0, 1), st.floats(0, 1), st.booleans(), st.floats(0.5, 8), st.floats(0, 0.5))
def test_modulation_stays_in_range_and_is_monotone(p, q, success, alpha, span):
    low, high = sorted((p, q))
    at = [float(modulation_weight(jnp.float32(x), success, alpha=alpha, modulation_range=span)) for x in (low, high)]
    assert all(1 - span - 1e-5 <= w <= 1 + span + 1e-5 for w in at)
    assert at[1] <= at[0] + 1e-6


def test_temperature_limits():
    group = random_group(3)
    mean = advantages(group, proxmo(temperature=1e6)).step
    score = np.asarray(advantages(group, proxmo()).returns) - 0.1 * ~group.action_valid
    np.testing.assert_allclose(mean, np.where(group.mask, score - score[group.mask].mean(), 0), atol=1e-4)
    cold = advantages(group, proxmo(temperature=1e-4)).step
    np.testing.assert_allclose(cold, advantages(group, gigpo()).step, atol=1e-4)


def test_sweeping_settings_is_a_vmap():
    group = random_group(1)
    taus = jnp.array([0.05, 0.1, 1.0])
    swept = jax.jit(jax.vmap(lambda tau: advantages(group, proxmo(temperature=tau)).joint))(taus)
    for tau, row in zip(taus, swept, strict=True):
        np.testing.assert_allclose(row, advantages(group, proxmo(temperature=float(tau))).joint, rtol=1e-4, atol=1e-5)


def test_no_gradient_flows_and_nothing_is_nan():
    group = random_group(2)
    value = jax.grad(lambda r: advantages(Group(**{**group.__dict__, "reward": r}), proxmo()).joint.sum())(group.reward)
    assert not np.asarray(value).any()
    empty = Group(**{**group.__dict__, "mask": np.zeros_like(group.mask)})
    for preset in OF_GROUPS:
        assert np.isfinite(np.asarray(advantages(empty, PRESETS[preset]()).joint)).all()


def test_a_forgotten_vmap_is_explained():
    batch = jax.tree.map(lambda x: np.stack([x, x]) if np.ndim(x) else x, random_group(0))
    with pytest.raises(ValueError, match=r"\(2, 4, 5\).*jax.vmap"):
        advantages(batch, grpo())


@pytest.mark.parametrize(
    ("knobs", "message"),
    [({"temperature": 0}, "temperature must be > 0"), ({"aggregation": "soggy"}, "aggregation must be one of")],
)
def test_bad_settings(knobs, message):
    with pytest.raises(ValueError, match=message):
        Settings(**knobs)


def test_returns_skip_padding_between_turns():
    reward = jnp.array([[1.0, 7.0, 2.0]])
    mask = jnp.array([[True, False, True]])
    np.testing.assert_allclose(discounted_returns(reward, mask, 0.5), [[2.0, 0.0, 2.0]])


@pytest.mark.parametrize(
    ("group", "trajectory", "step", "message"),
    [
        ([], [], [], "non-empty"),
        ([0, 0], [1], [0, 1], "trajectory: got shape"),
        ([0, 1], [5, 5], [0, 1], "stands in two groups"),
        ([0, 0], [5, 5], [1, 1], "has step 1 twice"),
    ],
)
def test_packing_refuses(group, trajectory, step, message):
    with pytest.raises(ValueError, match=message):
        Packing(np.array(group), np.array(trajectory), np.array(step))


def test_packing_any_order_and_names():
    rng = np.random.default_rng(0)
    rows = [(f"g{g}", f"t{g}-{m}", s) for g in range(3) for m in range(g + 1) for s in range(m + 2)]
    rng.shuffle(rows)
    group, trajectory, step = map(np.array, zip(*rows, strict=True))
    packing = Packing(group, trajectory, step.astype(int))
    values = np.arange(len(rows)) + 1
    rectangle = packing.pack(values)
    assert packing.shape == (3, 3, 4)
    assert (packing.unpack(rectangle) == values).all()
    assert (rectangle > 0).sum() == len(rows)


def test_grpo_is_dr_grpo_over_the_std():
    group = random_group(4)
    plain, scaled = advantages(group, dr_grpo()).episode, advantages(group, grpo()).episode
    steps = as_steps(group)
    total = {m: sum(s["reward"] for s in steps if s["trajectory"] == m) for m in range(4)}
    scores = [total[s["trajectory"]] - 0.1 * (not s["valid"]) for s in steps]
    np.testing.assert_allclose(scaled, np.asarray(plain) / (np.std(scores, ddof=1) + 1e-6), rtol=1e-4)


def test_modulation_equals_the_official_table(official):
    data = np.load(official / "91_psc_weight_table.npz")
    sigmoid_of_one = 1 / (1 + np.exp(-1))
    for i, beta in enumerate(data["beta"]):
        for j, alpha in enumerate(data["alpha"]):
            for k, success in enumerate((True, False)):
                mine = modulation_weight(
                    jnp.asarray(data["p"], jnp.float32), success, alpha=alpha,
                    modulation_range=beta * (sigmoid_of_one - 0.5),
                )  # fmt: skip
                np.testing.assert_allclose(mine, data["w"][i, j, :, k], rtol=1e-5)


@pytest.mark.parametrize("std", [0, 1])
@pytest.mark.parametrize("over_steps", [0, 1])
def test_grpo_equals_the_official_one(official, std, over_steps):
    data = np.load(official / "94_grpo_baseline.npz")
    reward = data["token_level_rewards"].sum(1)
    packing = Packing(data["group_id"], data["traj_id"] + 1000 * data["group_id"], np.arange(len(reward)))
    # The official rows carry the episode's return less the penalty; here the return is paid once, at the last step.
    paid = np.array([round(float(reward[data["traj_id"] == t].max())) for t in data["traj_id"]])
    score, valid = packing.pack(paid.astype(np.float32)), packing.pack(reward > paid - 0.05)
    mask = packing.pack(np.ones(len(reward), bool))
    last = np.where(mask, np.arange(mask.shape[2]), -1).max(2)[..., None] == np.arange(mask.shape[2])
    group = Group(score * last, mask, np.zeros(mask.shape[:2], bool), valid)
    settings = Settings(
        modulation_range=0.0, aggregation="none", episode_std=bool(std), lone_step="official",
        episode_over="steps" if over_steps else "trajectories",
    )  # fmt: skip
    mine = packing.unpack(jax.vmap(advantages, (0, None))(group, settings).joint)
    wanted = data[f"adv_std{std}_cross{over_steps}"][:, 0]
    np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-5)


WITHOUT_EPSILON = {
    "grpo": PRESETS["grpo"](epsilon=0.0),
    "gigpo": gigpo(discount=1.0, episode_std=True, step_std=True, epsilon=0.0),
    "rloo": PRESETS["rloo"](episode_std=True, epsilon=0.0),
}
ONE_GROUP = jax.jit(advantages)


@given(st.floats(-1e6, 1e6, width=32), st.integers(0, 1000), st.sampled_from(sorted(WITHOUT_EPSILON)))
def test_equal_scores_give_exactly_zero_without_an_epsilon(score, seed, preset):
    lengths = np.random.default_rng(seed).integers(0, 7, 5)
    mask = np.arange(6) < lengths[:, None]
    last = np.arange(6) == lengths[:, None] - 1
    group = Group(np.float32(score) * last, mask, np.ones(5, bool), mask, np.zeros((5, 6), np.int32))
    answer = ONE_GROUP(group, WITHOUT_EPSILON[preset])
    assert not np.asarray(answer.episode).any()
    assert not np.asarray(answer.step).any()


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("std", [{"aggregation": "none"}, {"aggregation": "hard", "step_std": True}])
def test_scores_over_their_deviation_do_not_depend_on_their_size(size, std):
    """Squares of such scores are beyond float32, above or below."""
    group = random_group(6)
    reward = np.random.default_rng(0).normal(size=group.mask.shape).astype(np.float32)
    settings = Settings(episode_std=True, epsilon=0.0, invalid_penalty=0.0, **std)
    one, other = (
        ONE_GROUP(Group(**{**group.__dict__, "reward": reward * np.float32(s)}), settings) for s in (1.0, size)
    )
    assert np.abs(one.joint).max() > 0.5
    np.testing.assert_allclose(other.joint, one.joint, rtol=1e-4, atol=1e-4)


def test_a_lone_step_has_nothing_to_be_compared_with():
    mask = np.ones((1, 1), bool)
    group = Group(
        10.0 * mask.astype(np.float32), mask, np.ones(1, bool), mask, np.zeros((1, 1), np.int32), np.ones((1, 1, 2)),
        edge=np.zeros((1, 1, 2), np.int32),
    )  # fmt: skip
    for preset in sorted(set(OF_GROUPS) - {"official"}):
        answer = advantages(group, PRESETS[preset]())
        assert float(answer.joint[0, 0]) == 0.0, preset
        assert float(answer.returns[0, 0]) == 10.0
    by_the_official_code = advantages(group, PRESETS["official"](modulation_range=0.0))
    assert float(by_the_official_code.joint[0, 0]) == 10.0
    lone = Group(np.array([[0.0, 10.0]]), np.ones((1, 2), bool), np.ones(1, bool), np.ones((1, 2), bool))
    assert not np.asarray(advantages(lone, PRESETS["rloo"]()).joint).any()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("discount", (-0.1, 1.1, np.nan, np.inf)), ("invalid_penalty", (-1, np.nan, 1e39)), ("alpha", (0, -2.0)),
        ("modulation_range", (-0.1, 1.5, np.nan)), ("temperature", (0, -1, 1e-45, np.inf, np.float32(np.nan))),
        ("step_weight", (-1, np.inf, 10**400)), ("lam", (-0.1, 1.1)),
        ("step_invalid_penalty", (-1.5, np.nan)), ("epsilon", (-1e-9, np.nan)),
    ],
)  # fmt: skip
def test_numbers_that_no_setting_can_have(name, values):
    for value in values:
        with pytest.raises(UserError, match=f"^{name} must be "):
            Settings(**{name: value})
    with pytest.raises(UserError, match=f"^{name} must be "):
        sweep(proxmo(), **{name: [0.5, values[0]]})


def test_settings_are_a_tree_of_anything():
    """Arrays are taken as they are, and so is what JAX puts in their place."""
    settings = jax.tree.map(jnp.shape, Settings(temperature=jnp.zeros(3)))
    assert settings.temperature == (3,)
    assert jax.tree.map(lambda _: None, Settings()).alpha is None


def test_masks_are_bool():
    group = random_group(0)
    mask = np.where(group.mask, 1.0, np.nan)
    with pytest.raises(ValueError, match="mask: got float64, need bool"):
        advantages(Group(**{**group.__dict__, "mask": mask}), grpo())
