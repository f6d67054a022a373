"""Softmax-weighted sums of the soft baseline. Sums over different keys combine with `|`.

There are three implementations: `dense` (all pairs at once), `blockwise` (memory linear in the number of turns) and
`pallas_kernel.pallas` (TPU).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Partial(NamedTuple):
    """Softmax sums of each query [N] over some keys.

    With e_j = exp(c_j / tau - peak), for keys of n_j steps whose scores sum to q_j. Without keys the peak is -inf and
    the sums are 0.

    Attributes:
        peak: float32 [N], the largest logit.
        weight: float32 [N], sum of n_j e_j.
        score: float32 [N], sum of q_j e_j.
    """

    peak: jax.Array
    weight: jax.Array
    score: jax.Array

    def __or__(self, other: "Partial") -> "Partial":
        """The sums over the keys of both."""
        peak = jnp.maximum(self.peak, other.peak)
        mine, theirs = _decay(self.peak, peak), _decay(other.peak, peak)
        return Partial(peak, mine * self.weight + theirs * other.weight, mine * self.score + theirs * other.score)


def _decay(old: jax.Array, new: jax.Array) -> jax.Array:
    """exp(old - new), and 0 where `old` is -inf."""
    return jnp.where(old == -jnp.inf, 0.0, jnp.exp(old - jnp.where(new == -jnp.inf, 0.0, new)))


def similarity(query: jax.Array | np.ndarray, key: jax.Array | np.ndarray) -> jax.Array:
    """Cosine similarity of unit vectors; a zero row has similarity 0 to everything.

    `HIGHEST`: on TPU the default rounds the product to bfloat16, which moved step advantages by up to 0.03.

    Args:
        query: float [N, D].
        key: float [K, D].

    Returns:
        float32 [N, K].
    """
    query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    return jnp.einsum("id,jd->ij", query, key, precision=jax.lax.Precision.HIGHEST)


def _sums(logits: jax.Array, allowed: jax.Array, count: jax.Array, score: jax.Array) -> Partial:
    """Sums of one block. logits, allowed [N, K]; count, score [K]."""
    logits = jnp.where(allowed, logits, -jnp.inf)
    peak = logits.max(axis=1)
    e = jnp.where(allowed, jnp.exp(logits - jnp.where(jnp.isfinite(peak), peak, 0.0)[:, None]), 0.0)
    both = jnp.einsum("ij,jc->ic", e, jnp.stack([count, score], 1), precision=jax.lax.Precision.HIGHEST)
    return Partial(peak, both[:, 0], both[:, 1])


def dense(query, key, count, score, temperature, *, skip_own: bool) -> Partial:
    """Softmax sums over all keys at once; needs memory for `[N, K]`.

    Args:
        query: float32 [N, D].
        key: float32 [K, D].
        count: float32 [K], steps of each key; keys of count 0 (padding) take no part.
        score: float32 [K], sum of their scores.
        temperature: float32 [].
        skip_own: leave key i out of the sums of query i.

    Returns:
        Sums [N].
    """
    allowed = jnp.broadcast_to(count > 0, (query.shape[0], key.shape[0]))
    if skip_own:
        allowed &= ~jnp.eye(query.shape[0], key.shape[0], dtype=bool)
    return _sums(similarity(query, key) / temperature, allowed, count, score)


def blockwise(query, key, count, score, temperature, *, skip_own: bool, block: int = 128) -> Partial:
    """As `dense` with `[block, block]` in memory at a time (online softmax: Milakov and Gimelshein, arXiv 1805.02867).

    Args:
        query, key, count, score, temperature, skip_own: as in `dense`.
        block: rows and columns of a block.

    Returns:
        Sums [N].
    """
    queries, width = query.shape[0], query.shape[1]
    pad_queries, pad_keys = -queries % block, -key.shape[0] % block
    query = jnp.pad(query, ((0, pad_queries), (0, 0))).reshape(-1, block, width)
    key = jnp.pad(key, ((0, pad_keys), (0, 0))).reshape(-1, block, width)
    count, score = (jnp.pad(x, (0, pad_keys)).reshape(-1, block) for x in (count, score))

    def of_queries(block_of_queries):
        number, rows = block_of_queries

        def add(so_far, keys):
            at, key, count, score = keys
            allowed = jnp.broadcast_to(count > 0, (block, block))
            if skip_own:
                place = jnp.arange(block)
                allowed &= (number * block + place)[:, None] != at * block + place
            return so_far | _sums(similarity(rows, key) / temperature, allowed, count, score), None

        # Derived from the input, so that it varies over the same mapped axes as the sums.
        zero = jnp.zeros_like(rows[:, 0])
        empty = Partial(zero - jnp.inf, zero, zero)
        return jax.lax.scan(add, empty, (jnp.arange(len(key)), key, count, score))[0]

    sums = jax.lax.map(of_queries, (jnp.arange(len(query)), query))
    return Partial(*(x.reshape(-1)[:queries] for x in sums))
