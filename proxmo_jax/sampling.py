"""Sampling answers: one prefill of left-padded prompts, then decoding with a KV cache until every row has stopped."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from proxmo_jax.policy import Cache, Policy, PolicyConfig


class Samples(NamedTuple):
    """tokens int32 [B, R] (pad after the end), log_probs float32 [B, R] (0 after it), lengths int32 [B].

    `lengths` counts the sampled tokens, the stop token included.
    """

    tokens: jax.Array
    log_probs: jax.Array
    lengths: jax.Array


@partial(jax.jit, static_argnames=("config", "max_tokens", "stop_id", "pad_id"))
def sample(
    params,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    *,
    config: PolicyConfig,
    max_tokens: int,
    stop_id: int,
    pad_id: int,
) -> Samples:
    """Sample up to `max_tokens` per row at `temperature` (0: greedy). prompts int32 [B, P], left-padded.

    Log-probs are those of the distribution sampled from (of the untempered policy when greedy), so they serve as
    the old log-probs of a policy update at the same temperature. Rows of length 0 (batch padding) stop at once.
    Compiled once per (B, P).
    """
    model = Policy(config)
    batch, width = prompts.shape
    total = width + max_tokens
    start = width - prompt_lengths  # first real slot of each row
    slots = jnp.arange(total)
    real = slots[None, :] >= start[:, None]  # [B, S]
    scale = jnp.where(temperature > 0, temperature, 1.0)

    def draw(logits, key):
        log_probs = jax.nn.log_softmax(logits / scale)
        token = jnp.where(temperature > 0, jax.random.categorical(key, log_probs), jnp.argmax(logits, -1))
        return token.astype(jnp.int32), jnp.take_along_axis(log_probs, token[:, None], 1)[:, 0]

    positions = jnp.maximum(slots[None, :width] - start[:, None], 0)
    mask = real[:, None, :] & (slots[None, None, :] <= slots[None, :width, None])
    cache: Any = Cache.empty(config, batch, total)
    last = jnp.full((batch, 1), width - 1)
    logits, cache = model.apply({"params": params}, prompts, positions, mask, cache, 0, last)
    key, first = jax.random.split(key)
    token, log_prob = draw(logits[:, -1], first)
    tokens = jnp.full((batch, max_tokens), pad_id, jnp.int32)
    log_probs = jnp.zeros((batch, max_tokens), jnp.float32)
    running = prompt_lengths > 0

    def going(state):
        step, _, running, *_ = state
        return (step < max_tokens) & running.any()

    def decode(state):
        step, (token, log_prob), running, tokens, log_probs, lengths, cache, key = state
        tokens = tokens.at[:, step].set(jnp.where(running, token, pad_id))
        log_probs = log_probs.at[:, step].set(jnp.where(running, log_prob, 0.0))
        lengths = lengths + running
        running = running & (token != stop_id)
        at = width + step
        mask = (real & (slots <= at))[:, None, :]
        logits, cache = model.apply({"params": params}, token[:, None], (at - start)[:, None], mask, cache, at)
        key, use = jax.random.split(key)
        return step + 1, draw(logits[:, 0], use), running, tokens, log_probs, lengths, cache, key

    state = (0, (token, log_prob), running, tokens, log_probs, jnp.zeros(batch, jnp.int32), cache, key)
    _, _, _, tokens, log_probs, lengths, _, _ = jax.lax.while_loop(going, decode, state)
    return Samples(tokens, log_probs, lengths)
