"""Turns with the smallest gradients can be left out of an update, equal ones trained once: which ones those are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from close import roundings, same_gradient
from hypothesis import given
from hypothesis import strategies as st
from nested import config_with
from test_dynamic_sampling import NO_TERMS, make

from proxmo_jax.agent.batches import batches, fingerprints, gradient_sizes, smallest, summed, trained_turns
from proxmo_jax.agent.rollout import Rollout
from proxmo_jax.agent.settings import OptimizerSettings
from proxmo_jax.errors import UserError
from proxmo_jax.policy.decoder import PolicyConfig, init_params
from proxmo_jax.policy.sharding import make_mesh
from proxmo_jax.training.buffers import Buffer
from proxmo_jax.training.losses import LossSettings
from proxmo_jax.training.update import TrainState, policy_step


@given(
    st.lists(st.one_of(st.just(0.0), st.floats(0, 100, width=32)), min_size=1, max_size=30),
    st.floats(0, 0.99),
)
def test_the_smallest_are_what_a_plain_loop_finds(sizes, share):
    room, taken = share * sum(sorted(sizes)), 0.0
    expected = set()
    for at in sorted(range(len(sizes)), key=lambda at: (sizes[at], at)):
        taken += sizes[at]
        if taken > room:
            break
        expected.add(at)
    found = smallest(np.array(sizes, np.float32).reshape(1, -1), share)
    assert set(np.flatnonzero(found).tolist()) == expected


def test_numbers_that_are_not_finite_leave_nothing_out():
    """So that the check of the losses sees them."""
    assert not smallest(np.array([1.0, np.nan, 2.0]), 0.5).any()


def test_sizes_are_those_of_the_gradient_with_respect_to_the_logits():
    rng = np.random.default_rng(0)
    episodes, turns, room, vocabulary = 3, 2, 4, 7
    logits = jnp.asarray(rng.normal(size=(episodes, turns, room, vocabulary)) * 4, jnp.float32)
    tokens = rng.integers(0, vocabulary, (episodes, turns, room))
    lengths = rng.integers(0, room + 1, (episodes, turns))
    inside = np.arange(room) < lengths[..., None]
    advantage = jnp.asarray(rng.normal(size=(episodes, turns)), jnp.float32)

    def log_probs(logits):
        return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]

    gradient = jax.grad(lambda x: (advantage[..., None] * jnp.where(inside, log_probs(x), 0)).sum())(logits)
    behind = np.nan  # is not read
    buffer = Buffer.empty(1, episodes, turns, prompt=1, response=room, words=1)
    buffer = dataclasses.replace(buffer, log_probs=jnp.where(inside, log_probs(logits), behind))
    found = gradient_sizes(buffer, jnp.asarray(lengths), advantage)
    np.testing.assert_allclose(found, np.abs(gradient).sum((2, 3)) / 2, rtol=1e-5, atol=1e-6)


def test_an_update_without_the_turns_that_hardly_matter(tmp_path):
    loop, state = make(tmp_path, 0, **NO_TERMS, optimizer__skip_gradient_share=0.3)
    _, row = loop.iteration(state, 1, jax.random.key(1))
    played, advantage = loop.played, loop.estimate(loop.played)
    sizes = np.asarray(gradient_sizes(played.buffer, played.response_lengths, advantage))
    trained = trained_turns(loop.config, played, advantage)
    took_place = played.prompt_lengths > 0
    assert not (trained & ~took_place).any()
    left = sizes[took_place & ~trained]
    assert 0 < left.sum() <= 0.3 * sizes.sum()
    assert left.max() <= sizes[trained].min()
    assert row["train/trained_turns"] == pytest.approx(trained.sum() / took_place.sum())
    assert row["perf/total_num_tokens"] == (played.prompt_lengths + played.response_lengths)[trained].sum()


def repeated():
    """A rollout of few different turns, three prompts and four responses, in another order in each episode."""
    rng = np.random.default_rng(0)
    episodes, turns, width, room = 4, 6, 8, 3
    prompt_lengths, response_lengths = np.array([4, 8, 7]), np.array([1, 2, 2, 3])
    prompts = np.where(np.arange(8) >= 8 - prompt_lengths[:, None], rng.integers(4, 20, (3, 8)), 0)
    responses = np.where(np.arange(3) < response_lengths[:, None], rng.integers(4, 20, (4, 3)), 0)
    responses[2, 0] = responses[1, 0]
    which = rng.integers(0, 3, (episodes, turns)), rng.integers(0, 4, (episodes, turns))
    lengths = prompt_lengths[which[0]], response_lengths[which[1]]
    for x in lengths:
        x[1, 4:] = 0
    log_probs = -np.abs(np.random.default_rng(1).normal(size=(3, 4, room)))[which]
    buffer = dataclasses.replace(
        Buffer.empty(2, 2, turns, prompt=width, response=room, words=1),
        prompts=jnp.asarray(prompts[which[0]] + 7 * (np.arange(width) < width - lengths[0][..., None]), jnp.int32),
        responses=jnp.asarray(responses[which[1]] + 9 * (np.arange(room) >= lengths[1][..., None]), jnp.int32),
        log_probs=jnp.asarray(log_probs, jnp.float32),
    )
    nothing = np.zeros(episodes, bool)
    played = Rollout(
        buffer, *(x.astype(np.int32) for x in lengths), nothing, nothing.astype(np.float32), [], [], texts=1
    )  # fmt: skip
    return played, np.where(lengths[0] > 0, 4 * which[0] + which[1], -1)


def test_equal_turns_are_found_by_their_tokens_alone():
    """What is past a response or before a prompt does not count."""
    played, which = repeated()
    marks = np.asarray(
        fingerprints(played.buffer.prompts, played.buffer.responses, played.prompt_lengths, played.response_lengths)
    )
    numbers = {}
    for turn, mark in zip(which.reshape(-1), marks.reshape(-1, 2).tolist(), strict=True):
        numbers.setdefault(int(turn), set()).add(tuple(mark))
    assert len(numbers) > 8
    assert all(len(found) == 1 for found in numbers.values())
    assert len(set.union(*numbers.values())) == len(numbers)

    advantage = np.random.default_rng(2).normal(size=which.shape).astype(np.float32)
    found = summed(played, jnp.asarray(advantage))
    for turn in set(which.reshape(-1).tolist()) - {-1}:
        assert (found[which == turn] != 0).sum() == 1
        np.testing.assert_allclose(found[which == turn].sum(), advantage[which == turn].sum(), rtol=1e-5, atol=1e-6)
    assert (found[which == -1] == 0).all()


def test_the_sum_has_the_gradient_of_the_turns():
    """Also for a policy that has moved since the rollout, as this one; nothing is clipped."""
    played, which = repeated()
    advantage = np.random.default_rng(2).normal(size=which.shape).astype(np.float32)
    config = config_with(optimizer__row_length=24, optimizer__rows_per_batch=16, optimizer__response_share=0.5,
                         rollout__max_response_length=3, rollout__max_prompt_length=8)  # fmt: skip
    shape = PolicyConfig(32, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    settings = LossSettings(1e6, 1e6, 1e6, kl_coef=0, entropy_coef=0, aggregation="turn_sum_over_length")
    mesh, optimizer = make_mesh(devices=jax.devices()[:1]), optax.sgd(1.0)

    def gradient(advantage):
        trained = (which >= 0) & (advantage != 0)
        (rows,) = batches(config, mesh, played, trained, jnp.asarray(advantage), np.random.default_rng(0))
        params = init_params(shape, jax.random.key(0))
        state, _ = policy_step(
            TrainState(params, optimizer.init(params)), rows, jnp.float32(1.0), config=shape, optimizer=optimizer,
            settings=settings,
        )  # fmt: skip
        return trained.sum(), jax.tree.map(jnp.subtract, init_params(shape, jax.random.key(0)), state.params)

    (many, each), (few, together) = gradient(advantage), gradient(summed(played, jnp.asarray(advantage)))
    assert few < 0.7 * many
    assert float(jnp.abs(each["embedding"]).max()) > 1e-3
    same_gradient(together, each, 3 * roundings(shape, 24) + 200)


def test_summing_needs_that_the_others_are_left_out():
    with pytest.raises(UserError, match=r"--optimizer.sum-equal-turns needs --optimizer.skip-zero-advantages or"):
        OptimizerSettings(sum_equal_turns=True)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_leaves_nothing_is_refused(share):
    with pytest.raises(UserError, match=r"--optimizer.skip-gradient-share must be from 0 to below 1, got"):
        OptimizerSettings(skip_gradient_share=share)
