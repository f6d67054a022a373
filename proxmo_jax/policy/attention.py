"""Attention over packed rows with JAX's splash kernel: nothing of size [L, L] is made. For TPUs."""

from functools import partial

import jax
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec

from proxmo_jax.policy.sharding import RULES

BLOCK = 128  # lengths must be a multiple of it


def splash(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
    """Causal attention within segments. query [B, L, H, D], key and value [B, L, K, D], segments int32 [B, L].

    As `jax.nn.dot_product_attention` with a mask of equal segments and earlier tokens; K divides H, L is a multiple of
    128. Under `jax.set_mesh` rows and heads stay where `RULES` puts them. Lowered for anything but a TPU the kernel is
    interpreted: right, and slow.
    """

    def here(*arguments):
        return jax.lax.platform_dependent(
            *arguments, tpu=partial(_splash, interpret=False), default=partial(_splash, interpret=True)
        )

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return here(query, key, value, segments)
    heads, tokens = PartitionSpec(RULES["batch"], None, RULES["heads"], None), PartitionSpec(RULES["batch"], None)
    specs = (heads, heads, heads, tokens)
    return jax.shard_map(here, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(query, key, value, segments)


def _splash(query, key, value, segments, *, interpret: bool) -> jax.Array:
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
