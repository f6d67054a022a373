"""HGPO, GraphGPO, G2PO, GAGPO and EMPG: public code's outputs, slow versions, and what they have in common."""

import json
from itertools import pairwise
from pathlib import Path

import jax
import methods_reference
import numpy as np
import pytest
from close import EPS
from hypothesis import given, settings
from hypothesis import strategies as st

from proxmo_jax.cli import main
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.batch import batch_advantages, pmapped_advantages, sharded_advantages
from proxmo_jax.estimator.cases import settings_of_case
from proxmo_jax.estimator.estimator import advantages
from proxmo_jax.estimator.packing import similar_anchors
from proxmo_jax.estimator.presets import PRESETS, g2po, gagpo, gigpo, graphgpo, hgpo, proxmo
from proxmo_jax.estimator.states import goal_distances
from proxmo_jax.estimator.steps_file import RESULTS, steps_advantages
from proxmo_jax.estimator.types import Group, Settings
from proxmo_jax.policy.sharding import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden" / "methods"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
METHODS = ("hgpo", "graphgpo", "g2po", "gagpo", "empg")
INPUTS = {
    "texts", "next_texts", "group", "trajectory", "step", "reward", "episode_return", "success", "action_valid",
    "response_mask", "entropy",
}  # fmt: skip


def random_steps(seed: int, dense: bool, groups: int = 3) -> list[dict]:
    """Steps of a few groups in a small world: observations recur, some attempts win, rewards may be dense."""
    rng = np.random.default_rng(seed)
    steps = []
    for g in range(groups):
        places = int(rng.integers(1, 6))
        for m in range(rng.integers(1, 5)):
            length, won = int(rng.integers(1, 8)), bool(rng.random() < 0.5)
            seen = rng.integers(0, places, length + 1)
            for t in range(length):
                reward = 10.0 * (won and t == length - 1) + dense * float(rng.integers(-8, 9)) / 8
                steps.append({
                    "group": g, "trajectory": 100 * g + m, "step": t, "reward": reward, "success": won,
                    "valid": bool(rng.random() < 0.8), "text": f"You are at place{seen[t]}.",
                    "next_text": f"You are at place{seen[t + 1]}." if t < length - 1 or rng.random() < 0.5 else "Over.",
                    "entropy": float(rng.random()),
                })  # fmt: skip
    return steps


def as_arrays(steps: list[dict]) -> dict:
    names = {"action_valid": "valid", "texts": "text", "next_texts": "next_text"}
    same = ("group", "trajectory", "step", "reward", "success", "entropy")
    return {name: [s[theirs] for s in steps] for name, theirs in (names | dict(zip(same, same, strict=True))).items()}


# Choices compile programs: two of each method. Numbers do not.
CHOICES = {
    "hgpo": [{"history_length": 1, "base_group": True}, {"history_length": 3, "mode": "mean_norm"}],
    "graphgpo": [{"normalize_distance": True}, {"mode": "mean_norm"}],
    "g2po": [{}, {"mode": "mean_norm"}],
    "gagpo": [{"values_over": "batch"}, {"values_over": "group", "standardize": False}],
    "empg": [{}, {"norm_adv_by_std": False}],
}
NUMBERS = {
    "gamma": (0.1, 0.5, 0.95), "invalid_penalty": (0.0, 0.1, 0.5), "length_weight_alpha": (0.0, 1.0, 2.0),
    "step_advantage_w": (0.5, 1.0), "episode_advantage_w": (0.0, 0.7), "step_invalid_penalty": (0.0, 0.1, 0.4),
    "value_discount": (0.5, 0.95), "lambda": (0.0, 0.8, 1.0), "k": (0.0, 1.0, 2.0), "k_f": (0.5, 1.0),
    "zeta": (0.0, 0.05, 0.5), "success_reward": (10.0, 1.0),
}  # fmt: skip


def random_rules(seed: int, method: str) -> dict:
    """Parameters of a method by the names of the cases, as other cases could have them."""
    rng = np.random.default_rng(seed)
    some = next(case for case in CASES.values() if case["method"] == method)
    numbers = {name: values[rng.integers(len(values))] for name, values in NUMBERS.items() if name in some}
    return {**some, **numbers, **CHOICES[method][seed % 2]}


