"""The policy: a decoder of the Llama, Qwen2, Qwen2.5 and Qwen3 architectures.

RMSNorm, rotary positions, grouped-query attention with biases (Qwen2), normalised heads (Qwen3) or neither (Llama),
SwiGLU. The module contains only the mathematics. Layers run under one `scan`, so compile time does not grow with depth.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from proxmo_jax.policy.products import dot_general, low_rank, product

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
PART, PARTS = 64, 8  # queries of a part of `causal_attention`, and the most parts, which are compiled one by one
# A KV cache is read to a multiple of so many places, of which there are at most so many.
READ_STEP, READ_LENGTHS = 128, 8
FEW_LAYERS = 4  # so few run faster one by one, more compile faster in a loop
# Uniform within 1 / sqrt(inputs), as in the code of LoRA's authors.
LORA_A = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclass(frozen=True)
class Rope:
    """Rotary positions (arXiv 2104.09864) and their extension to longer contexts.

    YaRN (arXiv 2309.00071) keeps high frequencies and divides low ones by `factor`, with a ramp between the dimensions
    that turn `beta_fast` and `beta_slow` times in `original_length`. Llama 3.1 (its code, apply_scaling) does so
    with a ramp over frequencies, from `low_freq_factor` to `high_freq_factor` turns in `original_length`.

    Attributes:
        theta: base of the frequencies.
        kind: "default", "linear" (positions divided by `factor`), "yarn" or "llama3".
        factor: of the context length.
        original_length: tokens of the context that the model was trained on.
        beta_fast: start of YaRN's ramp, in turns.
        beta_slow: end of YaRN's ramp, in turns.
        attention_factor: factor on sines and cosines; None: as in the paper.
        truncate: round the ends of the ramp outwards.
        low_freq_factor: turns below which Llama 3.1 divides a frequency.
        high_freq_factor: turns above which Llama 3.1 keeps it.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Rotary frequencies.

        Args:
            head_dim: dimensions of a head.

        Returns:
            Radians per position, float64 [head_dim / 2], and the factor on sines and cosines.
        """
        exponent = np.arange(0, head_dim, 2) / head_dim
        frequency = self.theta**-exponent
        if self.kind == "linear":
            return frequency / self.factor, 1.0
        if self.kind == "llama3":
            turns = self.original_length * frequency / (2 * math.pi)
            keep = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
            return frequency * keep + frequency / self.factor * (1 - keep), 1.0
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
    """Shape of the decoder, with the names of Hugging Face's `config.json` where it has one."""

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
    """Biases of query, key and value (Qwen2)."""
    qk_norm: bool = False
    """Normalised query and key heads (Qwen3)."""
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 32_768
    """Tokens of the longest sequence."""
    dtype: str = "float32"
    """Dtype of computation; statistics, logits and softmax are float32."""
    param_dtype: str = "float32"
    """Dtype of stored parameters."""
    remat: str = "none"
    """Rematerialisation: a layer keeps all (none), nothing (full) or products with weights (dots) for its gradient."""
    attention: str = "dense"
    """Attention of packed rows: dense or splash (`attention.splash`)."""
    lora_rank: int = 0
    """Rank of the adapters, which are float32 (`adapters`); 0: none."""
    lora_alpha: float = 32.0
    """Scale of the adapters, over their rank."""

    def to_dict(self) -> dict:
        """The fields as plain values."""
        return dataclasses.asdict(self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """KV cache in the policy's dtype, in the layouts that the two products of a decoding step read.

    Attributes:
        keys: [layers, B, kv heads, head_dim, S].
        values: [layers, B, kv heads, S, head_dim].
    """

    keys: jax.Array
    values: jax.Array

    @classmethod
    def empty(cls, config: PolicyConfig, batch: int, length: int) -> "Cache":
        """A cache of zeros.

        Args:
            config: shape of the policy.
            batch: B.
            length: S.

        Returns:
            The cache.
        """
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads)
        keys, values = (*shape, config.head_dim, length), (*shape, length, config.head_dim)
        return cls(jnp.zeros(keys, config.dtype), jnp.zeros(values, config.dtype))

    def apart(self) -> list["Cache"]:
        """The caches of the layers, as arrays of their own."""
        return [jax.tree.map(lambda x: x[i : i + 1], self) for i in range(len(self.keys))]  # noqa: B023


