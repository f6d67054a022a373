"""Responses that reach the length limit: which of them did not end, and DAPO's penalty on long ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from proxmo_jax.policy.sampling import Decoding, stops


@partial(jax.jit, static_argnames="decoding")
def unended(tokens: jax.Array, lengths: jax.Array, stop_table: jax.Array | None, *, decoding: Decoding) -> jax.Array:
    """Which responses were cut off: they have all tokens that they may, without a stop token or stop string.

    Args:
        tokens: int32 [N, R], sampled responses.
        lengths: int32 [N].
        stop_table: int16 [states, V] of the stop strings, or None.
        decoding: what they were sampled with.

    Returns:
        bool [N].
    """
    ended = stops(tokens[:, -1], decoding)
    if stop_table is not None:
        table = stop_table
        start = jnp.zeros_like(lengths, stop_table.dtype)
        matched, _ = jax.lax.scan(lambda state, token: (table[state, token], None), start, tokens.T)
        ended = ended | (matched == stop_table.shape[0] - 1)
    return (lengths == decoding.max_tokens) & ~ended


def length_penalty(lengths: np.ndarray, *, limit: int, buffer: int, factor: float) -> np.ndarray:
    """DAPO's soft overlong punishment (arXiv 2503.14476, section 3.4), as an amount to subtract from the reward.

    0 up to `limit - buffer` tokens, then in proportion to the tokens past that, up to `factor` at the limit.

    Args:
        lengths: int [...], tokens of responses.
        limit: tokens of the longest response.
        buffer: tokens before the limit in which the penalty grows, at least 1.
        factor: the penalty at the limit.

    Returns:
        float32 [...].
    """
    return (factor * np.clip((lengths - (limit - buffer)) / buffer, 0.0, 1.0)).astype(np.float32)
