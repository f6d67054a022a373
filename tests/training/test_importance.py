"""Truncated importance sampling against loops in float64 with hand-derived gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from close import EPS, same_gradient
from fresh import fresh
from test_update import BACKWARDS, CONFIG, TERMS, played, rows_of

from proxmo_jax.training.importance import importance_weights, weighted
from proxmo_jax.training.losses import AGGREGATIONS, LossSettings
from proxmo_jax.training.update import TrainState, policy_step, row_logits

CLIP, DUAL = 0.2, 3.0


def slow_surrogate(advantage, ratio):
    """(PPO's clipped loss with dual clip, its derivative by the ratio) of one token."""
    clipped = min(max(ratio, 1 - CLIP), 1 + CLIP)
    loss, slope = -advantage * ratio, -advantage
    if -advantage * clipped > loss:
        loss, slope = -advantage * clipped, 0.0
    if advantage < 0 and loss > -advantage * DUAL:
        loss, slope = -advantage * DUAL, 0.0
    return loss, slope


def slow_loss(logits, rows, sampler, cap, aggregation, longest):
    """The surrogate's loss and its gradient by the logits, token after token."""
    tokens, mask = np.asarray(rows.targets), np.asarray(rows.mask)
    turn = np.asarray(rows.turn_tokens)
    turns = sum(1 / turn[at] for at in zip(*np.nonzero(mask), strict=True))
    total, gradient = 0.0, np.zeros(logits.shape)
    for at in zip(*np.nonzero(mask), strict=True):
        z = np.asarray(logits[at], np.float64)
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        trainer, sampled = (float(np.asarray(x)[at]) for x in (rows.old_log_probs, sampler))
        weight = min(np.exp(trainer - sampled), cap) if cap else 1.0
        ratio = p[tokens[at]] / np.exp(trainer)
        loss, slope = slow_surrogate(float(np.asarray(rows.advantage)[at]), ratio)
        share = {
            "token_mean": 1 / mask.sum(),
            "turn_mean_token_sum": 1 / turns,
            "turn_mean_token_mean": 1 / (turns * turn[at]),
            "turn_sum_over_length": 1 / longest,
        }[aggregation]
        total += share * weight * loss
        onehot = np.arange(len(p)) == tokens[at]
        gradient[at] = share * weight * slope * ratio * (onehot - p)
    return total, gradient


def mismatched_rows(seed: int, count: int):
    """`count` rows whose old log-probs are the trainer's, some of them padding, and a sampler that computes
    otherwise: weights from 0.1 to 10, clipped ratios in both directions."""
    rng = np.random.default_rng(seed)
    rows, _ = rows_of(*played(key=seed + 1), row_length=12)
    rows = jax.tree.map(lambda x: jnp.concatenate([x] * (-(-count // len(x))))[:count], rows)
    shape = rows.mask.shape
    keep = jnp.asarray(rng.random(count) < 0.8)[:, None]
    mask = rows.mask & keep
    logits = row_logits(fresh(CONFIG), rows, CONFIG)
    current = jnp.take_along_axis(jax.nn.log_softmax(logits), rows.targets[..., None], -1)[..., 0]
    old = current + jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32)
    sampler = old - jnp.asarray(rng.normal(0, 1.0, shape), jnp.float32)
    advantage = jnp.where(mask, jnp.asarray(rng.normal(0, 1.0, shape), jnp.float32), 0.0)
    rows = dataclasses.replace(rows, mask=mask, old_log_probs=old, reference=old, advantage=advantage)
    return rows, sampler


@pytest.mark.parametrize(("aggregation", "micro_batches"), zip(AGGREGATIONS, [1, 2, 4, 2], strict=True))
def test_loss_and_gradient_are_those_of_plain_loops(aggregation, micro_batches):
    rows, sampler = mismatched_rows(micro_batches, 8)
    cap, optimizer, params = 2.0, optax.sgd(1.0), fresh(CONFIG)
    corrected, _ = weighted(rows, sampler, cap)
    state, parts = policy_step(
        TrainState(params, optimizer.init(params)), corrected, jnp.float32(1.0), config=CONFIG, optimizer=optimizer,
        settings=LossSettings(kl_coef=0.0, entropy_coef=0.0, aggregation=aggregation, longest_response=4),
        micro_batches=micro_batches,
    )  # fmt: skip
    logits, pull_back = jax.vjp(lambda params: row_logits(params, rows, CONFIG), fresh(CONFIG))
    loss, by_logits = slow_loss(logits, rows, sampler, cap, aggregation, 4)
    plain, _ = slow_loss(logits, rows, sampler, 0.0, aggregation, 4)
    assert abs(loss - plain) > 0.02 * abs(plain)  # the weights matter
    np.testing.assert_allclose(float(parts.loss), loss, rtol=0, atol=TERMS * EPS * 20)
    (gradient,) = pull_back(jnp.asarray(by_logits, jnp.float32))
    same_gradient(jax.tree.map(jnp.subtract, fresh(CONFIG), state.params), gradient, BACKWARDS)


def test_means_count_the_tokens_under_the_mask():
    rows, sampler = mismatched_rows(3, 8)
    mask = np.asarray(rows.mask)
    ratio = np.exp(np.asarray(rows.old_log_probs, np.float64) - np.asarray(sampler, np.float64))[mask]
    _, means = weighted(rows, sampler, 1.5)
    np.testing.assert_allclose(float(means["importance_weight"]), np.minimum(ratio, 1.5).mean(), rtol=1e-5)
    assert float(means["importance_truncated"]) == pytest.approx((ratio > 1.5).mean())
    assert 0 < (ratio > 1.5).mean() < 1


def test_weights_are_one_where_sampler_and_trainer_agree_and_finite_where_nothing_is():
    same = jnp.array([-1.0, -30.0])
    np.testing.assert_array_equal(importance_weights(same, same, 2.0), [1.0, 1.0])
    rows, sampler = mismatched_rows(0, 8)
    dirty = jnp.where(rows.mask, sampler, jnp.nan)
    corrected, means = weighted(rows, dirty, 2.0)
    clean, expected = weighted(rows, sampler, 2.0)
    np.testing.assert_array_equal(corrected.advantage, clean.advantage)
    assert jax.device_get(means) == jax.device_get(expected)