BATCHED = jax.jit(batch_advantages)


def estimate(steps: dict, estimator: Settings, shape=(3, 4, 7), **how) -> dict[str, np.ndarray]:
    """Results by name, in the order of the steps; batches have one shape, so that few programs are compiled."""
    group, packing = Group.from_steps(**steps, **how, count_words=estimator.aggregation == "soft")
    short = [a - b for a, b in zip(shape, packing.shape, strict=True)]

    def pad(x):
        return np.pad(x, [(0, n) for n in short[: x.ndim]] + [(0, 0)] * (x.ndim - 3)) if x is not None else None

    wide = {name: pad(x) for name, x in group.__dict__.items() if name not in ("words", "anchored_by")}
    answer = BATCHED(Group(**wide, words=group.words, anchored_by=group.anchored_by), estimator)
    found = {name: packing.unpack(getattr(answer, ours)) for name, ours in RESULTS.items()}
    return found | {name: packing.unpack(values) for name, values in answer.parts.items()}


@pytest.mark.parametrize("name", ["hgpo_base_group", "graphgpo_similarity", "g2po_invalid", "gagpo_batch", "empg_mean"])
def test_the_command_agrees_with_public_code(name, tmp_path):
    """From a case's file and its parameters to a file of advantages."""
    source, target = GOLDEN / f"{name}.npz", tmp_path / "out.npz"
    assert main(["advantages", str(source), str(target), "--case", str(GOLDEN / "cases.json"), "--parts"]) == 0
    recorded, answer = np.load(source), np.load(target)
    for key in sorted(set(recorded.files) - INPUTS):
        np.testing.assert_allclose(answer[key], recorded[key], rtol=2e-5, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_public_code(name):
    """Every array of every case."""
    recorded, case = np.load(GOLDEN / f"{name}.npz"), CASES[name]
    estimator, nodes = settings_of_case(case)
    mask = recorded["response_mask"]
    steps = {key: recorded[key] for key in INPUTS & set(recorded.files) - {"episode_return", "response_mask"}}
    if "entropy" in steps:
        steps["entropy"] = (recorded["entropy"] * mask).sum(1) / mask.sum(1)
    answer = estimate(steps, estimator, shape=(7, 16, 20), node_similarity=nodes)
    for key in sorted(set(recorded.files) - INPUTS):
        finite = np.isfinite(recorded[key])
        ours = answer[key] if answer[key].ndim == recorded[key].ndim else answer[key][:, None] * mask
        assert np.isfinite(ours[finite]).all()
        if key == "level_advantage":
            assert (np.isfinite(ours) == finite).all()
        else:
            assert finite.all() or not case["finite"]
        np.testing.assert_allclose(ours[finite], recorded[key][finite], rtol=2e-5, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 10_000), dense=st.booleans())
def test_equals_plain_loops(method, seed, dense):
    steps, rules = random_steps(seed, dense), random_rules(seed, method)
    answer = estimate(as_arrays(steps), settings_of_case(rules)[0])
    wanted = methods_reference.METHODS[method](steps, rules)
    for name, values in wanted.items():
        values = np.array(values, np.float64)
        # A division by a small standard deviation multiplies rounding errors of scores of 10.
        np.testing.assert_allclose(answer[name], values, rtol=2e-4, atol=2e-4, err_msg=name)


@given(st.integers(0, 10_000), st.booleans())
def test_the_papers_rules(seed, dense):
    steps = random_steps(seed, dense)
    rules = {**random_rules(seed, "hgpo"), "mode": "mean_std_norm", "base_group": False, "history_length": 2}
    alpha = rules["length_weight_alpha"]
    estimator = hgpo(discount=rules["gamma"], invalid_penalty=rules["invalid_penalty"], length_weight_alpha=alpha)
    wanted = methods_reference.hgpo(steps, rules, levels="paper")["advantage"]
    np.testing.assert_allclose(estimate(as_arrays(steps), estimator)["advantage"], wanted, rtol=2e-4, atol=2e-4)
    rules = {**random_rules(seed, "graphgpo"), "normalize_distance": False, "mode": "mean_std_norm"}
    estimator = graphgpo(
        discount=rules["gamma"], success_reward=rules["success_reward"], invalid_penalty=rules["invalid_penalty"]
    )
    wanted = methods_reference.graphgpo(steps, rules, paper=True)["step_advantage"]
    np.testing.assert_allclose(estimate(as_arrays(steps), estimator)["step_advantage"], wanted, rtol=2e-4, atol=2e-4)


