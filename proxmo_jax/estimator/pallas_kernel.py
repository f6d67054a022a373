"""The sums of the soft baseline as a Pallas TPU kernel: similarity, softmax and weighted sums in one pass.

Nothing of size `[N, K]` leaves VMEM. Results equal those of `partial_sums.dense`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from proxmo_jax.estimator.partial_sums import Partial

BLOCK = 128


def _kernel(query, key, count, score, peak, weight, total, *, skip_own: bool):
    """Add a block of keys [B, D] to the sums [1, B] of a block of queries [B, D].

    The sums stay in VMEM over the key blocks. Keys are the first axis of the product, so that sums over them are rows,
    as the outputs are.
    """
    at = pl.program_id(1)

    @pl.when(at == 0)
    def _():
        peak[...] = jnp.full_like(peak, -jnp.inf)
        weight[...] = jnp.zeros_like(weight)
        total[...] = jnp.zeros_like(total)

    logits = jax.lax.dot_general(
        key[...], query[...], (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
    )  # fmt: skip
    allowed = jnp.broadcast_to(count[...] > 0, logits.shape)
    if skip_own:
        here = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0) + at * BLOCK
        allowed &= here != jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) + pl.program_id(0) * BLOCK
    logits = jnp.where(allowed, logits, -jnp.inf)
    before = peak[...]
    highest = jnp.maximum(before, logits.max(axis=0, keepdims=True))
    base = jnp.where(highest == -jnp.inf, 0.0, highest)
    e = jnp.where(allowed, jnp.exp(logits - base), 0.0)
    decay = jnp.where(before == -jnp.inf, 0.0, jnp.exp(before - base))
    peak[...] = highest
    weight[...] = decay * weight[...] + (e * count[...]).sum(axis=0, keepdims=True)
    total[...] = decay * total[...] + (e * score[...]).sum(axis=0, keepdims=True)


@partial(jax.jit, static_argnames="skip_own")
def pallas(query, key, count, score, temperature, *, skip_own: bool) -> Partial:
    """As `partial_sums.dense`. On other devices than a TPU the kernel is interpreted, which is slow.

    Args:
        query: float32 [N, D].
        key: float32 [K, D].
        count: float32 [K], steps of each key.
        score: float32 [K], sum of their scores.
        temperature: float32 [].
        skip_own: leave key i out of the sums of query i.

    Returns:
        Sums [N].
    """
    run = partial(_call, skip_own=skip_own)
    return jax.lax.platform_dependent(
        query, key, count, score, temperature, tpu=partial(run, interpret=False), default=partial(run, interpret=True)
    )


def _call(query, key, count, score, temperature, *, skip_own: bool, interpret: bool) -> Partial:
    """Pad to whole blocks and run the kernel."""
    queries, width = query.shape
    query = query / temperature  # cheaper than dividing the product
    query, key = (jnp.pad(x, ((0, -len(x) % BLOCK), (0, -width % BLOCK))) for x in (query, key))
    count, score = (jnp.pad(x, (0, len(key) - len(x)))[:, None] for x in (count, score))
    rows = pl.BlockSpec((BLOCK, query.shape[1]), lambda i, j: (i, 0))
    keys = pl.BlockSpec((BLOCK, query.shape[1]), lambda i, j: (j, 0))
    column = pl.BlockSpec((BLOCK, 1), lambda i, j: (j, 0))
    output = pl.BlockSpec((1, BLOCK), lambda i, j: (0, i))
    sums = pl.pallas_call(
        partial(_kernel, skip_own=skip_own),
        grid=(len(query) // BLOCK, len(key) // BLOCK),
        in_specs=[rows, keys, column, column],
        out_specs=[output] * 3,
        out_shape=[jax.ShapeDtypeStruct((1, len(query)), jnp.float32)] * 3,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(query, key, count, score)
    return Partial(*(x[0, :queries] for x in sums))
