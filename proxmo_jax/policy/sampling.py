"""Sampling answers: prefill of left-padded prompts and decoding with a KV cache; rows that stop are given out again."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from proxmo_jax.errors import UserError


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
    characters.) Raises UserError for no string, or an empty one.
    """
    if not strings or not all(strings):
        raise UserError("stop strings: need at least one, none of them empty")
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
    logits: jax.Array, keys: jax.Array, temperature: jax.Array, decoding: Decoding
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(token, log-prob) [B] from logits [B, V] with a key for each row; the likeliest token at temperature 0.

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
        token = jnp.where(temperature > 0, jax.vmap(jax.random.categorical)(keys, allowed), token)
    token = token.astype(jnp.int32)
    return token, jnp.take_along_axis(log_probs, token[:, None], 1)[:, 0]


def stops(token: jax.Array, decoding: Decoding) -> jax.Array:
    """Which tokens [B] end an answer."""
    return (
        jnp.isin(token, jnp.array(decoding.stop_ids, jnp.int32)) if decoding.stop_ids else jnp.zeros_like(token, bool)
    )