def test_a_path_over_several_trajectories():
    """Four attempts, of which only the last one wins; the first is three changes of trajectory away from the goal."""
    walks = [[0, 1, 2], [1, 3, 9], [3, 4, 8], [4, 5, 6, 7]]
    edge, mask = np.zeros((4, 3, 2), np.int32), np.zeros((4, 3), bool)
    for m, walk in enumerate(walks):
        for t, pair in enumerate(pairwise(walk)):
            edge[m, t], mask[m, t] = pair, True
    here, there = goal_distances(edge, np.array([False, False, False, True]), mask)
    assert here.tolist() == [[6, 5, 0], [5, 4, 0], [4, 3, 0], [3, 2, 1]]
    assert there.tolist() == [[5, 7, 0], [4, 7, 0], [3, 7, 0], [2, 1, 0]]
    nobody = goal_distances(edge, np.zeros(4, bool), mask)
    assert (np.asarray(nobody) == np.stack([mask] * 2)).all()


def soft_variants() -> dict[str, Settings]:
    soft = {"aggregation": "soft"}
    return {
        "soft hgpo": hgpo(**soft), "soft g2po": g2po(**soft), "soft gagpo": gagpo(**soft),
        "soft graphgpo": graphgpo(**soft),
        "modulated gagpo": gagpo(**soft, episode_over="steps", modulation_range=0.05),
        "modulated g2po": g2po(modulation_range=0.05), "official gagpo": gagpo(values_over="batch"),
        "progress": graphgpo(path="progress"), "base hgpo": hgpo(base_group=True, history_weights="official"),
        "others' values": gagpo(**soft, exclude_self=True),
    }  # fmt: skip


OF_BATCHES = ("empg", "official gagpo")  # with statistics of the whole batch
EVERY = {name: PRESETS[name]() for name in METHODS} | soft_variants()


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=10)
@given(seed=st.integers(0, 10_000))
def test_order_of_members_and_groups_changes_nothing(name, seed):
    steps = random_steps(seed, dense=False)
    order = np.random.default_rng(seed).permutation(len(steps))
    moved = [{**steps[i], "group": -steps[i]["group"]} for i in order]
    before, after = (estimate(as_arrays(each), EVERY[name]) for each in (steps, moved))
    for result in RESULTS:
        np.testing.assert_allclose(after[result], before[result][order], rtol=1e-4, atol=1e-4, err_msg=result)


@pytest.mark.parametrize("name", EVERY)
def test_padding_and_devices_change_nothing(name):
    """Eight devices without padding beside one with a group, a member, a turn and a text too many."""
    assert jax.device_count() == 8
    group, _ = Group.from_steps(**as_arrays(random_steps(7, dense=True, groups=11)))
    wide = jax.tree.map(lambda x: np.pad(x, [(0, 1)] * min(x.ndim, 3) + [(0, 0)] * max(x.ndim - 3, 0)),
                        Group(**{**group.__dict__, "words": None}))  # fmt: skip
    words = group.words._replace(ids=np.pad(group.words.ids, ((0, 1), (0, 0), (0, 0))),
                                 counts=np.pad(group.words.counts, ((0, 1), (0, 0), (0, 0))))  # fmt: skip
    reward = np.where(wide.mask, wide.reward, np.nan)
    padded = np.asarray(BATCHED(Group(**{**wide.__dict__, "words": words, "reward": reward}), EVERY[name]).joint)
    assert not padded[~wide.mask].any()

    others = {"shard_map": sharded_advantages(group, EVERY[name], mesh=make_mesh())}
    if name in OF_BATCHES:
        others["pmap"] = pmapped_advantages(group, EVERY[name])
        others["chunks on a mesh"] = sharded_advantages(group, EVERY[name], mesh=make_mesh(), chunk=1)
    # Sums over devices and over padding are added in another order; a softmax divides similarities by the temperature.
    atol = 2e-4 if EVERY[name].aggregation == "soft" else 4 * 11 * EPS if name in OF_BATCHES else 1e-6
    for way, answer in others.items():
        np.testing.assert_allclose(padded[:-1, :-1, :-1], answer.joint, rtol=0, atol=atol, err_msg=way)


