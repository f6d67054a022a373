"""The rollout buffer `[episode, turn]` on the device, updated in place (donated) turn by turn.

Episodes are group-major, so `[G * M, T]` reshapes to `[G, M, T]` without a copy.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from proxmo_jax.estimator.types import pytree
from proxmo_jax.estimator.words import bucket


@pytree
@dataclass(frozen=True)
class Buffer:
    """A rollout: `G` groups, `E` episodes, `T` turns, `P` prompt tokens, `R` response tokens.

    Attributes:
        prompts: int32 [E, T, P], left-padded.
        responses: int32 [E, T, R].
        log_probs: float32 [E, T, R], of the response tokens at rollout.
        reward: float32 [E, T].
        action_valid: bool [E, T].
        mask: bool [E, T], turns that happened.
        anchor: int32 [E, T], index of the turn's observation among the `U` distinct ones of its group.
        word_ids: int32 [G, U, K], words of the distinct observations, at most `K` each.
        word_counts: float32 [G, U, K], their counts.
    """

    prompts: jax.Array
    responses: jax.Array
    log_probs: jax.Array
    reward: jax.Array
    action_valid: jax.Array
    mask: jax.Array
    anchor: jax.Array
    word_ids: jax.Array
    word_counts: jax.Array

    @classmethod
    def empty(cls, groups: int, members: int, turns: int, *, prompt: int, response: int, words: int) -> "Buffer":
        """A buffer without turns, with room for a distinct observation in every turn (`grow` enlarges it).

        Args:
            groups: G.
            members: M, episodes of each group.
            turns: T.
            prompt: P.
            response: R.
            words: K.

        Returns:
            The buffer.
        """
        shape, texts = (groups * members, turns), (groups, members * turns, words)
        return cls(
            prompts=jnp.zeros((*shape, prompt), jnp.int32),
            responses=jnp.zeros((*shape, response), jnp.int32),
            log_probs=jnp.zeros((*shape, response), jnp.float32),
            reward=jnp.zeros(shape, jnp.float32),
            action_valid=jnp.zeros(shape, bool),
            mask=jnp.zeros(shape, bool),
            anchor=jnp.zeros(shape, jnp.int32),
            word_ids=jnp.zeros(texts, jnp.int32),
            word_counts=jnp.zeros(texts, jnp.float32),
        )


@partial(jax.jit, donate_argnums=0)
def clear(buffer: Buffer) -> Buffer:
    """The buffer without turns, in the same memory."""
    return jax.tree.map(jnp.zeros_like, buffer)


def grow(buffer: Buffer, texts: int, words: int) -> Buffer:
    """Enlarge the buffer to at least `texts` distinct observations per group and `words` words each.

    Sizes are powers of two, so that few programs are compiled.

    Args:
        buffer: the buffer.
        texts: distinct observations of a group.
        words: distinct words of an observation.

    Returns:
        The enlarged buffer with the same sharding; the buffer itself if it is large enough.
    """
    _, had_texts, had_words = buffer.word_ids.shape
    more_texts = bucket(texts) - had_texts if texts > had_texts else 0
    more_words = bucket(words) - had_words if words > had_words else 0
    if not more_texts and not more_words:
        return buffer
    padding = ((0, 0), (0, more_texts), (0, more_words))
    word_ids, word_counts = (
        jax.device_put(jnp.pad(x, padding), x.sharding) for x in (buffer.word_ids, buffer.word_counts)
    )
    return dataclasses.replace(buffer, word_ids=word_ids, word_counts=word_counts)


@partial(jax.jit, donate_argnums=0)
def write(buffer: Buffer, episodes: jax.Array, turn: jax.Array, rows: dict[str, jax.Array]) -> Buffer:
    """Write one turn of some episodes in place.

    Args:
        buffer: donated.
        episodes: int32 [B]; ids out of range (batch padding) are dropped.
        turn: int32 [], the turn.
        rows: new values [B, ...] of fields of the buffer by name. Prompts may be narrower than the buffer's and are
            right-aligned. Word counts [B, K] are written at the anchor of their row; rows with the same observation
            write the same values.

    Returns:
        The buffer.
    """
    fields = dict(buffer.__dict__)
    group = episodes // (buffer.mask.shape[0] // buffer.word_ids.shape[0])
    for name, values in rows.items():
        field = fields[name]
        if name == "prompts":
            fields[name] = field.at[episodes, turn, -values.shape[-1] :].set(values, mode="drop")
        elif name in ("word_ids", "word_counts"):
            fields[name] = field.at[group, rows["anchor"]].set(values, mode="drop")
        else:
            fields[name] = field.at[episodes, turn].set(values, mode="drop")
    return Buffer(**fields)


@partial(jax.jit, donate_argnums=0)
def forget(buffer: Buffer, episodes: jax.Array) -> Buffer:
    """Remove episodes from the mask, so that they change no result.

    Args:
        buffer: donated.
        episodes: int32 [B]; ids out of range are dropped.

    Returns:
        The buffer.
    """
    return dataclasses.replace(buffer, mask=buffer.mask.at[episodes].set(False, mode="drop"))
