"""The policy: a decoder of the Qwen2, Qwen2.5 and Qwen3 architectures.

RMSNorm, rotary positions, grouped queries with biases (Qwen2) or normalised heads (Qwen3), SwiGLU. Mathematics only; it
knows no checkpoint names, no mesh, no sampling and no loss. Layers run under one `scan`, so a model of any depth
compiles like one layer.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
# Uniform within 1 / sqrt(inputs), as in the authors' code.
LORA_A = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclass(frozen=True)
class Rope:
    """Rotary positions (arXiv 2104.09864) and how they are stretched to longer texts.

    kind: default, linear (positions divided by `factor`) or yarn (arXiv 2309.00071: high frequencies kept, low ones
    divided, with a ramp between the dimensions that turn `beta_fast` and `beta_slow` times in `original_length`, which
    are rounded outwards if `truncate`).
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Radians per position, float64 [head_dim / 2], and what sines and cosines are multiplied by."""
        exponent = np.arange(0, head_dim, 2) / head_dim
        frequency = self.theta**-exponent
        if self.kind == "linear":
            return frequency / self.factor, 1.0
        if self.kind == "yarn":
            low, high = (
                head_dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
                for turns in (self.beta_fast, self.beta_slow)
            )
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, head_dim - 1)
            ramp = np.clip((np.arange(head_dim // 2) - low) / ((high - low) or 0.001), 0, 1)
            scale = self.attention_factor
            if scale is None:
                scale = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
            return frequency * (1 - ramp) + frequency / self.factor * ramp, scale
        return frequency, 1.0


@dataclass(frozen=True)
class PolicyConfig:
    """Shape of the decoder, named as in Hugging Face's `config.json` where that has a name.

    qkv_bias, qk_norm: Qwen2 has biases, Qwen3 normalised query and key heads. `max_position_embeddings` is the longest
    sequence. dtype, param_dtype: what is computed in and what is stored; statistics, logits and softmax are float32.
    remat: what is kept of a layer for its gradient: all ("none"), nothing ("full") or products with weights ("dots").
    attention: of packed rows, "dense" or "splash" (`attention.splash`). lora_rank, lora_alpha: adapters (`adapters`),
    kept in float32; rank 0: none.
    """

    vocab_size: int
    hidden_size: int = 64
    intermediate_size: int = 192
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    rope: Rope = Rope()
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    qkv_bias: bool = True
    qk_norm: bool = False
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 32_768
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    attention: str = "dense"
    lora_rank: int = 0
    lora_alpha: float = 32.0

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens read so far: [layers, B, kv heads, head_dim, S] and
    [layers, B, kv heads, S, head_dim], in the policy's dtype: as a decoding step's two products read them.
    """

    keys: jax.Array
    values: jax.Array

    @classmethod
    def empty(cls, config: PolicyConfig, batch: int, length: int) -> "Cache":
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads)
        keys, values = (*shape, config.head_dim, length), (*shape, length, config.head_dim)
        return cls(jnp.zeros(keys, config.dtype), jnp.zeros(values, config.dtype))


