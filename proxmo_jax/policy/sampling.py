"""Drawing tokens from logits, and detecting the end of a response: stop tokens and stop strings."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from proxmo_jax.errors import UserError


@dataclass(frozen=True)
class Decoding:
    """How responses are sampled and where they end. Each instance compiles a new program."""

    max_tokens: int
    """Tokens of a response, at most."""
    stop_ids: tuple[int, ...]
    """Tokens that end a response and belong to it."""
    pad_id: int = 0
    """Padding after the end."""
    top_k: int = 0
    """Sample from this many most likely tokens only; 0: all."""
    top_p: float = 1.0
    """Sample from the most likely tokens up to this total probability only (nucleus sampling); 1: all."""
    greedy: bool = False
    """Make no random numbers; for temperature 0."""


def stop_table(texts: Sequence[str], strings: Sequence[str]) -> np.ndarray:
    """Build the automaton that finds any of the stop strings in a text read token by token (Aho and Corasick, 1975).

    Args:
        texts: text of each token id, V strings.
        strings: stop strings.

    Returns:
        int16 [states, V]: `table[state, token]` is the next state. State 0 is the start; the last state means that a
        stop string was found, and is never left.

    Raises:
        UserError: for no string, or an empty one.
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
            text = prefix + c
            if any(text.endswith(s) for s in strings):
                step[i, j] = end
            else:
                step[i, j] = next(state[text[n:]] for n in range(len(text) + 1) if text[n:] in state)
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
    """Sample a token for each row; at temperature 0 the most likely one.

    Args:
        logits: float32 [B, V].
        keys: random keys [B].
        temperature: float32 [].
        decoding: top_k, top_p and greedy are used.

    Returns:
        Tokens int32 [B], and their log-probs float32 [B] under the policy at this temperature (1 at temperature 0)
        before `top_k` and `top_p` are applied, as the trainer computes them.
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
    if not decoding.greedy:  # static: a `cond` on the temperature slows sampling by a third on a CPU
        token = jnp.where(temperature > 0, jax.vmap(jax.random.categorical)(keys, allowed), token)
    token = token.astype(jnp.int32)
    return token, jnp.take_along_axis(log_probs, token[:, None], 1)[:, 0]


def stops(token: jax.Array, decoding: Decoding) -> jax.Array:
    """Whether a token ends its response.

    Args:
        token: int32 [B].
        decoding: stop_ids is used.

    Returns:
        bool [B].
    """
    return (
        jnp.isin(token, jnp.array(decoding.stop_ids, jnp.int32)) if decoding.stop_ids else jnp.zeros_like(token, bool)
    )