@given(st.integers(0, 50), st.integers(2, 8), st.sampled_from(["hgpo", "graphgpo", "g2po", "gagpo"]))
def test_equal_scores_give_exactly_zero(late, members, preset):
    """Attempts that are all alike and all win, also where one pass of float32 finds a mean that none of them has."""
    length = 3
    steps = [
        {"group": 0, "trajectory": m, "step": t, "reward": 10.0 * (t == length - 1), "success": True, "valid": True,
         "text": f"place {t}", "next_text": f"place {t + 1}", "entropy": 0.0}
        for m in range(members) for t in range(length)
    ]  # fmt: skip
    # The gain of G2PO is the same on all steps only without a discount.
    estimator = PRESETS[preset](discount=1.0 - late / 100 * (preset != "g2po"))
    answer = estimate(as_arrays(steps), estimator, shape=(1, 8, 3))
    assert not answer["advantage"].any()


def test_points_of_one_family():
    """With lambda 1 residuals add up to the return less the value: GiGPO's step advantage, or ProxMO's."""
    arrays = as_arrays(random_steps(3, dense=True))
    raw = {"lam": 1.0, "standardize": False, "epsilon": 1e-6}
    score = {"discount": 0.9, "invalid_penalty": 0.0}
    pairs = [
        (gagpo(**raw, discount=0.9), gigpo(**score)),
        (gagpo(**raw, discount=0.9, aggregation="soft"), proxmo(**score)),
        (hgpo(history_length=0), gigpo(step_std=True, biased_std=True)),
        (hgpo(history_length=0, aggregation="soft", step_std=False), proxmo()),
    ]
    for one, other in pairs:
        a, b = (steps_advantages(arrays, each)["step_advantage"] for each in (one, other))
        assert np.abs(a).max() > 0.1
        np.testing.assert_allclose(a, b, atol=5e-5)


@pytest.mark.parametrize("method", ["hgpo", "g2po", "gagpo", "graphgpo"])
@pytest.mark.parametrize("std", [False, True])
def test_soft_ones_approach_the_exact_ones_as_the_temperature_falls(method, std):
    arrays = as_arrays(random_steps(11, dense=True))
    arrays["texts"] = [text.replace("place", "abcdefg "[int(text[-2])] * 3) for text in arrays["texts"]]
    # The weighted standard deviation is the biased one.
    how = {"biased_std": True, "step_std": std}
    exact, soft = (
        steps_advantages(arrays, PRESETS[method](**how, **more))["step_advantage"]
        for more in ({}, {"aggregation": "soft", "temperature": 1e-3})
    )
    np.testing.assert_allclose(soft, exact, rtol=2e-3, atol=2e-3)
    warm = steps_advantages(arrays, PRESETS[method](**how, aggregation="soft", temperature=0.5))["step_advantage"]
    assert np.abs(warm - exact).max() > 0.01


def test_similar_texts_are_one_node():
    texts = ["You are at desk 1, it is day.", "You are at desk 1, it is night.", "You are in the garden."]
    assert similar_anchors(texts, [0, 0, 0], 0.8).tolist() == [0, 0, 1]
    arrays = {
        "group": [0] * 4, "trajectory": [0, 0, 1, 1], "step": [0, 1, 0, 1], "reward": [0, 0, 0, 10.0],
        "success": [False, False, True, True], "action_valid": [True] * 4,
        "texts": [texts[2], texts[0], texts[2], texts[1]], "next_texts": [texts[0], texts[2], texts[1], texts[1]],
    }  # fmt: skip
    equal, similar = (
        steps_advantages(arrays, graphgpo(path="official"), similarity_threshold=threshold, parts=True)
        for threshold in (None, 0.8)
    )
    assert equal["distance"].tolist() == [2, 3, 2, 1]
    assert similar["distance"].tolist() == [2, 1, 2, 1]


