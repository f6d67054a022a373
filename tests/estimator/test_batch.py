"""The estimator on whole batches: what changes nothing, and the same answer however the groups are computed."""

import jax
import numpy as np
import pytest
from close import EPS
from hypothesis import given, settings
from hypothesis import strategies as st

from proxmo_jax.errors import UserError
from proxmo_jax.estimator.batch import batch_advantages, pad_groups, pmapped_advantages, sharded_advantages
from proxmo_jax.estimator.embeddings import tfidf
from proxmo_jax.estimator.packing import Packing
from proxmo_jax.estimator.presets import PRESETS, gigpo, proxmo
from proxmo_jax.estimator.steps_file import RESULTS, steps_advantages
from proxmo_jax.estimator.types import Group, Settings, sweep
from proxmo_jax.estimator.words import WordCounts
from proxmo_jax.policy.sharding import make_mesh

PLACES = ["desk 1", "shelf 2", "fridge 1", "bed 1", "garbage can 3"]
BATCHED = jax.jit(batch_advantages)


def random_steps(seed: int, groups: int = 5, members: int = 3, turns: int = 4) -> dict:
    """Ragged steps in any order, with string ids."""
    rng = np.random.default_rng(seed)
    rows = []
    for g in range(groups):
        for m in range(rng.integers(1, members + 1)):
            won = bool(rng.random() < 0.5)
            length = int(rng.integers(1, turns + 1))
            for t in range(length):
                place, thing = rng.choice(PLACES), rng.choice(["mug", "pen", "nothing"])
                text = str(rng.choice([f"You arrive at {place}. You see a {thing} 1.", "Nothing happens.", "!?", ""]))
                reward = 10.0 * (won and t == length - 1) + float(rng.normal()) * 0.1
                rows.append((f"g{g}", f"g{g}-{m}", 3 * t, reward, won, bool(rng.random() < 0.8), text))
    led_to = [row[6] for row in rows[1:]] + ["the end"]  # the last turn of a trajectory leads anywhere
    entropy = rng.random(len(rows))
    rows = [(*row, *more) for row, *more in zip(rows, led_to, entropy, strict=True)]
    order = rng.permutation(len(rows))
    names = ("group", "trajectory", "step", "reward", "success", "action_valid", "texts", "next_texts", "entropy")
    return {name: np.array([rows[i][k] for i in order]) for k, name in enumerate(names)}


def batch(steps: dict, preset: str = "proxmo"):
    threshold = 0.95 if preset == "gigpo_similarity" else None
    return Group.from_steps(**{**steps, "texts": steps["texts"].tolist()}, similarity_threshold=threshold)


@given(st.integers(0, 10_000), st.sampled_from(sorted(set(PRESETS) - {"gigpo_similarity"})))
def test_file_order_and_names_change_nothing(seed, preset):
    """Another order of steps, members and groups, and other names for them. First-fit clusters do depend on order."""
    steps, settings = random_steps(seed), PRESETS[preset]()
    order = np.random.default_rng(seed + 1).permutation(len(steps["step"]))
    renamed = {
        **steps,
        "group": np.unique(steps["group"], return_inverse=True)[1] * -7,
        "trajectory": np.array([f"x{name[::-1]}" for name in steps["trajectory"]]),
    }
    moved = {name: values[order] for name, values in renamed.items()}
    before, after = steps_advantages(steps, settings), steps_advantages(moved, settings)
    for name in RESULTS:
        np.testing.assert_allclose(after[name], before[name][order], rtol=1e-4, atol=3e-5)


