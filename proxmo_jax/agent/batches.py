"""Mini-batches of packed rows from a rollout."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh

from proxmo_jax.agent.rollout import Rollout
from proxmo_jax.agent.settings import Config
from proxmo_jax.policy.sharding import split, split_by_host
from proxmo_jax.training.buffers import Buffer
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


def trained_turns(config: Config, rollout: Rollout, advantage: jax.Array | np.ndarray) -> np.ndarray:
    """Turns in the update.

    Args:
        config: the run's settings; with `rollout.overlong="mask"` turns whose response was cut off are left out, with
            `optimizer.skip_zero_advantages` those without an advantage, with `optimizer.skip_gradient_share` those with
            the smallest gradients.
        rollout: of all hosts.
        advantage: float32 [E, T].

    Returns:
        bool [E, T].
    """
    trained = rollout.prompt_lengths + rollout.response_lengths > 0
    if config.rollout.overlong == "mask":
        trained &= ~rollout.overlong
    if config.optimizer.skip_zero_advantages:
        trained &= whole(advantage) != 0
    if config.optimizer.skip_gradient_share:
        assert rollout.buffer is not None
        sizes = process_allgather(gradient_sizes(rollout.buffer, rollout.response_lengths, advantage), tiled=True)
        trained &= ~smallest(np.where(trained, sizes, 0), config.optimizer.skip_gradient_share)
    return trained


def whole(advantage: jax.Array | np.ndarray) -> np.ndarray:
    """Advantages on this host; those that are there already are all hosts' own."""
    return advantage if isinstance(advantage, np.ndarray) else process_allgather(advantage, tiled=True)


def summed(rollout: Rollout, advantage: jax.Array) -> np.ndarray:
    """Advantages with those of equal turns, of one prompt and response, summed at one of them and 0 at the others.

    Equal turns have the same log-probs, hence the same ratio to the old ones, so that the sum has their gradient as
    long as none of them is clipped, up to the number of turns and tokens by which a loss is averaged
    (`losses.token_weights`): those left out are not counted. Where advantages of both signs cancel, nothing is left to
    train.

    Args:
        rollout: of all hosts.
        advantage: float32 [E, T].

    Returns:
        float32 [E, T].
    """
    assert rollout.buffer is not None
    lengths = rollout.prompt_lengths, rollout.response_lengths
    marks = process_allgather(fingerprints(rollout.buffer.prompts, rollout.buffer.responses, *lengths), tiled=True)
    turns = np.flatnonzero(rollout.prompt_lengths)
    keys = np.stack([*(x.reshape(-1)[turns] for x in lengths), *marks.reshape(-1, 2)[turns].T.astype(np.int64)], axis=1)
    _, first, number = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    sums = np.zeros(len(first))
    np.add.at(sums, number.reshape(-1), whole(advantage).reshape(-1)[turns])
    found = np.zeros(rollout.prompt_lengths.size, np.float32)
    found[turns[first]] = sums
    return found.reshape(rollout.prompt_lengths.shape)


@jax.jit
def fingerprints(
    prompts: jax.Array, responses: jax.Array, prompt_lengths: jax.Array, response_lengths: jax.Array
) -> jax.Array:
    """Two numbers of each turn's tokens, equal for equal ones; those of others agree by chance, once in 2^64 pairs.

    Args:
        prompts: int32 [E, T, P], left-padded.
        responses: int32 [E, T, R].
        prompt_lengths: int32 [E, T].
        response_lengths: int32 [E, T].

    Returns:
        uint32 [E, T, 2].
    """
    width, room = prompts.shape[-1], responses.shape[-1]
    inside = jnp.arange(width) >= width - prompt_lengths[..., None], jnp.arange(room) < response_lengths[..., None]
    tokens = jnp.where(
        jnp.concatenate(inside, -1), 1 + jnp.concatenate([prompts, responses], -1), 0
    ).astype(jnp.uint32)  # fmt: skip
    marks = []
    for seed in (0, 1):
        factors = np.random.default_rng(seed).integers(0, 2**31, width + room, np.uint32) * np.uint32(2) + np.uint32(1)
        mixed = tokens * jnp.asarray(factors)
        for shift, odd in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # MurmurHash3's last step (Appleby)
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(odd)
        marks.append(mixed.sum(-1, dtype=jnp.uint32))
    return jnp.stack(marks, -1)


@jax.jit
def gradient_sizes(buffer: Buffer, response_lengths: jax.Array, advantage: jax.Array | np.ndarray) -> jax.Array:
    """How much a turn can move the policy in the first step after the rollout.

    The gradient of a token's log-prob with respect to the logits is `onehot - p` (over the temperature), and the sum of
    its absolute values `2 (1 - p[token])`: a token that was all but certain has none, whatever its advantage.

    Args:
        buffer: the rollout [E, T]; its log-probs are read.
        response_lengths: int32 [E, T].
        advantage: float32 [E, T].

    Returns:
        float32 [E, T], the sum of `|advantage| (1 - p[token])` over the response.
    """
    inside = jnp.arange(buffer.log_probs.shape[-1]) < response_lengths[..., None]
    return jnp.abs(advantage) * jnp.where(inside, -jnp.expm1(buffer.log_probs), 0.0).sum(-1)


def smallest(sizes: np.ndarray, share: float) -> np.ndarray:
    """The smallest entries whose sum is at most `share` of the sum of all; as many as possible, earlier ones first.

    Args:
        sizes: float [...], at least 0.
        share: in [0, 1).

    Returns:
        bool [...].
    """
    order = np.argsort(sizes, axis=None, kind="stable")
    sums = np.cumsum(sizes.reshape(-1)[order], dtype=np.float64)
    found = np.zeros(sizes.size, bool)
    found[order] = sums <= share * sums[-1]
    return found.reshape(sizes.shape)


def response_room(config: Config) -> int:
    """Response tokens that a row can hold: a share of its tokens, and at least a whole turn's."""
    return max(round(config.optimizer.row_length * config.optimizer.response_share), config.rollout.max_response_length)