@pytest.mark.parametrize(
    ("change", "estimator", "message"),
    [
        ({"next_texts": None}, graphgpo(), "next_texts is missing; score 'distance'"),
        ({"entropy": None}, PRESETS["empg"](), "entropy is missing"),
        ({"entropy": [[0.1, 0.2]] * 4}, PRESETS["empg"](), "response_mask is missing"),
        ({"entropy": [0.1, np.nan, 0.1, 0.2]}, PRESETS["empg"](), "entropy: row 1 has nan"),
        ({"next_texts": ["a", "b"]}, graphgpo(), "next_texts: got 2 rows, need 4"),
        ({"next_texts": ["a", None, "b", "c"]}, graphgpo(), "next_texts: row 1 has None, need a string"),
    ],
)
def test_missing_and_broken_arrays(change, estimator, message):
    arrays = as_arrays(random_steps(0, dense=False)[:4])
    arrays |= {"group": [0] * 4, "trajectory": [0, 1, 2, 3], "success": [True] * 4, **change}
    arrays = {name: values for name, values in arrays.items() if values is not None}
    with pytest.raises(UserError, match=message):
        steps_advantages(arrays, estimator)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"history_length": -1}, "history_length must be at least 0"),
        ({"aggregation": "none", "score": "td"}, "score 'td' compares observations"),
        ({"aggregation": "none", "history_length": 2}, "history_length 2 compares observations"),
        ({"values_over": "batch"}, "values_over 'batch' needs score 'td'"),
        ({"score": "gossip"}, "score must be one of return, td"),
        ({"entropy": True, "base_group": True}, "entropy scales the episode part"),
    ],
)
def test_settings_that_do_not_go_together(knobs, message):
    with pytest.raises(UserError, match=message):
        Settings(**knobs)


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ({"gamma": 0.9}, [], "method must be one of hgpo"),
        ({"method": "hgpo", "gama": 0.9}, [], "hgpo has no gama; need"),
        ({"method": "hgpo", "gamma": "0.9"}, [], "gamma must be a number; got '0.9'"),
        ({"method": "hgpo", "history_length": 1.5}, [], "history_length must be a whole number"),
        ({"method": "hgpo", "history_length": -2}, [], "history_length must be at least 0"),
        ({"method": "gagpo", "standardize": 1}, [], "standardize must be true or false"),
        ({"method": "g2po", "mode": "max_norm"}, [], "mode must be one of mean_std_norm"),
        ({"method": "gagpo", "zero_std": 0.1}, [], "zero_std is fixed"),
        ({"method": "hgpo"}, ["--preset", "g2po"], "it is of hgpo, the preset is g2po"),
        ({"one": {}, "two": {}}, [], "holds 2 cases and none called 'steps'"),
        ([1], [], "is list, need an object"),
    ],
)
def test_cases_that_cannot_be(case, options, message, tmp_path, capsys):
    (tmp_path / "case.json").write_text(json.dumps(case))
    source = tmp_path / "steps.npz"
    assert (
        main(["advantages", str(source), str(tmp_path / "o.npz"), "--case", str(tmp_path / "case.json"), *options]) == 2
    )
    assert message in " ".join(capsys.readouterr().err.split())


def test_statistics_of_a_batch_are_not_those_of_a_group():
    group, _ = Group.from_steps(**as_arrays(random_steps(1, dense=False)), count_words=False)
    for estimator in (PRESETS["empg"](), gagpo(values_over="batch")):
        with pytest.raises(ValueError, match="use batch_advantages"):
            jax.vmap(advantages, (0, None))(group, estimator)


def test_parts_as_lines(tmp_path):
    """A level that a step does not have is null."""
    source, target = GOLDEN / "hgpo_uniform.npz", tmp_path / "out.jsonl"
    case = str(GOLDEN / "cases.json")
    assert main(["advantages", str(source), str(target), "--case", case, "--parts"]) == 0
    rows = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    levels = np.array([row["level_advantage"] for row in rows], np.float64)
    np.testing.assert_allclose(levels, np.load(source)["level_advantage"], atol=1e-5)
