"""The softmax-weighted sums of the soft baseline; sums over different keys combine with `|`.

Two ways to compute them: `dense` (all pairs at once) and `blockwise` (memory flat in turns); a third is in
`pallas_kernel`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Partial(NamedTuple):
    """Softmax sums of each query [N] over some keys: with e_j = exp(c_j / tau - peak), weight = sum n_j e_j and
    score = sum q_j e_j, for keys of n_j steps whose scores add up to q_j. No key: peak -inf, the rest 0.
    """

    peak: Any
    weight: Any
    score: Any

    def __or__(self, other: "Partial") -> "Partial":
        """The sums over the keys of both."""
        peak = jnp.maximum(self.peak, other.peak)
        mine, theirs = _decay(self.peak, peak), _decay(other.peak, peak)
        return Partial(peak, mine * self.weight + theirs * other.weight, mine * self.score + theirs * other.score)


def _decay(old: jax.Array, new: jax.Array) -> jax.Array:
    """exp(old - new) where old may be -inf, and new with it."""
    return jnp.where(old == -jnp.inf, 0.0, jnp.exp(old - jnp.where(new == -jnp.inf, 0.0, new)))


def similarity(query: jax.Array, key: jax.Array) -> jax.Array:
    """Cosine similarity of unit vectors: `[N, D], [K, D] -> [N, K]` float32. A zero row has 0 to everything.

    `HIGHEST`: on TPU the default rounds the product to bfloat16, which moved step advantages by up to 0.03.
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
    """All at once, `[N, K]` in memory. query [N, D], key [K, D], count and score [K], temperature [].

    `skip_own` leaves key i out of query i's sums. Keys of count 0 (padding) are in nobody's.
    """
    allowed = jnp.broadcast_to(count > 0, (query.shape[0], key.shape[0]))
    if skip_own:
        allowed &= ~jnp.eye(query.shape[0], key.shape[0], dtype=bool)
    return _sums(similarity(query, key) / temperature, allowed, count, score)


def blockwise(query, key, count, score, temperature, *, skip_own: bool, block: int = 128) -> Partial:
    """As `dense`, holding `[block, block]` at a time (online softmax; Milakov and Gimelshein, arXiv 1805.02867)."""
    queries, width = query.shape[0], query.shape[1]
    pad_queries, pad_keys = -queries % block, -key.shape[0] % block
    query = jnp.pad(query, ((0, pad_queries), (0, 0))).reshape(-1, block, width)
    key = jnp.pad(key, ((0, pad_keys), (0, 0))).reshape(-1, block, width)
    count, score = (jnp.pad(x, (0, pad_keys)).reshape(-1, block) for x in (count, score))

    def one_block_of_queries(q):
        number, rows = q

        def add(so_far, keys):
            at, key, count, score = keys
            allowed = jnp.broadcast_to(count > 0, (block, block))
            if skip_own:
                place = jnp.arange(block)
                allowed &= (number * block + place)[:, None] != at * block + place
            return so_far | _sums(similarity(rows, key) / temperature, allowed, count, score), None

        # Made from the input, so that it varies over mapped axes as the sums do.
        zero = jnp.zeros_like(rows[:, 0])
        nothing = Partial(zero - jnp.inf, zero, zero)
        return jax.lax.scan(add, nothing, (jnp.arange(len(key)), key, count, score))[0]

    sums = jax.lax.map(one_block_of_queries, (jnp.arange(len(query)), query))
    return Partial(*(x.reshape(-1)[:queries] for x in sums))