@settings(max_examples=15)  # most have shapes of their own, which are compiled
@given(st.integers(0, 10_000), st.sampled_from(sorted(PRESETS)))
def test_padding_groups_turns_and_words_changes_nothing(seed, preset):
    settings = PRESETS[preset]()
    group, packing = batch(random_steps(seed), preset)
    wanted = packing.unpack(BATCHED(group, settings).joint)

    def pad(x, value, axes):
        return np.pad(x, [(0, n) for n in axes] + [(0, 0)] * (np.ndim(x) - len(axes)), constant_values=value)

    words = group.words
    wider = Group(
        reward=pad(group.reward, np.float32(np.nan), (2, 1, 3)),
        mask=pad(group.mask, False, (2, 1, 3)),
        success=pad(group.success, True, (2, 1)),
        action_valid=pad(group.action_valid, False, (2, 1, 3)),
        anchor=pad(group.anchor, 1, (2, 1, 3)),
        words=words and WordCounts(pad(words.ids, 2, (2, 3, 5)), pad(words.counts, 0, (2, 3, 5)), words.alphabetical),
        edge=pad(group.edge, 1, (2, 1, 3)),
        text=pad(group.text, 1, (2, 1, 3)),
        entropy=pad(group.entropy, np.nan, (2, 1, 3)),
        anchored_by=group.anchored_by,
    )
    answer = BATCHED(wider, settings)
    np.testing.assert_allclose(packing.unpack(answer.joint), wanted, rtol=1e-4, atol=3e-5)
    for name in ("returns", "modulation", "episode", "step", "joint"):
        assert not np.asarray(getattr(answer, name))[~wider.mask].any()


@given(st.integers(0, 10_000), st.floats(-50, 50), st.sampled_from(["gigpo", "proxmo", "dr_grpo", "grpo", "rloo"]))
def test_a_constant_on_all_scores_of_a_group_changes_no_advantage(seed, constant, preset):
    """A constant on every episode and step score: paid at the last step, with discount 1."""
    steps, settings = random_steps(seed), PRESETS[preset](discount=1.0, modulation_range=0.0)
    last = np.array([
        step == steps["step"][steps["trajectory"] == name].max()
        for step, name in zip(steps["step"], steps["trajectory"], strict=True)
    ])  # fmt: skip
    moved = {**steps, "reward": steps["reward"] + constant * last}
    before, after = steps_advantages(steps, settings)["advantage"], steps_advantages(moved, settings)["advantage"]
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=2e-3)


@given(st.integers(0, 10_000))
def test_equal_observations_give_plain_group_baselines(seed):
    steps = random_steps(seed)
    steps["texts"] = np.array(["You see a desk."] * len(steps["texts"]))
    soft, hard = (steps_advantages(steps, settings)["step_advantage"] for settings in (proxmo(), gigpo()))
    returns = steps_advantages(steps, proxmo())["discounted_return"]
    score = returns - 0.1 * ~steps["action_valid"]
    mean = np.array([score[steps["group"] == name].mean() for name in steps["group"]])
    np.testing.assert_allclose(soft, score - mean, atol=2e-5)
    np.testing.assert_allclose(hard, score - mean, atol=2e-5)


@given(st.integers(0, 10_000))
def test_singleton_groups_have_no_step_advantage(seed):
    steps = random_steps(seed)
    steps["texts"] = np.array([f"thing{i} place{i}" for i in range(len(steps["texts"]))])
    assert not steps_advantages(steps, gigpo())["step_advantage"].any()
    alone = np.array([(steps["group"] == name).sum() == 1 for name in steps["group"]])
    assert not steps_advantages(steps, proxmo())["step_advantage"][alone].any()