def rotate(x: jax.Array, positions: jax.Array, rope: Rope) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864), half-split as in Qwen2.

    Args:
        x: float [B, L, H, D].
        positions: int32 [B, L].
        rope: frequencies.

    Returns:
        float [B, L, H, D].
    """
    half = x.shape[-1] // 2
    frequency, scale = rope.frequencies(x.shape[-1])
    angle = positions[:, :, None, None].astype(jnp.float32) * jnp.asarray(frequency, jnp.float32)
    sin, cos = (jnp.sin(angle) * scale).astype(x.dtype), (jnp.cos(angle) * scale).astype(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight, with the statistic in float32 (arXiv 1910.07467)."""

    config: PolicyConfig

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],), self.config.param_dtype)
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.config.rms_norm_eps)
        return normal.astype(x.dtype) * weight.astype(x.dtype)


def dense_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention with a dense mask; the softmax is in float32.

    Two products of all heads that share keys are faster on a CPU than `jax.nn.dot_product_attention`.

    Args:
        query: float [B, L, H, D].
        key: float [B, S, K, D]; K divides H.
        value: float [B, S, K, D].
        mask: bool [B, L, S], token l may attend to token s.

    Returns:
        float [B, L, H, D].
    """
    batch, length, heads, head_dim = query.shape
    groups = key.shape[2]
    query = query.reshape(batch, length, groups, -1, head_dim).transpose(0, 2, 3, 1, 4)
    rows, keys, values = query.reshape(batch, groups, -1, head_dim), key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)
    logits = jnp.matmul(rows, keys, preferred_element_type=jnp.float32) * head_dim**-0.5
    logits = jnp.where(mask[:, None, None], logits.reshape(*query.shape[:4], -1), jnp.finfo(jnp.float32).min)
    weight = jax.nn.softmax(logits).astype(value.dtype).reshape(*rows.shape[:3], -1)
    mixed = jnp.matmul(weight, values).reshape(query.shape)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """`dense_attention` in parts: queries of a part meet no keys past its end. No token may attend to a later one.

    On two CPU cores an update on rows of 160 tokens takes 0.8 of the time, one on rows of 512 tokens 0.9.

    Args:
        query: float [B, L, H, D].
        key: float [B, L, K, D]; K divides H.
        value: float [B, L, K, D].
        mask: bool [B, L, L].

    Returns:
        float [B, L, H, D].
    """
    length = query.shape[1]
    parts = min(-(-length // PART), PARTS)
    ends = [length * i // parts for i in range(parts + 1)]
    mixed = [
        dense_attention(query[:, start:end], key[:, :end], value[:, :end], mask[:, start:end, :end])
        for start, end in pairwise(ends)
    ]
    return jnp.concatenate(mixed, axis=1)


def read_lengths(size: int) -> tuple[int, list[int]]:
    """The static lengths to which a KV cache of so many places is read, and the step between them."""
    step = max(READ_STEP, -(-size // READ_LENGTHS // READ_STEP) * READ_STEP)
    return step, [*range(step, size, step), size]


def cached_attention(query: jax.Array, cache: Cache, layer: jax.Array, start: jax.Array, at: jax.Array) -> jax.Array:
    """Attention of one new token of each row to its places of the KV cache; the softmax is in float32.

    A long cache is read to one of a few static lengths, the first that holds all that is written; on a TPU as a whole.

    Args:
        query: float [B, 1, H, D].
        cache: of all layers; S places.
        layer: int32 [], index of the layer.
        start: int32 [B], the first place of each row.
        at: int32 [] or [B], its last place.

    Returns:
        float [B, 1, H, D].
    """
    batch, _, heads, head_dim = query.shape
    kv_heads, size = cache.keys.shape[2:5:2]
    rows = query.reshape(batch, kv_heads, -1, head_dim)
    last = jnp.broadcast_to(at, batch)

    def of_layer(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, layer, 1)[0]

    def read(length: int, keys: jax.Array, values: jax.Array) -> jax.Array:
        keys, values = keys[..., :length], values[:, :, :length]
        places = jnp.arange(length)
        seen = (places >= start[:, None]) & (places <= last[:, None])
        logits = jnp.matmul(rows, keys, preferred_element_type=jnp.float32) * head_dim**-0.5
        weight = jax.nn.softmax(jnp.where(seen[:, None, None], logits, jnp.finfo(jnp.float32).min))
        return jnp.matmul(weight.astype(values.dtype), values).reshape(batch, 1, heads, head_dim)

    step, lengths = read_lengths(size)
    if len(lengths) == 1:
        return read(size, of_layer(cache.keys), of_layer(cache.values))

    def as_written(keys: jax.Array, values: jax.Array) -> jax.Array:
        # Rows that have stopped may be past the end.
        branch = jnp.minimum(last.max() // step, len(lengths) - 1)
        # A slice outside of the branches would be a copy of the whole length.
        reads = [lambda keys, values, n=n: read(n, of_layer(keys), of_layer(values)) for n in lengths]
        return jax.lax.switch(branch, reads, keys, values)

    def as_a_whole(keys: jax.Array, values: jax.Array) -> jax.Array:
        # XLA for TPUs gives branches a slice in memory of its own, three times the traffic.
        keys, values = tpu_layouts(keys, values)
        return read(size, of_layer(keys), of_layer(values))

    return jax.lax.platform_dependent(cache.keys, cache.values, tpu=as_a_whole, default=as_written)


def tpu_layouts(keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The KV cache in layouts that pad no axis to the 128 lanes of a TPU.

    Where they are not prescribed, XLA takes other ones for a prefill than for the loop over tokens, and copies the
    cache of all layers in between.

    Args:
        keys: [..., head_dim, S].
        values: [..., S, head_dim].

    Returns:
        The same.
    """
    *axes, places, dim = range(values.ndim)
    by_row, by_column = Layout((*axes, places, dim)), Layout((*axes, dim, places))
    keys = with_layout_constraint(keys, by_row)
    return keys, with_layout_constraint(values, by_column if values.shape[-1] % 128 else by_row)


