"""Step baselines within one group: exact matching (GiGPO) and proximity (ProxMO).

A soft baseline is a softmax-weighted mean, accumulated over keys as an online softmax: a peak (the largest logit), a
weight total and a weighted score total, both relative to the peak. `dense` holds the whole similarity matrix,
`blockwise` one block of it, and `pallas_kernel` works block by block on a TPU. Keys may be distinct observations with
a number of steps each. This is exact, since equal observations have equal weights, and much cheaper.
"""

import jax
import jax.numpy as jnp
import numpy as np

from proxmo_jax.estimator.partial_sums import Partial, blockwise, dense, similarity
from proxmo_jax.estimator.types import Array, masked_mean, positive

NOISE = 8 * float(np.finfo(np.float32).eps)  # scores that are as near to their mean, beside their size, are equal to it


def _aggregate(kernel: str, *keys, skip_own: bool) -> Partial:
    """Softmax sums by the kernel of this name."""
    if kernel == "pallas":  # imported only where it is used
        from proxmo_jax.estimator.pallas_kernel import pallas

        return pallas(*keys, skip_own=skip_own)
    return (dense if kernel == "dense" else blockwise)(*keys, skip_own=skip_own)


def soft_mean(
    values: Array,
    embedding: Array,
    mask: Array,
    *,
    temperature: jax.Array | float,
    exclude_self: bool = False,
    row: Array | None = None,
    kernel: str = "dense",
) -> tuple[jax.Array, jax.Array]:
    """Proximity-weighted mean of the steps' values around each step (ProxMO, arXiv 2602.19225).

    b_i = sum_j w_ij z_j, w_ij = softmax_j(c_ij / tau), where c_ij is the cosine similarity.

    Args:
        values: float [N], z.
        embedding: float [N, D], a unit vector (or zeros) for each step; or [U, D], one for each distinct observation.
        mask: bool [N].
        temperature: tau, above 0.
        exclude_self: leave the step itself out of its mean.
        row: int [N], the observation of each step if `embedding` is [U, D].
        kernel: "dense", "blockwise" or "pallas".

    Returns:
        The means float32 [N], and whether there is one, bool [N]: not on padding, and not for a lone step under
        `exclude_self`.
    """
    # Centring first reduces rounding errors and changes nothing else, since the weights sum to 1.
    centre = masked_mean(values, mask)
    values = jnp.where(mask, values - centre, 0.0).astype(jnp.float32)
    steps = mask.astype(jnp.float32)
    embedding = embedding.astype(jnp.float32)
    if row is None:
        count, total, own = steps, values, jnp.arange(len(values))
    else:
        zero = jnp.zeros_like(embedding[:, 0])
        row = jnp.where(mask, row, embedding.shape[0])
        count, total = zero.at[row].add(steps, mode="drop"), zero.at[row].add(values, mode="drop")
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
            jnp.where(shared, total[own] - values, 0.0),
        )
    found = jnp.asarray(mask) & (sums.weight > 0)
    return centre + sums.score / jnp.where(sums.weight > 0, sums.weight, 1.0), found


def soft_advantage(
    score: Array, embedding: Array, mask: Array, *, std: bool = False, epsilon: jax.Array | float = 1e-6, **how
) -> jax.Array:
    """Step advantage with a proximity-weighted baseline (ProxMO, arXiv 2602.19225): A_i = Q_i - b_i of `soft_mean`.

    Args:
        score: float [N], step scores Q.
        embedding: as in `soft_mean`.
        mask: bool [N].
        std: divide by the weighted standard deviation + epsilon, sqrt(sum_j w_ij (Q_j - b_i)^2).
        epsilon: added to the standard deviation.
        how: further arguments of `soft_mean`.

    Returns:
        float32 [N]; 0 on padding, and for a lone step under `exclude_self`.
    """
    score = jnp.where(mask, score - masked_mean(score, mask), 0.0).astype(jnp.float32)
    baseline, found = soft_mean(score, embedding, mask, **how)
    advantage = jnp.where(found, score - baseline, 0.0)
    if std:
        peak = jnp.abs(score).max()
        unit = score / positive(peak)
        square, _ = soft_mean(jnp.square(unit), embedding, mask, **how)
        variance = jnp.maximum(square - jnp.square(baseline / positive(peak)), 0.0)
        # Where the scores around are equal, both are rounding errors.
        advantage = jnp.where(jnp.abs(advantage) > NOISE * peak, advantage, 0.0)
        advantage = advantage / positive(peak * jnp.sqrt(variance) + epsilon)
    return advantage


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


def places(anchor: Array) -> jax.Array:
    """Any ids [N] as numbers in [0, N), equal for equal ids."""
    return jnp.searchsorted(jnp.sort(anchor), anchor)


def hard_mean(values: Array, place: Array, mask: Array) -> tuple[jax.Array, jax.Array]:
    """Mean of the values of the steps at the same place, in two passes, as in `masked_mean`.

    Args:
        values: float [N].
        place: int [N], in [0, N).
        mask: bool [N].

    Returns:
        The means and the numbers of steps, float32 [N].
    """
    values = jnp.where(mask, values, 0.0).astype(jnp.float32)
    both = jnp.stack([mask.astype(jnp.float32), values], 1)
    count, total = jnp.zeros_like(both).at[place].add(both)[place].T
    count = jnp.maximum(count, 1.0)
    mean = total / count
    rest = jnp.where(mask, values - mean, 0.0)  # the second pass removes the rounding error
    return mean + jnp.zeros_like(values).at[place].add(rest)[place] / count, count


def hard_advantage(
    score: Array,
    anchor: Array,
    mask: Array,
    *,
    std: bool = False,
    biased: bool = False,
    epsilon: jax.Array | float = 1e-6,
) -> jax.Array:
    """Step advantage with an exact-match baseline (GiGPO, arXiv 2505.10978).

    A_i = Q_i - mean of Q over the steps with the same anchor. Time and memory are linear in N up to a sort.

    Args:
        score: float [N], step scores Q.
        anchor: int [N], any ids.
        mask: bool [N].
        std: divide by the standard deviation of the matching steps + epsilon.
        biased: of the standard deviation, which divides by n instead of n - 1.
        epsilon: added to the standard deviation.

    Returns:
        float32 [N]; 0 on padding, for a step that is alone with its anchor, and where scores are equal to their mean
        up to rounding.
    """
    place = places(anchor)
    score = jnp.where(mask, score, 0.0).astype(jnp.float32)
    mean, count = hard_mean(score, place, mask)
    peak = jnp.zeros_like(score).at[place].max(jnp.abs(score))[place]
    advantage = jnp.where(mask & (count > 1), score - mean, 0.0)
    advantage = jnp.where(jnp.abs(advantage) > NOISE * peak, advantage, 0.0)
    if std:  # scaled as in `masked_std`
        square = jnp.zeros_like(score).at[place].add(jnp.square(advantage / positive(peak)))[place]
        deviation = peak * jnp.sqrt(square / jnp.maximum(count - (0.0 if biased else 1.0), 1.0))
        advantage = advantage / positive(deviation + epsilon)
    return advantage
