"""Step baselines within one group: exact matching (GiGPO) and proximity (ProxMO).

A soft baseline is a softmax-weighted mean, accumulated over keys as an online softmax: a peak (the largest logit), a
weight total and a weighted score total, both relative to the peak. `dense` holds the whole similarity matrix,
`blockwise` one block of it, and `pallas_kernel` works block by block on a TPU. Keys may be distinct observations with
a number of steps each. This is exact, since equal observations have equal weights, and much cheaper.
"""

import jax
import jax.numpy as jnp

from proxmo_jax.estimator.partial_sums import Partial, blockwise, dense, similarity
from proxmo_jax.estimator.types import Array, masked_mean, positive


def _aggregate(kernel: str, *keys, skip_own: bool) -> Partial:
    """Softmax sums by the kernel of this name."""
    if kernel == "pallas":  # imported only where it is used
        from proxmo_jax.estimator.pallas_kernel import pallas

        return pallas(*keys, skip_own=skip_own)
    return (dense if kernel == "dense" else blockwise)(*keys, skip_own=skip_own)


def soft_advantage(
    score: Array,
    embedding: Array,
    mask: Array,
    *,
    temperature: jax.Array | float,
    exclude_self: bool = False,
    row: Array | None = None,
    kernel: str = "dense",
) -> jax.Array:
    """Step advantage with a proximity-weighted baseline (ProxMO, arXiv 2602.19225).

    A_i = Q_i - b_i, b_i = sum_j w_ij Q_j, w_ij = softmax_j(c_ij / tau), where c_ij is the cosine similarity.

    Args:
        score: float [N], step scores Q.
        embedding: float [N, D], a unit vector (or zeros) for each step; or [U, D], one for each distinct observation.
        mask: bool [N].
        temperature: tau, above 0.
        exclude_self: leave the step itself out of its baseline.
        row: int [N], the observation of each step if `embedding` is [U, D].
        kernel: "dense", "blockwise" or "pallas".

    Returns:
        float32 [N]; 0 on padding, and for a lone step under `exclude_self`.
    """
    # Centring first reduces rounding errors and changes nothing else, since the weights sum to 1.
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
    if exclude_self:  # add the other steps of the same observation again
        others = count[own] - steps
        own_logit = jnp.square(embedding).sum(1)[own] / temperature
        shared = others > 0
        sums |= Partial(
            jnp.where(shared, own_logit, -jnp.inf),
            jnp.where(shared, others, 0.0),
            jnp.where(shared, total[own] - score, 0.0),
        )
    baseline = sums.score / jnp.where(sums.weight > 0, sums.weight, 1.0)
    return jnp.where(mask & (sums.weight > 0), score - baseline, 0.0)


def proximity_weights(
    embedding: Array, mask: Array, *, temperature: jax.Array | float, exclude_self: bool = False
) -> jax.Array:
    """Weights of the soft baseline: w_ij = softmax_j(c_ij / tau) over the steps j of the group.

    Args:
        embedding: float [N, D], unit vectors or zeros.
        mask: bool [N].
        temperature: tau, above 0.
        exclude_self: leave the step itself out.

    Returns:
        float32 [N, N]. Columns of padding are 0. Rows sum to 1, or to 0 for padding and a lone step under
        `exclude_self`.
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
    score: Array, anchor: Array, mask: Array, *, std: bool = False, epsilon: jax.Array | float = 1e-6
) -> jax.Array:
    """Step advantage with an exact-match baseline (GiGPO, arXiv 2505.10978).

    A_i = Q_i - mean of Q over the steps with the same anchor. Time and memory are linear in N up to a sort.

    Args:
        score: float [N], step scores Q.
        anchor: int [N], any ids.
        mask: bool [N].
        std: divide by the unbiased standard deviation of the matching steps + epsilon.
        epsilon: added to the standard deviation.

    Returns:
        float32 [N]; 0 on padding and for a step that is alone with its anchor.
    """
    place = jnp.searchsorted(jnp.sort(anchor), anchor)  # ids -> [0, N)

    def total(values):
        return jnp.zeros_like(score).at[place].add(jnp.where(mask, values, 0.0))[place]

    score = score.astype(jnp.float32)
    count = total(jnp.ones_like(score))
    mean = total(score) / jnp.maximum(count, 1.0)
    mean = mean + total(score - mean) / jnp.maximum(count, 1.0)  # the second pass removes the rounding error
    advantage = jnp.where(mask & (count > 1), score - mean, 0.0)
    if std:  # scaled as in `masked_std`
        peak = jnp.zeros_like(score).at[place].max(jnp.abs(advantage))[place]
        square = total(jnp.square(advantage / positive(peak)))
        deviation = peak * jnp.sqrt(square / jnp.maximum(count - 1.0, 1.0))
        advantage = advantage / positive(deviation + epsilon)
    return advantage
