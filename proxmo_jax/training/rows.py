"""Sequence packing: several turns share a token row, separated by segment ids.

No compute is spent on padding, and warm start and reinforcement learning share one compiled shape.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from proxmo_jax.estimator.types import pytree
from proxmo_jax.training.buffers import Buffer


@pytree
@dataclass(frozen=True)
class Rows:
    """Token rows `[B, L]` with at most `A` response tokens each, on which the policy is trained.

    Logits are computed at `places` only: responses are a tenth of the tokens, and the vocabulary is the widest layer
    of a small policy.

    Attributes:
        tokens: int32 [B, L].
        positions: int32 [B, L], position within the turn.
        segments: int32 [B, L], turn within the row; 0 is padding.
        places: int32 [B, A], index in the row of the token before each response token.
        targets: int32 [B, A], response tokens.
        mask: bool [B, A].
        advantage: float32 [B, A].
        old_log_probs: float32 [B, A], log-probs at rollout.
        reference: float32 [B, A], log-probs of the reference policy.
        turn_tokens: int32 [B, A], response tokens of the token's turn.
    """

    tokens: jax.Array
    positions: jax.Array
    segments: jax.Array
    places: jax.Array
    targets: jax.Array
    mask: jax.Array
    advantage: jax.Array
    old_log_probs: jax.Array
    reference: jax.Array
    turn_tokens: jax.Array


def pack_turns(
    lengths: np.ndarray, answers: np.ndarray, order: np.ndarray, *, row_length: int, row_answers: int
) -> tuple[np.ndarray, np.ndarray]:
    """First-fit packing of turns into rows, on the host.

    Args:
        lengths: int [N], tokens of each turn.
        answers: int [N], response tokens of each turn.
        order: int [K], the turns to pack, in this order.
        row_length: tokens of a row.
        row_answers: response tokens of a row, at most.

    Returns:
        turn, offset: int32 [rows, row_length], the turn of each token and its position there; turn -1 is padding.

    Raises:
        ValueError: for a turn longer than a row.
    """
    for what, found, limit in (("tokens", lengths, row_length), ("response tokens", answers, row_answers)):
        if len(found) and int(found.max()) > limit:
            raise ValueError(f"a turn has {int(found.max())} {what}, need at most {limit} (what a row holds)")
    free: list[int] = []
    free_answers: list[int] = []
    first_open = 0
    places: list[tuple[int, int, int]] = []
    shortest = int(lengths[order].min()) if len(order) else 0
    for turn in order.tolist():
        length, answer = int(lengths[turn]), int(answers[turn])
        for row in range(first_open, len(free)):
            if free[row] >= length and free_answers[row] >= answer:
                break
        else:
            row = len(free)
            free.append(row_length)
            free_answers.append(row_answers)
        places.append((turn, row, row_length - free[row]))
        free[row] -= length
        free_answers[row] -= answer
        while first_open < len(free) and free[first_open] < shortest:
            first_open += 1
    turns = np.full((len(free), row_length), -1, np.int32)
    offsets = np.zeros((len(free), row_length), np.int32)
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
    """Gather token rows from the buffer, on the device.

    Args:
        buffer: the rollout [E, T].
        prompt_lengths: int32 [E, T].
        response_lengths: int32 [E, T].
        advantage: float32 [E, T].
        turns: int32 [B, L], from `pack_turns`; indices into `[E * T]`.
        offsets: int32 [B, L], from `pack_turns`.
        row_answers: as in `pack_turns`.

    Returns:
        The rows, with `reference` 0.
    """
    width = buffer.prompts.shape[-1]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), buffer)
    prompt = prompt_lengths.reshape(-1)
    turn = jnp.maximum(turns, 0)
    real = turns >= 0
    at = offsets - prompt[turn]  # position in the response; negative in the prompt
    from_prompt = flat.prompts[turn, jnp.clip(width + at, 0, width - 1)]
    from_response = flat.responses[turn, jnp.clip(at, 0, flat.responses.shape[-1] - 1)]

    # Whether the next token of the row belongs to the same turn.
    follows = jnp.pad(turns[:, 1:] == turns[:, :-1], ((0, 0), (0, 1))) & real
    before_response = follows & (at >= -1)
    places = jnp.argsort(~before_response, axis=1, stable=True)[:, :row_answers]
    mask = jnp.take_along_axis(before_response, places, 1)
    target = (
        jnp.take_along_axis(turn, places, 1),
        jnp.clip(jnp.take_along_axis(at, places, 1) + 1, 0, flat.responses.shape[-1] - 1),
    )
    boundary = jnp.pad(turns[:, 1:] != turns[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return Rows(
        tokens=jnp.where(real, jnp.where(at < 0, from_prompt, from_response), 0),
        positions=offsets,
        segments=jnp.where(real, jnp.cumsum(boundary, axis=1), 0),
        places=places,
        targets=jnp.where(mask, flat.responses[target], 0),
        mask=mask,
        advantage=jnp.where(mask, advantage.reshape(-1)[target[0]], 0.0),
        old_log_probs=jnp.where(mask, flat.log_probs[target], 0.0),
        reference=jnp.zeros(places.shape, jnp.float32),
        turn_tokens=jnp.where(mask, response_lengths.reshape(-1)[target[0]], 0),
    )
