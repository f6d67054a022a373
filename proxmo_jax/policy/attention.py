"""Attention that allocates nothing of size [L, L]: over packed rows, and over left-padded prompts.

JAX's splash attention kernel on TPUs, cuDNN's on GPUs where it takes the shape, blocks of an exact softmax elsewhere.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec

from proxmo_jax.errors import UserError
from proxmo_jax.policy.sharding import RULES

BLOCK = 128  # lengths must be a multiple
PROMPT_BLOCK = 256  # queries and keys of a block of `blockwise`


def attention_kind(named: str, row_length: int, tpu: bool) -> str:
    """The attention over packed rows: `auto` is `splash` on a TPU where the rows fit its blocks, else `dense`.

    Args:
        named: `auto`, `dense` or `splash`.
        row_length: tokens of a packed row.
        tpu: whether it runs on TPUs.

    Returns:
        `dense` or `splash`.
    """
    if named != "auto":
        return named
    return "splash" if tpu and row_length % BLOCK == 0 else "dense"


def splash(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
    """Causal attention within segments, equal to `jax.nn.dot_product_attention` with the corresponding mask.

    Under `jax.set_mesh`, rows and heads are sharded by `RULES`. On other devices than a TPU the kernel is interpreted,
    which is slow.

    Args:
        query: float [B, L, H, D]; L is a multiple of 128.
        key: float [B, L, K, D]; K divides H.
        value: float [B, L, K, D].
        segments: int32 [B, L].

    Returns:
        float [B, L, H, D].
    """

    def here(*arguments):
        return jax.lax.platform_dependent(
            *arguments, tpu=partial(_splash, interpret=False), default=partial(_splash, interpret=True)
        )

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return here(query, key, value, segments)
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if len(query) % devices:
        raise UserError(
            f"splash attention: has {len(query)} rows, need a multiple of the {devices} devices of data x fsdp"
        )
    heads, tokens = PartitionSpec(RULES["batch"], None, RULES["heads"], None), PartitionSpec(RULES["batch"], None)
    specs = (heads, heads, heads, tokens)
    return jax.shard_map(here, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(query, key, value, segments)


def _splash(query, key, value, segments, *, interpret: bool) -> jax.Array:
    """`splash` on one device."""
    _, length, heads, head_dim = query.shape
    block = next(size for size in (512, 256, BLOCK) if length % size == 0)
    sizes = splash_attention.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * heads)
    kernel = splash_attention.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    query, key, value = (x.swapaxes(1, 2) for x in (query * head_dim**-0.5, key, value))
    ids = splash_attention.SegmentIds(q=segments, kv=segments)
    return jax.vmap(kernel)(query, key, value, ids).swapaxes(1, 2).astype(query.dtype)


def prompt_attention(query: jax.Array, key: jax.Array, value: jax.Array, start: jax.Array) -> jax.Array:
    """Causal attention of left-padded prompts, without gradient. What padding attends to is not defined.

    Args:
        query: float [B, L, H, D].
        key: float [B, L, K, D]; K divides H.
        value: float [B, L, K, D].
        start: int32 [B], the first token of each prompt.

    Returns:
        float [B, L, H, D].
    """
    if query.shape[1] <= PROMPT_BLOCK:
        return blockwise(query, key, value, start)
    if jax.default_backend() == "gpu" and query.dtype in (jnp.bfloat16, jnp.float16) and _cudnn_takes(query):
        return cudnn(query, key, value, start)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and query.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return blockwise(query, key, value, start)  # rows that cannot be split
    return jax.lax.platform_dependent(query, key, value, start, tpu=_splash_prompts, default=blockwise)


def _splash_prompts(query, key, value, start):
    """`prompt_attention` with padding as a segment of its own, the length padded to a multiple of the kernel's."""
    length = query.shape[1]
    short = -length % BLOCK
    segments = (jnp.arange(-short, length) >= start[:, None]).astype(jnp.int32)
    query, key, value = (jnp.pad(x, ((0, 0), (short, 0), (0, 0), (0, 0))) for x in (query, key, value))
    return splash(query, key, value, segments)[:, short:]