class Kernel(nn.Module):
    """A float32 matrix of an adapter."""

    shape: tuple[int, ...]
    initializer: Callable

    @nn.compact
    def __call__(self):
        return self.param("kernel", self.initializer, self.shape, "float32")


class Layer(nn.Module):
    """One decoder layer as a scan body: carries hidden states and the KV cache of all layers, and updates its part."""

    config: PolicyConfig
    attend: Callable

    @nn.compact
    def __call__(self, carry, layer, positions, mask, write_at):
        c = self.config
        hidden, cache = carry

        def linear(name: str, features: int | tuple[int, ...], x, *, axes: int = 1, bias: bool = False):
            types: Any = {"dtype": c.dtype, "param_dtype": c.param_dtype, "dot_general": dot_general}
            axis = tuple(range(-axes, 0))
            y = nn.DenseGeneral(features, axis=axis, use_bias=bias, name=name, **types)(x)
            if not c.lora_rank:
                return y
            inputs, outputs = x.shape[-axes:], y.shape[x.ndim - axes :]
            down = Kernel((*inputs, c.lora_rank), LORA_A, name=f"{name}_lora_a")().reshape(-1, c.lora_rank)
            up = Kernel((c.lora_rank, *outputs), nn.initializers.zeros, name=f"{name}_lora_b")()
            up = up.reshape(c.lora_rank, -1)
            change = low_rank(x.reshape(-1, len(down)), down.astype(c.dtype), up.astype(c.dtype))
            return y + c.lora_alpha / c.lora_rank * change.reshape(y.shape)

        x = RMSNorm(c, name="input_norm")(hidden)
        query = linear("query", (c.num_attention_heads, c.head_dim), x, bias=c.qkv_bias)
        key = linear("key", (c.num_key_value_heads, c.head_dim), x, bias=c.qkv_bias)
        value = linear("value", (c.num_key_value_heads, c.head_dim), x, bias=c.qkv_bias)
        if c.qk_norm:
            query, key = RMSNorm(c, name="query_norm")(query), RMSNorm(c, name="key_norm")(key)
        query, key = rotate(query, positions, c.rope), rotate(key, positions, c.rope)
        if cache is not None:
            cache = written(cache, key, value, layer, write_at)
        if cache is not None and query.shape[1] == 1:
            mixed = cached_attention(query, cache, layer, mask, write_at)
        else:
            mixed = self.attend(query, key, value, mask)
        hidden = hidden + linear("output", c.hidden_size, mixed, axes=2)

        x = RMSNorm(c, name="mlp_norm")(hidden)
        gate, up = linear("gate", c.intermediate_size, x), linear("up", c.intermediate_size, x)
        hidden = hidden + linear("down", c.hidden_size, jax.nn.silu(gate) * up)
        return (hidden, cache), None