def test_settings_sweep_over_a_batch():
    group, _ = batch(random_steps(3))
    settings = sweep(proxmo(alpha=2), temperature=[0.05, 0.1, 1], step_weight=[0, 2])
    assert settings.temperature.tolist() == np.repeat(np.float32([0.05, 0.1, 1]), 2).tolist()
    swept = jax.jit(jax.vmap(batch_advantages, (None, 0)))(group, settings).joint
    for i, answer in enumerate(swept):
        one = proxmo(alpha=2, temperature=[0.05, 0.1, 1][i // 2], step_weight=[0, 2][i % 2])
        np.testing.assert_allclose(answer, BATCHED(group, one).joint, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="kernel is no numeric knob"):
        sweep(proxmo(), kernel=["dense"])


@pytest.mark.parametrize(("groups", "preset"), [(11, "proxmo"), (11, "gigpo"), (11, "official"), (3, "proxmo")])
def test_every_way_to_compute_a_batch_agrees(preset, groups):
    """One device, 8 on a mesh, 8 under pmap, in chunks; numbers of groups that do not divide included."""
    assert jax.device_count() == 8
    settings = PRESETS[preset](max_features=6)  # a cut through the vocabulary crosses devices, too
    group, _ = batch(random_steps(groups, groups=groups))
    wanted = BATCHED(group, settings)
    # Scores are at most 11. A similarity, a sum over 6 words, is off by 6 roundings; the softmax divides it by the
    # temperature, and a baseline is a sum over 12 steps.
    atol = EPS * 11 * (2 * 6 / 0.1 + 2 * 12)
    others = {
        "shard_map": sharded_advantages(group, settings, mesh=make_mesh()),
        "pmap": pmapped_advantages(group, settings),
        "chunks": jax.jit(batch_advantages, static_argnames="chunk")(group, settings, chunk=2),
        "chunks on a mesh": sharded_advantages(group, settings, mesh=make_mesh(), chunk=1),
    }
    for way, answer in others.items():
        for name in ("returns", "success_rate", "modulation", "episode", "step", "joint"):
            mine = np.asarray(getattr(answer, name))
            np.testing.assert_allclose(mine, getattr(wanted, name), rtol=0, atol=atol, err_msg=f"{way}: {name}")


@pytest.mark.parametrize("kernel", ["blockwise", "pallas"])
def test_kernels_agree_on_a_mesh(kernel):
    group, _ = batch(random_steps(1, groups=9))
    wanted = BATCHED(group, proxmo()).joint
    sharded = sharded_advantages(group, proxmo(kernel=kernel), mesh=make_mesh()).joint
    np.testing.assert_allclose(sharded, wanted, rtol=0, atol=EPS * 11 * (2 * 12 / 0.1 + 2 * 12))


def test_distinct_observations_are_the_steps_own_embeddings():
    """Counts of distinct texts, and a unit vector per step from TF-IDF of the whole batch: the same answer."""
    steps = random_steps(5)
    group, packing = batch(steps)
    from proxmo_jax.estimator.words import Vocabulary

    words = Vocabulary().counts(steps["texts"].tolist())
    packed = WordCounts(packing.pack(words.ids), packing.pack(words.counts), words.alphabetical)
    unit, comparable = tfidf(packed, group.mask)
    dense = Group(**{**group.__dict__, "words": None, "anchor": None, "embedding": unit, "comparable": comparable})
    a, b = (BATCHED(g, proxmo(exclude_self=True)).joint for g in (group, dense))
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_proximity_weights_on_request():
    group, _ = batch(random_steps(2))
    answer = jax.jit(batch_advantages, static_argnames="with_proximity")(group, proxmo(), with_proximity=True)
    flat = np.asarray(group.mask).reshape(len(group.mask), -1)
    np.testing.assert_allclose(np.asarray(answer.proximity).sum(-1), flat, atol=1e-5)
    assert jax.eval_shape(batch_advantages, group, proxmo()).proximity is None


def test_a_second_batch_of_the_same_shape_compiles_nothing():
    run = jax.jit(lambda group, settings: batch_advantages(group, settings))
    for seed in range(3):
        run(pad_groups(batch(random_steps(0))[0], 8), Settings(temperature=0.1 + seed))
    assert run._cache_size() == 1


def test_words_without_an_embedding_are_explained():
    group, _ = batch(random_steps(0))
    one = jax.tree.map(lambda x: x[0], Group(**{**group.__dict__, "words": None}))
    from proxmo_jax.estimator.estimator import advantages

    with pytest.raises(ValueError, match="embedding: got nothing, need"):
        advantages(one, proxmo())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": [1.0, np.nan]}, "reward: row 1 has nan, need finite numbers"),
        ({"reward": [1.0]}, r"reward: got shape \(1,\), need 2 rows"),
        ({"reward": ["a", "b"]}, "reward: row 0 has 'a', need a number"),
        ({"success": [True, False]}, "success: the steps of trajectory 5 disagree"),
        ({"success": ["yes", "no"]}, r"success: row 0 has 'yes', need true or false \(1 or 0\)"),
        ({"texts": ["a"]}, "texts: got 1 rows, need 2"),
        ({"anchor": [0, 0]}, "anchor: texts number their own anchors"),
        ({"step": [0, np.inf]}, "step: row 1 has inf"),
        ({"group": [0, 1]}, "trajectory: 5 stands in two groups"),
        ({"step": [1, 1]}, "step: trajectory 5 has step 1 twice"),
        ({"step": [1753171200, 1753171200]}, "has step 1753171200 twice"),
        ({"step": np.array(["2025-07-22T08:00", "NaT"], "M8[s]")}, "step: row 1 has NaT"),
        ({"step": [0, "1"]}, "step: row 1 has '1', need a number"),
        ({"step": np.array([0, 1j])}, "step: need numbers or times, got complex128"),
        ({"group": [None, None]}, "group: row 0 has None, need an int or a string that is not empty"),
        ({"group": [0, np.nan]}, "group: row 1 has nan, need an int"),
        ({"group": np.array([0.0, np.nan])}, "group: row 0 has 0.0, need an int"),
        ({"group": np.ma.array([0, 0], mask=[0, 1])}, "group: row 1 has None, need an int"),
        ({"group": ["a", ""]}, "group: row 1 has '', need an int"),
        ({"group": [0, True]}, "group: row 1 has True, need an int"),
        ({"group": [1, 1.0]}, "group: row 1 has 1.0, need an int"),
        ({"group": [1, "1"]}, "group: row 0 has 1 and row 1 '1', need ints or strings, not both"),
        ({"group": [[1], [1]]}, r"group: row 0 has \[1\], need an int"),
        ({"group": np.zeros((2, 2), int)}, r"group: need a non-empty array of shape \(N,\), got shape \(2, 2\)"),
        ({"trajectory": [5, None]}, "trajectory: row 1 has None, need an int"),
        ({"reward": [0.0, None]}, "reward: row 1 has None, need a number"),
        ({"reward": [0.0, -1e39]}, r"reward: row 1 has -1e\+39, need numbers from -3.4e\+38 to 3.4e\+38"),
        ({"reward": [0, 10**400]}, "reward: row 1 has 1.79"),
        ({"reward": np.zeros((2, 3))}, r"reward: got shape \(2, 3\), need one number per step"),
        ({"success": [True, np.nan]}, "success: row 1 has nan, need true or false"),
        ({"action_valid": [1, 2]}, "action_valid: row 1 has 2, need true or false"),
        ({"texts": ["a", None]}, "texts: row 1 has None, need a string"),
        ({"texts": np.zeros(2)}, "texts: need strings, got float64"),
        ({"texts": None, "anchor": [0, None]}, "anchor: row 1 has None, need an int"),
        ({"texts": None, "similarity_threshold": 0.9}, "similarity_threshold: there are no texts"),
        ({"similarity_threshold": 0.0}, "similarity_threshold must be above 0"),
        ({"embedding": [[1.0], [1.0, 2.0]]}, "embedding: need rows of numbers, all of one length"),
        ({"trajectory": [5]}, r"trajectory: got shape \(1,\), need \(2,\)"),
        ({"group": []}, "group: need a non-empty array"),
    ],
)
def test_bad_steps_are_named(change, message):
    steps = {
        "group": [0, 0], "trajectory": [5, 5], "step": [0, 1], "reward": [0.0, 1.0], "success": [True, True],
        "action_valid": [True, True], "texts": ["aa", "bb"],
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        Group.from_steps(**{**steps, **change})


IDS = st.one_of(
    st.lists(st.integers() | st.integers(2**63 - 2, 2**64 + 2) | st.integers(-2, 2), min_size=1, max_size=12),
    st.lists(st.text(min_size=1, max_size=3) | st.sampled_from(["1", "01", "1.0", "nan", "None", "a\0"]), min_size=1),
)


@given(IDS)
def test_ids_are_equal_where_python_says_so(ids):
    """Ints of any size and any strings, also as NumPy has them where it does not change them."""
    kinds = [ids, np.array(ids, object)]
    if all(isinstance(name, int) and -(2**63) <= name < 2**63 for name in ids):
        kinds.append(np.array(ids, np.int64))
    for names in kinds:
        group, _, _ = Packing(names, np.arange(len(ids)), np.zeros(len(ids))).index
        for i, name in enumerate(ids):
            assert [group[i] == other for other in group] == [name == other for other in ids]


@given(
    st.lists(
        st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(2**53 - 2, 2**53 + 2)
        | st.sampled_from([2.0**53, 2.0**64, 2**64 - 1, -0.5]), min_size=1, unique=True,
    )
)  # fmt: skip
def test_turns_are_ordered_as_python_orders_them(steps):
    """No two are one because float32 or float64 cannot tell them apart."""
    _, _, turn = Packing([0] * len(steps), [0] * len(steps), steps).index
    assert [steps[i] for i in np.argsort(turn)] == sorted(steps)


@pytest.mark.parametrize(
    "steps",
    [
        np.array([2**64 - 1, 2**64 - 2, 0], np.uint64),
        np.array([2**53 + 1, 2**53, -1], np.int64),
        np.array([1753171200.000002, 1753171200.000001, 0.0]),
        np.array(["2025-07-22T08:00:00.000000002", "2025-07-22T08:00:00.000000001", "1970-01-01"], "M8[ns]"),
        np.array([3, 2, 1], "m8[s]"),
    ],
)
def test_turns_are_ordered_in_the_type_they_come_in(steps):
    _, _, turn = Packing([0] * 3, ["t"] * 3, steps).index
    assert turn.tolist() == [2, 1, 0]
    with pytest.raises(UserError, match=r"has step .* twice"):
        Packing([0] * 3, ["t"] * 3, steps[[0, 0, 1]])


@pytest.mark.parametrize("anchor", [[2**40, 2**40 + 2**32, 2**40], [-1, 2**64 - 1, -1], ["a", "b", "a"]])
def test_anchors_of_the_callers_own_are_any_ids(anchor):
    steps = {
        "group": [0, 0, 0], "trajectory": [0, 1, 2], "step": [0, 0, 0], "reward": [0.0, 5.0, 1.0],
        "success": [False, True, False], "action_valid": [True] * 3,
    }  # fmt: skip
    group, packing = Group.from_steps(**steps, anchor=anchor)
    assert group.anchor.dtype == np.int32
    np.testing.assert_allclose(packing.unpack(BATCHED(group, gigpo()).step), [-0.5, 0, 0.5])


def test_similar_texts_are_told_where_anchors_are_numbered():
    texts = ["You see a red lamp on the desk 1.", "You see a red lamp on the desk 2.", "Nothing happens."]
    steps = {
        "group": [0, 0, 0], "trajectory": [0, 1, 2], "step": [0, 0, 0], "reward": [0.0, 1.0, 5.0],
        "success": [False, False, True], "action_valid": [True] * 3, "texts": texts,
    }  # fmt: skip
    settings = PRESETS["gigpo_similarity"]()
    alike, packing = Group.from_steps(**steps, similarity_threshold=0.95)
    np.testing.assert_allclose(packing.unpack(BATCHED(alike, settings).step), [-0.5, 0.5, 0])
    np.testing.assert_array_equal(steps_advantages(steps, settings)["step_advantage"], np.float32([-0.5, 0.5, 0]))
    strict = steps_advantages(steps, settings, similarity_threshold=1.0)
    assert not strict["step_advantage"].any()
    equal, _ = Group.from_steps(**steps)
    for run in (batch_advantages, lambda *given: sharded_advantages(*given, mesh=make_mesh())):
        with pytest.raises(UserError, match="anchor: numbered by equal texts, gigpo_similarity needs"):
            run(equal, settings)
    own, _ = Group.from_steps(**{**steps, "texts": None}, anchor=[4, 4, 5])
    np.testing.assert_allclose(packing.unpack(BATCHED(own, settings).step), [-0.5, 0.5, 0])


@pytest.mark.parametrize(("seed", "most"), [(0, 1), (1, 3), (2, 6), (3, 9)])
def test_words_that_are_cut_on_the_host_change_nothing(seed, most):
    steps = random_steps(seed)
    steps["texts"] = [f"{text} extra{i % 3} more{i % 5}" for i, text in enumerate(steps["texts"])]
    whole, packing = Group.from_steps(**steps)
    narrow, _ = Group.from_steps(**steps, max_features=most)
    a, b = (BATCHED(group, proxmo(max_features=most)).joint for group in (whole, narrow))
    np.testing.assert_allclose(a, b, atol=2e-5)
    assert packing.shape == a.shape


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=8, max_size=8))
def test_answers_are_finite_or_refused(rewards):
    """Any rewards float32 has; the largest cannot be added up."""
    count = len(rewards)
    steps = {
        "group": [0] * count, "trajectory": [i // 2 for i in range(count)], "step": list(range(count)),
        "reward": rewards, "success": [False] * count, "action_valid": [True] * count, "texts": ["a desk"] * count,
    }  # fmt: skip
    for knobs in (proxmo(), PRESETS["grpo"](epsilon=0.0), gigpo(step_std=True, epsilon=0.0)):
        try:
            answer = steps_advantages(steps, knobs)
        except UserError:
            assert max(map(abs, rewards)) > 1e36
        else:
            assert all(np.isfinite(values).all() for values in answer.values())
