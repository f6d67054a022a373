"""Turns with the smallest gradients can be left out of an update: which ones those are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_dynamic_sampling import NO_TERMS, make

from proxmo_jax.agent.batches import gradient_sizes, smallest, trained_turns
from proxmo_jax.agent.settings import OptimizerSettings
from proxmo_jax.errors import UserError
from proxmo_jax.training.buffers import Buffer


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


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_leaves_nothing_is_refused(share):
    with pytest.raises(UserError, match=r"--optimizer.skip-gradient-share must be from 0 to below 1, got"):
        OptimizerSettings(skip_gradient_share=share)