def rotate(x: jax.Array, positions: jax.Array, rope: Rope) -> jax.Array:
    """Rotary position embedding, half-split as in Qwen2. x [B, L, H, D], positions [B, L]."""
    half = x.shape[-1] // 2
    frequency, scale = rope.frequencies(x.shape[-1])
    angle = positions[:, :, None, None].astype(jnp.float32) * jnp.asarray(frequency, jnp.float32)
    sin, cos = (jnp.sin(angle) * scale).astype(x.dtype), (jnp.cos(angle) * scale).astype(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight, the statistic in float32."""

    config: PolicyConfig

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],), self.config.param_dtype)
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.config.rms_norm_eps)
        return normal.astype(x.dtype) * weight.astype(x.dtype)


def dense_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """query [B, L, H, D], key and value [B, S, K, D], mask bool [B, L, S]: token l may attend to token s."""
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])


def cached_attention(query: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """The same with keys [B, K, D, S] and values [B, K, S, D] as the cache has them; softmax in float32."""
    batch, length, heads, head_dim = query.shape
    groups = keys.shape[1]
    query = query.reshape(batch, length, groups, -1, head_dim).transpose(0, 2, 3, 1, 4)
    rows = query.reshape(batch, groups, -1, head_dim)
    logits = jnp.matmul(rows, keys, preferred_element_type=jnp.float32) * head_dim**-0.5
    logits = logits.reshape(*query.shape[:4], -1)
    weight = jax.nn.softmax(jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)).astype(values.dtype)
    mixed = jnp.matmul(weight.reshape(*rows.shape[:3], -1), values).reshape(query.shape)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


class Layer(nn.Module):
    """One decoder layer; a scan body: carries the hidden states and all layers' caches, of which it writes its own."""

    config: PolicyConfig
    attend: Callable

    @nn.compact
    def __call__(self, carry, layer, positions, mask, write_at):
        c = self.config
        hidden, cache = carry

        def linear(name: str, features: int | tuple[int, ...], x, *, axes: int = 1, bias: bool = False):
            types: Any = {"dtype": c.dtype, "param_dtype": c.param_dtype}
            axis = tuple(range(-axes, 0))
            y = nn.DenseGeneral(features, axis=axis, use_bias=bias, name=name, **types)(x)
            if c.lora_rank:
                types = {"dtype": c.dtype, "use_bias": False, "param_dtype": "float32"}
                low = nn.DenseGeneral(c.lora_rank, axis=axis, name=f"{name}_lora_a", kernel_init=LORA_A, **types)(x)
                up = nn.DenseGeneral(features, name=f"{name}_lora_b", kernel_init=nn.initializers.zeros, **types)
                y = y + c.lora_alpha / c.lora_rank * up(low)
            return y

        x = RMSNorm(c, name="input_norm")(hidden)
        query = linear("query", (c.num_attention_heads, c.head_dim), x, bias=c.qkv_bias)
        key = linear("key", (c.num_key_value_heads, c.head_dim), x, bias=c.qkv_bias)
        value = linear("value", (c.num_key_value_heads, c.head_dim), x, bias=c.qkv_bias)
        if c.qk_norm:
            query, key = RMSNorm(c, name="query_norm")(query), RMSNorm(c, name="key_norm")(key)
        query, key = rotate(query, positions, c.rope), rotate(key, positions, c.rope)
        if cache is not None:
            cache = written(cache, key, value, layer, write_at)
            mixed = cached_attention(query, cache.keys[layer], cache.values[layer], mask)
        else:
            mixed = self.attend(query, key, value, mask)
        hidden = hidden + linear("output", c.hidden_size, mixed, axes=2)

        x = RMSNorm(c, name="mlp_norm")(hidden)
        gate, up = linear("gate", c.intermediate_size, x), linear("up", c.intermediate_size, x)
        hidden = hidden + linear("down", c.hidden_size, jax.nn.silu(gate) * up)
        return (hidden, cache), None


def written(cache: Cache, key: jax.Array, value: jax.Array, layer: jax.Array, at: jax.Array) -> Cache:
    """The cache with `key` and `value` [B, L, K, D] in a layer's slots from `at` on: one for all rows, or one each [B].
    In place where the cache is carried by a loop."""
    key, value = key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)
    if jnp.ndim(at) == 0:
        return Cache(
            jax.lax.dynamic_update_slice(cache.keys, key[None], (layer, 0, 0, 0, at)),
            jax.lax.dynamic_update_slice(cache.values, value[None], (layer, 0, 0, at, 0)),
        )
    rows, heads, length, _ = value.shape
    row, head = jnp.arange(rows)[:, None, None], jnp.arange(heads)[:, None]
    slot = at[:, None, None] + jnp.arange(length)
    return Cache(  # indices apart from each other come first: [B, K, L, D] both
        cache.keys.at[layer, row, head, :, slot].set(key.swapaxes(2, 3)),
        cache.values.at[layer, row, head, slot].set(value),
    )


