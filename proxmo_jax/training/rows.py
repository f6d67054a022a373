"""Sequence packing: turns of different lengths share the rows that the policy is trained on.

Turns of a row are kept apart by segment ids: no compute on padding, and one compiled shape for warm start and
reinforcement learning."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxmo_jax.estimator.types import pytree
from proxmo_jax.training.buffers import Buffer


@pytree
@dataclass(frozen=True)
class Rows:
    """Token rows `[B, L]` and the `A` response tokens in each that are learned from.

    tokens, positions, segments int32 [B, L]; segment 0 is padding. places int32 [B, A]: where in its row the token
    before a response token stands; targets int32 [B, A] the response token; mask bool [B, A]; advantage, old,
    reference float32 [B, A], of the response token; turn_tokens int32 [B, A]: response tokens of its turn.
    Logits are computed at `places` alone: responses are a tenth of the tokens, and the vocabulary is the widest layer
    of a small policy.
    """

    tokens: Any
    positions: Any
    segments: Any
    places: Any
    targets: Any
    mask: Any
    advantage: Any
    old: Any
    reference: Any
    turn_tokens: Any


def pack_turns(
    lengths: np.ndarray, answers: np.ndarray, order: np.ndarray, *, row_length: int, row_answers: int
) -> tuple[np.ndarray, np.ndarray]:
    """First-fit packing of turns into rows, on the host.

    lengths, answers [N]: tokens per turn and how many of them are the response, taken in `order`; a row holds
    `row_length` tokens, `row_answers` of them in responses. Returns (turn, offset) int32 [rows, row_length]: which
    turn and which of its tokens stands at each place; turn -1 is padding. Raises ValueError for a turn longer than
    a row.
    """
    for what, found, limit in (("tokens", lengths, row_length), ("response tokens", answers, row_answers)):
        if len(found) and int(found.max()) > limit:
            raise ValueError(f"a turn has {int(found.max())} {what}, need at most {limit} (what a row holds)")
    room: list[int] = []
    left: list[int] = []
    first_open = 0
    places: list[tuple[int, int, int]] = []
    shortest = int(lengths.min()) if len(lengths) else 0
    for turn in order.tolist():
        length, answer = int(lengths[turn]), int(answers[turn])
        for row in range(first_open, len(room)):
            if room[row] >= length and left[row] >= answer:
                break
        else:
            row = len(room)
            room.append(row_length)
            left.append(row_answers)
        places.append((turn, row, row_length - room[row]))
        room[row] -= length
        left[row] -= answer
        while first_open < len(room) and room[first_open] < shortest:
            first_open += 1
    turns = np.full((len(room), row_length), -1, np.int32)
    offsets = np.zeros((len(room), row_length), np.int32)
    for turn, row, start in places:
        length = int(lengths[turn])
        turns[row, start : start + length] = turn
        offsets[row, start : start + length] = np.arange(length)
    return turns, offsets


@partial(jax.jit, static_argnames="row_answers")
def gather_rows(
    buffer: Buffer,
    prompt_lengths: jax.Array,
    response_lengths: jax.Array,
    advantage: jax.Array,
    turns: jax.Array,
    offsets: jax.Array,
    *,
    row_answers: int,
) -> Rows:
    """Build token rows on the device from the buffer. prompt_lengths, response_lengths int32 [E, T],
    advantage [E, T].

    turns index the flattened `[E * T]`, as `pack_turns` gives them, packed for the same `row_answers`.
    """
    width = buffer.prompts.shape[-1]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), buffer)
    prompt = prompt_lengths.reshape(-1)
    turn = jnp.maximum(turns, 0)
    real = turns >= 0
    answer = offsets - prompt[turn]
    read = flat.prompts[turn, jnp.clip(width + answer, 0, width - 1)]
    written = flat.responses[turn, jnp.clip(answer, 0, flat.responses.shape[-1] - 1)]

    # The next place in the row holds this turn's next token, unless the turn ends here.
    follows = jnp.pad(turns[:, 1:] == turns[:, :-1], ((0, 0), (0, 1))) & real
    before_answer = follows & (answer >= -1)
    places = jnp.argsort(~before_answer, axis=1, stable=True)[:, :row_answers]
    mask = jnp.take_along_axis(before_answer, places, 1)
    target = (
        jnp.take_along_axis(turn, places, 1),
        jnp.clip(jnp.take_along_axis(answer, places, 1) + 1, 0, flat.responses.shape[-1] - 1),
    )
    boundary = jnp.pad(turns[:, 1:] != turns[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return Rows(
        tokens=jnp.where(real, jnp.where(answer < 0, read, written), 0),
        positions=offsets,
        segments=jnp.where(real, jnp.cumsum(boundary, axis=1), 0),
        places=places,
        targets=jnp.where(mask, flat.responses[target], 0),
        mask=mask,
        advantage=jnp.where(mask, advantage.reshape(-1)[target[0]], 0.0),
        old=jnp.where(mask, flat.log_probs[target], 0.0),
        reference=jnp.zeros(places.shape, jnp.float32),
        turn_tokens=jnp.where(mask, response_lengths.reshape(-1)[target[0]], 0),
    )
