"""Step baselines from comparing the observations of one group: exact matching (GiGPO) and proximity (ProxMO).

A soft baseline is a softmax-weighted mean, so it can be summed up key by key: a peak (the largest logit met), a weight
total and a weighted score total, all relative to the peak. `dense` holds the whole similarity matrix, `blockwise` one
block of it, and `pallas_kernel` is the same block by block on a TPU. Keys may be distinct observations with a number of
steps each, which is exact and much cheaper: equal observations have equal weights.
"""

import jax
import jax.numpy as jnp

from proxmo_jax.estimator.partial_sums import Partial, blockwise, dense, similarity
from proxmo_jax.estimator.types import masked_mean, positive


def _aggregate(kernel: str, *keys, skip_own: bool) -> Partial:
    if kernel == "pallas":  # needs Pallas, which the other two do without
        from proxmo_jax.estimator.pallas_kernel import pallas

        return pallas(*keys, skip_own=skip_own)
    return (dense if kernel == "dense" else blockwise)(*keys, skip_own=skip_own)


def soft_advantage(
    score: jax.Array,
    embedding: jax.Array,
    mask: jax.Array,
    *,
    temperature: jax.Array | float,
    exclude_self: bool = False,
    row: jax.Array | None = None,
    kernel: str = "dense",
) -> jax.Array:
    """A_i = Q_i - b_i, b_i = sum_j w_ij Q_j, w_ij = softmax_j(c_ij / tau) (ProxMO, proximity-based soft aggregation).

    score, mask [N]; embedding [N, D], one unit vector (or zeros) per step, or [U, D] of distinct observations with
    `row` int [N], the observation of each step. -> [N] float32; 0 on padding, and for a lone step under
    `exclude_self`. kernel: "dense", "blockwise" or "pallas".
    """
    # Centred first: the weights sum to 1, so only rounding changes, and that for the better.
    score = jnp.where(mask, score - masked_mean(score, mask), 0.0).astype(jnp.float32)
    steps = mask.astype(jnp.float32)
    embedding = embedding.astype(jnp.float32)
    if row is None:
        count, total, own = steps, score, jnp.arange(len(score))
    else:
        zero = jnp.zeros_like(embedding[:, 0])
        row = jnp.where(mask, row, embedding.shape[0])
        count, total = zero.at[row].add(steps, mode="drop"), zero.at[row].add(score, mode="drop")
        own = jnp.minimum(row, embedding.shape[0] - 1)
    sums = _aggregate(kernel, embedding, embedding, count, total, temperature, skip_own=exclude_self)
    sums = Partial(*(x[own] for x in sums))
    if exclude_self:  # the other steps of the same observation come back in
        others = count[own] - steps
        like = jnp.square(embedding).sum(1)[own] / temperature
        back = others > 0
        sums |= Partial(
            jnp.where(back, like, -jnp.inf), jnp.where(back, others, 0.0), jnp.where(back, total[own] - score, 0.0)
        )
    baseline = sums.score / jnp.where(sums.weight > 0, sums.weight, 1.0)
    return jnp.where(mask & (sums.weight > 0), score - baseline, 0.0)


def proximity_weights(
    embedding: jax.Array, mask: jax.Array, *, temperature: jax.Array | float, exclude_self: bool = False
) -> jax.Array:
    """w_ij = softmax over the steps j of the group of c_ij / tau.

    embedding [N, D], mask [N] -> weights [N, N] float32; columns of padding are 0, rows sum to 1 (0 where there
    is nothing to compare with: padding, or a lone step under `exclude_self`).
    """
    logits = similarity(embedding, embedding) / temperature
    allowed = mask[:, None] & mask[None, :]
    if exclude_self:
        allowed &= ~jnp.eye(mask.shape[0], dtype=bool)
    peak = jnp.max(jnp.where(allowed, logits, -jnp.inf), axis=1, keepdims=True)
    weight = jnp.where(allowed, jnp.exp(logits - jnp.where(jnp.isfinite(peak), peak, 0.0)), 0.0)
    total = weight.sum(axis=1, keepdims=True)
    return weight / jnp.where(total > 0, total, 1.0)


def hard_advantage(
    score: jax.Array, anchor: jax.Array, mask: jax.Array, *, std: bool = False, epsilon: jax.Array | float = 1e-6
) -> jax.Array:
    """GiGPO: A_i = Q_i - mean of Q over the steps with the same anchor id; `std` divides by their unbiased std.

    score [N], anchor int [N] (any ids), mask [N] -> [N] float32; a step alone with its anchor gets 0. Sums are by
    anchor: time and memory grow with N, not with its square.
    """
    place = jnp.searchsorted(jnp.sort(anchor), anchor)  # equal ids, equal places; below N, whatever the ids are

    def total(values):
        return jnp.zeros_like(score).at[place].add(jnp.where(mask, values, 0.0))[place]

    score = score.astype(jnp.float32)
    count = total(jnp.ones_like(score))
    mean = total(score) / jnp.maximum(count, 1.0)
    mean = mean + total(score - mean) / jnp.maximum(count, 1.0)  # the second pass removes the rounding of the first
    advantage = jnp.where(mask & (count > 1), score - mean, 0.0)
    if std:  # relative to the largest, as in `masked_std`
        peak = jnp.zeros_like(score).at[place].max(jnp.abs(advantage))[place]
        square = total(jnp.square(advantage / positive(peak)))
        deviation = peak * jnp.sqrt(square / jnp.maximum(count - 1.0, 1.0))
        advantage = advantage / positive(deviation + epsilon)
    return advantage
