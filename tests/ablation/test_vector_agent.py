"""Every estimator trains agents as arrays, and gives a rollout's steps what it gives them as a file of texts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import proxmo_jax as pj
from proxmo_jax.ablation import runner
from proxmo_jax.ablation import vector_household as vh
from proxmo_jax.ablation.vector_agent import (
    Knobs,
    Scores,
    Spec,
    bag_of,
    estimate,
    fresh,
    make_run,
    merged,
    play,
    standardised,
)
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.presets import PRESETS, g2po, gagpo, gigpo, graphgpo, grpo, hgpo, proxmo

SETTINGS = {
    "grpo": grpo(), "gigpo": gigpo(), "proxmo": proxmo(), "hgpo": hgpo(), "graphgpo": graphgpo(), "g2po": g2po(),
    "gagpo": gagpo(), "soft hgpo": hgpo(aggregation="soft"), "soft graphgpo": graphgpo(aggregation="soft"),
    "soft g2po": g2po(aggregation="soft"), "soft gagpo": gagpo(aggregation="soft"),
    "graphgpo, official path": graphgpo(path="official"), "hgpo, official weights": hgpo(history_weights="official"),
    "modulated g2po": g2po(modulation_range=0.3), "gagpo with an episode part": gagpo(episode_over="steps"),
}  # fmt: skip

PLAYED = (0, 1, 13, 24)  # an untrained policy wins some of these


@pytest.fixture(scope="module")
def houses():
    return runner.make_houses("easy", 30)


@pytest.fixture(scope="module")
def played(houses):
    """A rollout [4, 12, 24] of an untrained policy with paraphrases, in which some episodes are won."""
    train, _, texts = houses
    spec = Spec(groups=4, members=12, turns=24, hidden=8, paraphrases=True, states=True)
    net = Scores(len(texts.pieces), spec.hidden)
    params = fresh(net, vh.pick(train, 0), jax.random.key(0))
    at = vh.pick(train, jnp.repeat(jnp.array(PLAYED), 12))
    episode = partial(play, params, net, spec=spec, paraphrases=jnp.asarray(texts.paraphrases), chance=0.3)
    rows = jax.jit(jax.vmap(lambda house, key: episode(house, key=key)))(at, jax.random.split(jax.random.key(1), 48))
    rollout = jax.tree.map(lambda x: x.reshape(4, 12, *x.shape[1:]), rows)
    assert rollout.won[..., :-1].any()
    return rollout


@pytest.fixture(scope="module")
def cut(played):
    """The same cut off after some turns, at which half of the episodes are said to be won."""
    rng = np.random.default_rng(0)
    turns = np.minimum(np.asarray(played.mask).sum(-1), rng.integers(1, 25, (4, 12)))
    at = np.arange(24)
    won = (at == turns[..., None] - 1) & (rng.random((4, 12, 1)) < 0.5)
    text, last = np.asarray(played.seen.text), np.asarray(played.ending)
    following = np.concatenate([text, last[:, :, None]], 2)
    ending = np.take_along_axis(following, turns[..., None, None], 2)[:, :, 0]
    states = np.concatenate([played.state, played.last_state[:, :, None]], 2)
    last_state = np.take_along_axis(states, turns[..., None], 2)[:, :, 0]
    changed = {"mask": at < turns[..., None], "won": won, "ending": ending, "last_state": last_state}
    return played._replace(**{name: jnp.asarray(x) for name, x in changed.items()})


def steps_of(rollout, texts: vh.Texts) -> dict[str, list]:
    """The steps of a rollout as strings and numbers, in the order of the groups, members and turns; texts with the
    numbers of their states, if it has them."""
    names = ("group", "trajectory", "step", "reward", "success", "action_valid", "texts", "next_texts")
    steps: dict[str, list] = {name: [] for name in names}
    rollout = jax.device_get(rollout)
    for g, m in np.ndindex(rollout.mask.shape[:2]):
        turns = int(rollout.mask[g, m].sum())
        said = [vh.say(texts, row) for row in [*rollout.seen.text[g, m, :turns], rollout.ending[g, m]]]
        if rollout.state is not None:
            numbers = [*rollout.state[g, m, :turns].tolist(), int(rollout.last_state[g, m])]
            said = [f"{text} {number}" for text, number in zip(said, numbers, strict=True)]
        won = bool(rollout.won[g, m].any())
        for t in range(turns):
            row = (g, 12 * g + m, t, 10.0 * (won and t == turns - 1), won, True, said[t], said[t + 1])
            for name, value in zip(names, row, strict=True):
                steps[name].append(value)
    return steps


@pytest.mark.parametrize("name", SETTINGS)
def test_advantages_are_those_of_the_texts(name, cut, houses):
    """Hashes, bags of pieces and merged words stand for the strings: the estimator gives both the same."""
    texts, settings = houses[2], SETTINGS[name]
    cut = cut._replace(state=None, last_state=None)
    found = estimate(cut, settings, jnp.asarray(merged(texts.words)), 10.0)
    batch, packing = pj.Group.from_steps(**steps_of(cut, texts))
    expected = packing.unpack(pj.batch_advantages(batch, settings).joint)
    mask = np.asarray(cut.mask)
    np.testing.assert_allclose(np.asarray(found)[mask], expected, atol=2e-4, rtol=2e-4)
    assert (np.asarray(found)[~mask] == 0).all()
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("settings", [gigpo(), graphgpo()], ids=["gigpo", "graphgpo"])
def test_with_states_a_text_of_two_states_is_two_observations(settings, cut, houses):
    words = jnp.asarray(merged(houses[2].words))
    found, of_texts = (
        np.asarray(estimate(rollout, settings, words, 10.0))[np.asarray(cut.mask)]
        for rollout in (cut, cut._replace(state=None, last_state=None))
    )
    batch, packing = pj.Group.from_steps(**steps_of(cut, houses[2]))
    expected = packing.unpack(pj.batch_advantages(batch, settings).joint)
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=2e-4)
    assert np.abs(found - of_texts).max() > 0.1


def test_states_have_the_same_number_if_they_are_the_same(played, houses):
    train, step = houses[0], jax.jit(vh.step)
    for g in range(2):
        house, found = vh.pick(train, PLAYED[g]), {}
        for m in range(12):
            state, turns = vh.reset(house), int(played.mask[g, m].sum())
            numbers = [*played.state[g, m, :turns].tolist(), int(played.last_state[g, m])]
            for t, number in enumerate(numbers):
                key = b"".join(np.asarray(x).tobytes() for x in state)
                assert found.setdefault(key, number) == number
                if t < turns:
                    state, _, _ = step(house, state, played.command[g, m, t])
        assert len(set(found.values())) == len(found) > 10


def test_bags_count_pieces_and_no_padding():
    text = np.random.default_rng(0).integers(0, 7, (3, 2, 11))
    found = jax.jit(lambda x: bag_of(x, 9))(jnp.asarray(text))
    for at in np.ndindex(3, 2):
        expected = np.bincount(text[at], minlength=9)
        expected[0] = 0
        np.testing.assert_array_equal(found[at], expected)


def test_the_policy_sees_its_text_and_its_earlier_commands(played, houses):
    commands = played.seen.used.shape[-1]
    expected = bag_of(played.seen.text, len(houses[2].pieces))
    np.testing.assert_array_equal(played.seen.bag, expected)
    for g, m in np.ndindex(played.mask.shape[:2]):
        given, last = np.zeros(commands), np.zeros(commands)
        for t in range(int(played.mask[g, m].sum())):
            np.testing.assert_allclose(played.seen.used[g, m, t], np.log1p(given), rtol=1e-6)
            np.testing.assert_array_equal(played.seen.last[g, m, t], last)
            number = int(played.command[g, m, t])
            given[number] += 1
            last = (np.arange(commands) == number).astype(float)


def test_an_ending_is_the_text_after_the_last_command(played, houses):
    """A win ends with the text of the winning command, and no later command changes it."""
    train, _, texts = houses
    step = jax.jit(vh.step)
    first = {said: row[0] for row in texts.paraphrases.tolist() if len(set(row)) > 1 for said in row}
    for g, m in np.ndindex(played.mask.shape[:2]):
        house = vh.pick(train, PLAYED[g])
        state = vh.reset(house)
        for t in range(int(played.mask[g, m].sum())):
            state, text, _ = step(house, state, played.command[g, m, t])
        ending = [first.get(piece, piece) for piece in np.asarray(played.ending[g, m]).tolist()]
        assert vh.say(texts, np.array(ending)) == vh.say(texts, text)


def test_distances_need_the_ending(played, houses):
    words = jnp.asarray(merged(houses[2].words))
    with pytest.raises(UserError, match="score 'distance'"):
        estimate(played._replace(ending=None), graphgpo(), words, 10.0)


@pytest.mark.slow
def test_every_method_trains(houses):
    """In one program, as a study has them: two iterations, finite numbers, and another policy for each method."""
    train, held_out, texts = houses
    spec = Spec(iterations=2, eval_every=1, hidden=8)
    names = list(SETTINGS)[:11]
    kinds = list(dict.fromkeys(runner.choices_of(SETTINGS[name]) for name in names))
    assert len(kinds) == len(names)
    run, ends = jax.jit(make_run(train, held_out, texts, spec, kinds)), {}
    for kind, name in enumerate(names):
        knobs = Knobs(runner.numbers_of(SETTINGS[name]), 0.03)
        curves = run(jax.tree.map(jnp.float32, knobs), jax.random.key(3), jnp.int32(kind))
        assert all(np.isfinite(x).all() for x in curves.values()), name
        ends[name] = curves["log_prob"]
    first = {float(x[0]) for x in ends.values()}
    assert len(first) == 1
    assert len({float(x[1]) for x in ends.values()}) == len(names)


def test_methods_in_standard_deviations_are_not_scaled_again():
    assert {name for name, preset in PRESETS.items() if standardised(preset())} == {
        "grpo", "hgpo", "graphgpo", "g2po", "gagpo", "empg"
    }  # fmt: skip
    assert not standardised(gagpo(standardize=False))
    assert not standardised(gigpo(step_std=True))
