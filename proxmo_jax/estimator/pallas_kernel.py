"""The soft baseline's sums as a Pallas TPU kernel: similarity, softmax and weighted sums in one pass over the keys.

Nothing of size `[N, K]` ever leaves the chip's vector memory. Values are those of `proximity.dense`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from proxmo_jax.estimator.partial_sums import Partial

BLOCK = 128


def _kernel(query, key, count, score, peak, weight, total, *, skip_own: bool):
    """One block of keys [B, D] against one of queries [B, D]; peak, weight and total [1, B] are kept over key blocks.

    Keys lie along the first axis of the product, so that sums over them are rows, as the outputs are.
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
    """As `proximity.dense`: query [N, D], key [K, D], count and score [K], temperature [] -> sums [N].

    Lowered for anything but a TPU the kernel is interpreted: right, and slow.
    """
    run = partial(_call, skip_own=skip_own)
    return jax.lax.platform_dependent(
        query, key, count, score, temperature, tpu=partial(run, interpret=False), default=partial(run, interpret=True)
    )


def _call(query, key, count, score, temperature, *, skip_own: bool, interpret: bool) -> Partial:
    queries, width = query.shape
    query = query / temperature  # once, instead of the whole product
    query, key = (jnp.pad(x, ((0, -len(x) % BLOCK), (0, -width % BLOCK))) for x in (query, key))
    count, score = (jnp.pad(x, (0, len(key) - len(x)))[:, None] for x in (count, score))
    rows = pl.BlockSpec((BLOCK, query.shape[1]), lambda i, j: (i, 0))
    keys = pl.BlockSpec((BLOCK, query.shape[1]), lambda i, j: (j, 0))
    column = pl.BlockSpec((BLOCK, 1), lambda i, j: (j, 0))
    sums = pl.BlockSpec((1, BLOCK), lambda i, j: (0, i))
    answer = pl.pallas_call(
        partial(_kernel, skip_own=skip_own),
        grid=(len(query) // BLOCK, len(key) // BLOCK),
        in_specs=[rows, keys, column, column],
        out_specs=[sums] * 3,
        out_shape=[jax.ShapeDtypeStruct((1, len(query)), jnp.float32)] * 3,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(query, key, count, score)
    return Partial(*(x[0, :queries] for x in answer))
