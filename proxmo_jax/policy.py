"""The policy: a decoder of the Qwen2 architecture (RMSNorm, rotary positions, grouped queries, QKV bias, SwiGLU).

Mathematics only; it knows no checkpoint names, no sampling and no loss. Layers run under one `scan`, so a model of
any depth compiles like one layer.
"""

import dataclasses
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class PolicyConfig:
    """Shape of the decoder, named as in Hugging Face's `config.json`."""

    vocab_size: int
    hidden_size: int = 64
    intermediate_size: int = 192
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens read so far: float [layers, B, S, kv heads, head_dim] each."""

    keys: jax.Array
    values: jax.Array

    @classmethod
    def empty(cls, config: PolicyConfig, batch: int, length: int) -> "Cache":
        shape = (config.num_hidden_layers, batch, length, config.num_key_value_heads, config.head_dim)
        return cls(jnp.zeros(shape), jnp.zeros(shape))


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864), half-split as in Qwen2. x [B, L, H, D], positions [B, L]."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


class RMSNorm(nn.Module):
    epsilon: float

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon) * weight


class Layer(nn.Module):
    """One decoder layer; a scan body: carries the hidden states and maps over the layers' caches."""

    config: PolicyConfig

    @nn.compact
    def __call__(self, hidden, cache, positions, mask, write_at):
        c = self.config
        x = RMSNorm(c.rms_norm_eps, name="input_norm")(hidden)

        def heads(name: str, count: int):
            return nn.DenseGeneral((count, c.head_dim), name=name)(x)

        query = rotate(heads("query", c.num_attention_heads), positions, c.rope_theta)
        key = rotate(heads("key", c.num_key_value_heads), positions, c.rope_theta)
        value = heads("value", c.num_key_value_heads)
        if cache is not None:
            key = jax.lax.dynamic_update_slice_in_dim(cache[0], key, write_at, axis=1)
            value = jax.lax.dynamic_update_slice_in_dim(cache[1], value, write_at, axis=1)
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])
        hidden = hidden + nn.DenseGeneral(c.hidden_size, axis=(-2, -1), use_bias=False, name="output")(mixed)

        x = RMSNorm(c.rms_norm_eps, name="mlp_norm")(hidden)
        gate = nn.Dense(c.intermediate_size, use_bias=False, name="gate")(x)
        up = nn.Dense(c.intermediate_size, use_bias=False, name="up")(x)
        hidden = hidden + nn.Dense(c.hidden_size, use_bias=False, name="down")(jax.nn.silu(gate) * up)
        return hidden, None if cache is None else (key, value)


class Policy(nn.Module):
    """Next-token logits. The embedding is tied to the output head."""

    config: PolicyConfig

    @nn.compact
    def __call__(self, tokens, positions, mask, cache: Cache | None = None, write_at=0, places=None):
        """tokens, positions int32 [B, L]; mask bool [B, L, S]: token l may attend to slot s.

        Without a cache S = L. With one, the L tokens' keys and values are written at slots `write_at`... and S is
        the cache's length. Returns (logits float32 [B, L, V], cache); with `places` int32 [B, A] logits after those
        tokens alone, [B, A, V].
        """
        c = self.config
        embedding = self.param("embedding", nn.initializers.normal(c.initializer_range), (c.vocab_size, c.hidden_size))
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0 if cache is not None else nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_hidden_layers,
            unroll=c.num_hidden_layers <= 4,  # a few layers run faster unrolled; many compile faster rolled
        )(c, name="layers")
        slots = None if cache is None else (cache.keys, cache.values)
        hidden, slots = layers(embedding[tokens], slots, positions, mask, write_at)
        if places is not None:
            hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
        hidden = RMSNorm(c.rms_norm_eps, name="norm")(hidden)
        return hidden @ embedding.T, None if cache is None else Cache(*slots)


def init_params(config: PolicyConfig, key: jax.Array):
    """Fresh parameters."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return Policy(config).init(key, tokens, tokens, jnp.ones((1, 2, 2), bool))["params"]
