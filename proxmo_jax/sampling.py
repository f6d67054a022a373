"""Sampling answers: one prefill of left-padded prompts, then decoding with a KV cache until every row has stopped."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from proxmo_jax.policy import Cache, Policy, PolicyConfig


class Samples(NamedTuple):
    """tokens int32 [B, R] (pad after the end), log_probs float32 [B, R] (0 after it), lengths int32 [B].

    `lengths` counts the sampled tokens, the stop token included.
    """

    tokens: jax.Array
    log_probs: jax.Array
    lengths: jax.Array


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn and where they end. A program is compiled for each.

    max_tokens   the longest answer
    stop_ids     tokens that end one, themselves included
    pad_id       what stands after the end
    top_k        only the so many likeliest tokens may be drawn; 0: all
    top_p        only the likeliest tokens that together have this probability may be drawn; 1: all
    greedy       no random numbers are made; for temperature 0
    """

    max_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int = 0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False


def stop_table(texts: Sequence[str], strings: Sequence[str]) -> np.ndarray:
    """The automaton that finds any of `strings` in a text said token by token: int16 [states, V].

    texts: what each token id says. State 0 is the start, the last state is reached when a string has been said, and is
    never left; `table[state, token]` is the next state. (Aho and Corasick's automaton, run over each token's
    characters.) Raises ValueError for no string, or an empty one.
    """
    if not strings or not all(strings):
        raise ValueError("stop strings: need at least one, none of them empty")
    alphabet = {c: i + 1 for i, c in enumerate(sorted(set("".join(strings))))}  # 0: any other character
    prefixes = sorted({s[:n] for s in strings for n in range(len(s))}, key=lambda p: (len(p), p))
    state = {prefix: i for i, prefix in enumerate(prefixes)}
    end = len(prefixes)
    step = np.zeros((end + 1, len(alphabet) + 1), np.int16)
    step[end] = end
    for prefix, i in state.items():
        for c, j in alphabet.items():
            said = prefix + c
            if any(said.endswith(s) for s in strings):
                step[i, j] = end
            else:
                step[i, j] = next(state[said[n:]] for n in range(len(said) + 1) if said[n:] in state)
    longest = max(map(len, texts), default=0)
    codes = np.full((len(texts), longest), -1, np.int16)
    for row, text in zip(codes, texts, strict=True):
        row[: len(text)] = [alphabet.get(c, 0) for c in text]
    table = np.repeat(np.arange(end + 1, dtype=np.int16)[:, None], len(texts), 1)
    for column in codes.T:
        table = np.where(column >= 0, step[table, np.maximum(column, 0)], table)
    return table


def draw(
    logits: jax.Array, key: jax.Array, temperature: jax.Array, decoding: Decoding
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(token, log-prob) [B] from logits [B, V]; the likeliest token at temperature 0.

    Log-probs are of the policy at this temperature (untempered when greedy) before `top_k` and `top_p` cut it, which is
    what the learner computes.
    """
    log_probs = jax.nn.log_softmax(logits / jnp.where(temperature > 0, temperature, 1.0))
    allowed = log_probs
    if decoding.top_k or decoding.top_p < 1.0:
        ordered = jnp.sort(log_probs, axis=-1, descending=True)
        least = ordered[:, -1:]
        if decoding.top_k:
            least = jnp.maximum(least, ordered[:, min(decoding.top_k, logits.shape[-1]) - 1, None])
        if decoding.top_p < 1.0:
            before = jnp.cumsum(jnp.exp(ordered), axis=-1) - jnp.exp(ordered)
            count = jnp.maximum((before < decoding.top_p).sum(-1, keepdims=True), 1)
            least = jnp.maximum(least, jnp.take_along_axis(ordered, count - 1, -1))
        allowed = jnp.where(log_probs >= least, log_probs, -jnp.inf)
    token = jnp.argmax(logits, -1)
    if not decoding.greedy:  # a `cond` on the temperature would cost sampling a third of its speed on a CPU
        token = jnp.where(temperature > 0, jax.random.categorical(key, allowed), token)
    token = token.astype(jnp.int32)
    return token, jnp.take_along_axis(log_probs, token[:, None], 1)[:, 0]


def stops(token: jax.Array, decoding: Decoding) -> jax.Array:
    """Which tokens [B] end an answer."""
    return (
        jnp.isin(token, jnp.array(decoding.stop_ids, jnp.int32)) if decoding.stop_ids else jnp.zeros_like(token, bool)
    )


@partial(jax.jit, static_argnames=("config", "decoding"))
def sample(
    params,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    table: jax.Array | None = None,
    *,
    config: PolicyConfig,
    decoding: Decoding,
) -> Samples:
    """Sample an answer per row at `temperature` (0: greedy). prompts int32 [B, P], left-padded.

    Log-probs as in `draw`, so they serve as the old log-probs of a policy update at the same temperature. `table`: a
    `stop_table` whose strings end an answer, too. Rows of length 0 (batch padding) stop at once. Compiled once per
    (B, P).
    """
    model = Policy(config)
    batch, width = prompts.shape
    max_tokens = decoding.max_tokens
    total = width + max_tokens
    start = width - prompt_lengths  # first real slot of each row
    slots = jnp.arange(total)
    real = slots[None, :] >= start[:, None]  # [B, S]

    positions = jnp.maximum(slots[None, :width] - start[:, None], 0)
    mask = real[:, None, :] & (slots[None, None, :] <= slots[None, :width, None])
    cache: Any = Cache.empty(config, batch, total)
    last = jnp.full((batch, 1), width - 1)
    logits, cache = model.apply({"params": params}, prompts, positions, mask, cache, 0, last)
    key, first = jax.random.split(key)
    token, log_prob = draw(logits[:, -1], first, temperature, decoding)
    tokens = jnp.full((batch, max_tokens), decoding.pad_id, jnp.int32)
    log_probs = jnp.zeros((batch, max_tokens), jnp.float32)
    running = prompt_lengths > 0
    said = jnp.zeros(batch, jnp.int16)  # the stop strings' automaton

    def going(state):
        step, _, running, *_ = state
        return (step < max_tokens) & running.any()

    def decode(state):
        step, (token, log_prob), running, said, tokens, log_probs, lengths, cache, key = state
        tokens = tokens.at[:, step].set(jnp.where(running, token, decoding.pad_id))
        log_probs = log_probs.at[:, step].set(jnp.where(running, log_prob, 0.0))
        lengths = lengths + running
        running = running & ~stops(token, decoding)
        if table is not None:
            said = table[said, token]
            running = running & (said < table.shape[0] - 1)
        at = width + step
        mask = (real & (slots <= at))[:, None, :]
        logits, cache = model.apply({"params": params}, token[:, None], (at - start)[:, None], mask, cache, at)
        key, use = jax.random.split(key)
        drawn = draw(logits[:, 0], use, temperature, decoding)
        return step + 1, drawn, running, said, tokens, log_probs, lengths, cache, key

    lengths = jnp.zeros(batch, jnp.int32)
    state = (0, (token, log_prob), running, said, tokens, log_probs, lengths, cache, key)
    _, _, _, _, tokens, log_probs, lengths, _, _ = jax.lax.while_loop(going, decode, state)
    return Samples(tokens, log_probs, lengths)