def written(cache: Cache, key: jax.Array, value: jax.Array, layer: jax.Array, at: jax.Array) -> Cache:
    """Write keys and values of a layer into the KV cache; in place where the cache is a loop carry.

    Args:
        cache: of all layers.
        key: float [B, L, K, D].
        value: float [B, L, K, D].
        layer: int32 [], index of the layer.
        at: int32 [] or [B], the first slot, for all rows or for each.

    Returns:
        The cache.
    """
    key, value = key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)
    if jnp.ndim(at) == 0:
        return Cache(
            jax.lax.dynamic_update_slice(cache.keys, key[None], (layer, 0, 0, 0, at)),
            jax.lax.dynamic_update_slice(cache.values, value[None], (layer, 0, 0, at, 0)),
        )
    rows, heads, length, _ = value.shape
    row, head = jnp.arange(rows)[:, None, None], jnp.arange(heads)[:, None]
    slot = at[:, None, None] + jnp.arange(length)
    return Cache(  # non-adjacent advanced indices come first: both [B, K, L, D]
        cache.keys.at[layer, row, head, :, slot].set(key.swapaxes(2, 3)),
        cache.values.at[layer, row, head, slot].set(value),
    )


class Policy(nn.Module):
    """Next-token logits.

    Attributes:
        config: shape of the policy.
        attend: attention, called with (query, key, value, mask); the mask is in its own format.
    """

    config: PolicyConfig
    attend: Callable = dense_attention

    @nn.compact
    def __call__(self, tokens, positions, mask, cache: Any = None, write_at=0, places=None):
        """Run the decoder.

        Args:
            tokens: int32 [B, L].
            positions: int32 [B, L].
            mask: what `attend` takes: bool [B, L, L], token l may attend to token s. With a cache int32 [B], the
                first slot of each row.
            cache: keys and values of these tokens are written to it. One token of a row attends to all slots up to
                its own, several tokens to one another. A list: of each layer, with parameters that are `apart`.
            write_at: int [] or [B], first slot to write, for all rows or for each.
            places: int32 [B, A], tokens whose logits are computed (default: all).

        Returns:
            Logits float32 [B, L, V] or [B, A, V], and the cache.
        """
        c = self.config
        normal, shape = nn.initializers.normal(c.initializer_range), (c.vocab_size, c.hidden_size)
        embedding = self.param("embedding", normal, shape, c.param_dtype)
        hidden = embedding[tokens].astype(c.dtype)
        if isinstance(cache, list):
            layer, each, cache = Layer(c, self.attend, parent=None), cache, []
            for own, before in zip(self.variables["params"]["layers"], each, strict=True):
                (hidden, after), _ = layer.apply({"params": own}, (hidden, before), 0, positions, mask, write_at)
                cache.append(after)
        else:
            policy = REMAT[c.remat]
            layers = nn.scan(
                Layer if policy is None else nn.remat(Layer, policy=policy, prevent_cse=False),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
                length=c.num_hidden_layers,
                unroll=c.num_hidden_layers <= FEW_LAYERS,
            )(c, self.attend, name="layers")
            (hidden, cache), _ = layers((hidden, cache), jnp.arange(c.num_hidden_layers), positions, mask, write_at)
        if places is not None:
            hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
        hidden = RMSNorm(c, name="norm")(hidden)
        head = embedding if c.tie_word_embeddings else self.param("head", normal, shape, c.param_dtype)
        return product(hidden, head.astype(c.dtype).T), cache


def apart(params: Any) -> Any:
    """Parameters with each layer's as arrays of their own: XLA for CPUs copies a slice of a stack before it reads it.

    Args:
        params: the policy's parameters.

    Returns:
        Parameters for `Policy` with the caches of the layers (`Cache.apart`).
    """
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    return params | {"layers": [jax.tree.map(lambda x: x[i], params["layers"]) for i in range(count)]}  # noqa: B023


# Logical axes of each parameter; `sharding.RULES` maps them to mesh axes.
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


@cache
def parameter_shapes(config: PolicyConfig):
    """Shapes and dtypes of the parameters as a tree, without allocation; not to be changed."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def init_params(config: PolicyConfig, key: jax.Array):
    """Initialise parameters.

    Args:
        config: shape of the policy.
        key: random key.

    Returns:
        The tree of parameters.
    """
    tokens = jnp.zeros((1, 2), jnp.int32)
    return Policy(config).init(key, tokens, tokens, jnp.ones((1, 2, 2), bool))["params"]
