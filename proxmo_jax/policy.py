"""The policy: a decoder of the Qwen2, Qwen2.5 and Qwen3 architectures.

RMSNorm, rotary positions, grouped queries with biases (Qwen2) or normalised heads (Qwen3), SwiGLU. Mathematics only; it
knows no checkpoint names, no mesh, no sampling and no loss. Layers run under one `scan`, so a model of any depth
compiles like one layer.
"""

import dataclasses
import math
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


@dataclass(frozen=True)
class Rope:
    """Rotary positions (arXiv 2104.09864) and how they are stretched to longer texts.

    kind: default, linear (positions divided by `factor`) or yarn (arXiv 2309.00071: high frequencies kept, low ones
    divided, with a ramp between the dimensions that turn `beta_fast` and `beta_slow` times in `original_length`).
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

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
            low, high = max(math.floor(low), 0), min(math.ceil(high), head_dim - 1)
            ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
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

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens read so far: [layers, B, S, kv heads, head_dim] each, in the policy's dtype."""

    keys: jax.Array
    values: jax.Array

    @classmethod
    def empty(cls, config: PolicyConfig, batch: int, length: int) -> "Cache":
        shape = (config.num_hidden_layers, batch, length, config.num_key_value_heads, config.head_dim)
        return cls(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


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


class Layer(nn.Module):
    """One decoder layer; a scan body: carries the hidden states and all layers' caches, of which it writes its own."""

    config: PolicyConfig

    @nn.compact
    def __call__(self, carry, layer, positions, mask, write_at):
        c = self.config
        hidden, cache = carry
        types: Any = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        x = RMSNorm(c, name="input_norm")(hidden)

        def heads(name: str, count: int):
            return nn.DenseGeneral((count, c.head_dim), use_bias=c.qkv_bias, name=name, **types)(x)

        query = heads("query", c.num_attention_heads)
        key = heads("key", c.num_key_value_heads)
        value = heads("value", c.num_key_value_heads)
        if c.qk_norm:
            query, key = RMSNorm(c, name="query_norm")(query), RMSNorm(c, name="key_norm")(key)
        query, key = rotate(query, positions, c.rope), rotate(key, positions, c.rope)
        if cache is not None:
            cache = Cache(written(cache.keys, key, layer, write_at), written(cache.values, value, layer, write_at))
            key, value = cache.keys[layer], cache.values[layer]
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])
        hidden = hidden + nn.DenseGeneral(c.hidden_size, axis=(-2, -1), use_bias=False, name="output", **types)(mixed)

        x = RMSNorm(c, name="mlp_norm")(hidden)
        gate = nn.Dense(c.intermediate_size, use_bias=False, name="gate", **types)(x)
        up = nn.Dense(c.intermediate_size, use_bias=False, name="up", **types)(x)
        hidden = hidden + nn.Dense(c.hidden_size, use_bias=False, name="down", **types)(jax.nn.silu(gate) * up)
        return (hidden, cache), None


def written(cache: jax.Array, new: jax.Array, layer: jax.Array, at: jax.Array) -> jax.Array:
    """The cache [layers, B, S, ...] with `new` [B, L, ...] in a layer's slots from `at` on: one for all rows, or one
    each [B]. In place where the cache is carried by a loop."""
    if jnp.ndim(at) == 0:
        return jax.lax.dynamic_update_slice(cache, new[None], (layer, 0, at, 0, 0))
    rows, length = new.shape[:2]
    return cache.at[layer, jnp.arange(rows)[:, None], at[:, None] + jnp.arange(length)].set(new)


class Policy(nn.Module):
    """Next-token logits."""

    config: PolicyConfig

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
        )(c, name="layers")
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
}


def parameter_shapes(config: PolicyConfig):
    """The tree of parameters as shapes and dtypes, nothing allocated."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def init_params(config: PolicyConfig, key: jax.Array):
    """Fresh parameters."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return Policy(config).init(key, tokens, tokens, jnp.ones((1, 2, 2), bool))["params"]