class Policy(nn.Module):
    """Next-token logits. `attend(query, key, value, mask)` is the attention, `mask` whatever it takes for one."""

    config: PolicyConfig
    attend: Callable = dense_attention

    @nn.compact
    def __call__(self, tokens, positions, mask, cache: Cache | None = None, write_at=0, places=None):
        """tokens, positions int32 [B, L]; mask bool [B, L, S]: token l may attend to slot s.

        Without a cache S = L. With one, the L tokens' keys and values are written at slots `write_at`... (a number, or
        one for each row, [B]) and S is the cache's length. Returns (logits float32 [B, L, V], cache); with `places`
        int32 [B, A] logits after those tokens alone, [B, A, V].
        """
        c = self.config
        normal, shape = nn.initializers.normal(c.initializer_range), (c.vocab_size, c.hidden_size)
        embedding = self.param("embedding", normal, shape, c.param_dtype)
        policy = REMAT[c.remat]
        layers = nn.scan(
            Layer if policy is None else nn.remat(Layer, policy=policy, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_hidden_layers,
            unroll=c.num_hidden_layers <= 4,  # a few layers run faster unrolled; many compile faster rolled
        )(c, self.attend, name="layers")
        start = embedding[tokens].astype(c.dtype), cache
        (hidden, cache), _ = layers(start, jnp.arange(c.num_hidden_layers), positions, mask, write_at)
        if places is not None:
            hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
        hidden = RMSNorm(c, name="norm")(hidden)
        head = embedding if c.tie_word_embeddings else self.param("head", normal, shape, c.param_dtype)
        logits = jnp.einsum("...h,vh->...v", hidden, head.astype(c.dtype), preferred_element_type=jnp.float32)
        return logits, cache


# What each axis of each parameter is; `sharding.RULES` says where such an axis lies on the mesh.
LOGICAL_AXES = {
    "embedding": ("vocab", "embed"),
    "head": ("vocab", "embed"),
    "norm/weight": (None,),
    "layers/input_norm/weight": ("layer", None),
    "layers/mlp_norm/weight": ("layer", None),
    "layers/query_norm/weight": ("layer", None),
    "layers/key_norm/weight": ("layer", None),
    "layers/query/kernel": ("layer", "embed", "heads", None),
    "layers/key/kernel": ("layer", "embed", "kv_heads", None),
    "layers/value/kernel": ("layer", "embed", "kv_heads", None),
    "layers/query/bias": ("layer", "heads", None),
    "layers/key/bias": ("layer", "kv_heads", None),
    "layers/value/bias": ("layer", "kv_heads", None),
    "layers/output/kernel": ("layer", "heads", None, "embed"),
    "layers/gate/kernel": ("layer", "embed", "mlp"),
    "layers/up/kernel": ("layer", "embed", "mlp"),
    "layers/down/kernel": ("layer", "mlp", "embed"),
    "layers/query_lora_a/kernel": ("layer", "embed", None),
    "layers/query_lora_b/kernel": ("layer", None, "heads", None),
    "layers/key_lora_a/kernel": ("layer", "embed", None),
    "layers/key_lora_b/kernel": ("layer", None, "kv_heads", None),
    "layers/value_lora_a/kernel": ("layer", "embed", None),
    "layers/value_lora_b/kernel": ("layer", None, "kv_heads", None),
    "layers/output_lora_a/kernel": ("layer", "heads", None, None),
    "layers/output_lora_b/kernel": ("layer", None, "embed"),
    "layers/gate_lora_a/kernel": ("layer", "embed", None),
    "layers/gate_lora_b/kernel": ("layer", None, "mlp"),
    "layers/up_lora_a/kernel": ("layer", "embed", None),
    "layers/up_lora_b/kernel": ("layer", None, "mlp"),
    "layers/down_lora_a/kernel": ("layer", "mlp", None),
    "layers/down_lora_b/kernel": ("layer", None, "embed"),
}


def parameter_shapes(config: PolicyConfig):
    """The tree of parameters as shapes and dtypes, nothing allocated."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def init_params(config: PolicyConfig, key: jax.Array):
    """Fresh parameters."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return Policy(config).init(key, tokens, tokens, jnp.ones((1, 2, 2), bool))["params"]
