"""Mini-batches of packed rows from a rollout."""

from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh

from proxmo_jax.agent.rollout import Rollout
from proxmo_jax.agent.settings import Config
from proxmo_jax.policy.sharding import split, split_by_host
from proxmo_jax.training.rows import Rows, gather_rows, pack_turns


def batches(
    config: Config,
    mesh: Mesh,
    rollout: Rollout,
    trained: np.ndarray,
    advantage: jax.Array | np.ndarray,
    rng: np.random.Generator,
    skip: int = 0,
) -> Iterator[Rows]:
    """Shuffled mini-batches of packed rows from a rollout.

    There are as few as possible, equally full, and of one shape: empty rows, which change nothing, fill them up. Turns
    that are not trained on are left out of all counts; if none is left there is no mini-batch.

    Args:
        config: the run's settings.
        mesh: devices over which the rows are split.
        rollout: what was played; its buffer is read.
        trained: bool [E, T], the turns that are trained on (`trained_turns`).
        advantage: float32 [E, T].
        rng: for the order of the turns.
        skip: mini-batches left out at the beginning.

    Yields:
        `Rows` of `rows_per_batch` rows.
    """
    lengths = (rollout.prompt_lengths + rollout.response_lengths).reshape(-1)
    answers = rollout.response_lengths.reshape(-1)
    room = response_room(config)
    order = rng.permutation(np.flatnonzero(trained))
    if len(order) == 0:
        return
    turns, offsets = pack_turns(lengths, answers, order, row_length=config.optimizer.row_length, row_answers=room)
    size = config.optimizer.rows_per_batch
    assert rollout.buffer is not None
    by_host = split_by_host(rollout.buffer.mask)
    for chosen in np.array_split(np.arange(len(turns)), -(-len(turns) // size))[skip:]:
        short = ((0, size - len(chosen)), (0, 0))
        part = np.pad(turns[chosen], short, constant_values=-1), np.pad(offsets[chosen], short)
        rows = gather_rows(
            rollout.buffer, rollout.prompt_lengths, rollout.response_lengths, advantage,
            *(part if by_host else split(mesh, part)), row_answers=room,
        )  # fmt: skip
        yield split(mesh, rows) if by_host else rows


def trained_turns(config: Config, rollout: Rollout, advantage: jax.Array) -> np.ndarray:
    """Turns in the update.

    Args:
        config: the run's settings; with `rollout.overlong="mask"` turns whose response was cut off are left out, with
            `optimizer.skip_zero_advantages` those without an advantage.
        rollout: of all hosts.
        advantage: float32 [E, T].

    Returns:
        bool [E, T].
    """
    trained = rollout.prompt_lengths + rollout.response_lengths > 0
    if config.rollout.overlong == "mask":
        trained &= ~rollout.overlong
    if config.optimizer.skip_zero_advantages:
        trained &= process_allgather(advantage, tiled=True) != 0
    return trained


def response_room(config: Config) -> int:
    """Response tokens that a row can hold: a share of its tokens, and at least a whole turn's."""
    return max(round(config.optimizer.row_length * config.optimizer.response_share), config.rollout.max_response_length)
