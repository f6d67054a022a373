"""The rollout buffer: a rectangle `[episode, turn]` that lives on the device and is written in place, turn by turn.

Episodes are group-major, so `[G * M, T]` is `[G, M, T]` without moving anything.
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
    """Everything a rollout leaves behind. `G` groups, `E` episodes, `T` turns, `P` prompt and `R` response tokens.

    prompts int32 [E, T, P] left-padded; responses int32 [E, T, R]; log_probs float32 [E, T, R] at rollout;
    reward float32 [E, T]; action_valid, mask bool [E, T]; anchor int32 [E, T], which of its group's `U` distinct
    observations the turn saw; word_ids int32, word_counts float32 [G, U, K], the words of those (`K` at most).
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
        """No turn yet. There is room for every turn of a group to see something new; `grow` makes more."""
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
    """The same memory with no turn in it."""
    return jax.tree.map(jnp.zeros_like, buffer)


def grow(buffer: Buffer, texts: int, words: int) -> Buffer:
    """The buffer with room for so many distinct observations a group and words each; itself if it has that.

    Room is made in powers of two, so that programs are compiled anew only a few times.
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
    """Write turn `turn` of `episodes` [B] in place. Episode ids past the end (batch padding) are dropped.

    Prompts may be narrower than the buffer's: they are right-aligned, as they are left-padded. Word counts [B, K] go
    where the row's anchor says; rows that saw the same write the same.
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
    """Take the turns of `episodes` [B] out of the mask: they change nothing any more. Ids past the end are dropped."""
    return dataclasses.replace(buffer, mask=buffer.mask.at[episodes].set(False, mode="drop"))