def _cudnn_takes(query: jax.Array) -> bool:
    """Whether cuDNN has a kernel for heads of this size."""
    return query.shape[-1] % 8 == 0 and query.shape[-1] <= 128


def cudnn(query: jax.Array, key: jax.Array, value: jax.Array, start: jax.Array, implementation="cudnn") -> jax.Array:
    """`prompt_attention` with cuDNN's kernel: prompts are moved to the front, where causality alone hides padding.

    Args:
        query: float16 or bfloat16 [B, L, H, D].
        key: float [B, L, K, D].
        value: float [B, L, K, D].
        start: int32 [B].
        implementation: of `jax.nn.dot_product_attention`.

    Returns:
        float [B, L, H, D].
    """
    roll = jax.vmap(partial(jnp.roll, axis=0))
    query, key, value = (roll(x, -start) for x in (query, key, value))
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation=implementation)
    return roll(mixed, start)


def blockwise(
    query: jax.Array, key: jax.Array, value: jax.Array, start: jax.Array, block: int = PROMPT_BLOCK
) -> jax.Array:  # fmt: skip
    """`prompt_attention` block by block, with the running softmax of FlashAttention (arXiv 2205.14135) in float32.

    Args:
        query: float [B, L, H, D].
        key: float [B, L, K, D].
        value: float [B, L, K, D].
        start: int32 [B].
        block: queries and keys that are compared at once, of each head.

    Returns:
        float [B, L, H, D].
    """
    batch, length, heads, head_dim = query.shape
    kv_heads, block = key.shape[2], min(block, length)
    count = -(-length // block)

    def blocks(x):
        """[B, L, K * G, D] -> [count, B, K, G, block, D]; what is added at the end is not seen."""
        x = jnp.pad(x, ((0, 0), (0, count * block - length), (0, 0), (0, 0)))
        return x.reshape(batch, count, block, kv_heads, -1, head_dim).transpose(1, 0, 3, 4, 2, 5)

    queries, values = blocks(query * head_dim**-0.5), blocks(value)[:, :, :, 0]
    keys = blocks(key)[:, :, :, 0].swapaxes(-1, -2)
    queries = queries.reshape(count, batch, kv_heads, -1, head_dim)
    at = jnp.arange(block)

    def read(j, carry, i):
        most, total, mixed = carry
        logits = jnp.matmul(queries[i], keys[j], preferred_element_type=jnp.float32)
        by_head = logits.reshape(batch, kv_heads, -1, block, block)
        seen = (j * block + at >= start[:, None, None]) & (j * block + at <= i * block + at[:, None])
        by_head = jnp.where(seen[:, None, None], by_head, jnp.finfo(jnp.float32).min)
        logits = by_head.reshape(logits.shape)
        higher = jnp.maximum(most, logits.max(-1, keepdims=True))
        weight, kept = jnp.exp(logits - higher), jnp.exp(most - higher)
        product = jnp.matmul(weight.astype(value.dtype), values[j], preferred_element_type=jnp.float32)
        return higher, kept * total + weight.sum(-1, keepdims=True), kept * mixed + product

    def attend(i):
        none = jnp.zeros((*queries.shape[1:4], 1), jnp.float32)
        nothing = none + jnp.finfo(jnp.float32).min, none, jnp.zeros(queries.shape[1:], jnp.float32)
        if count == 1:
            _, total, mixed = read(0, nothing, 0)
        else:
            first = jnp.minimum(start.min() // block, i)
            _, total, mixed = jax.lax.fori_loop(first, i + 1, partial(read, i=i), nothing)
        return (mixed / total).astype(query.dtype)

    mixed = attend(0)[None] if count == 1 else jax.lax.map(attend, jnp.arange(count))
    mixed = mixed.reshape(count, batch, kv_heads, -1, block, head_dim).transpose(1, 0, 4, 2, 3, 5)
    return mixed.reshape(batch, count * block, heads, head_dim)[:, :length]
