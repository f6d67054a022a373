"""Numbers that are not finite: found before they are trained on, and written down for inspection."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxmo_jax.agent.rollout import Rollout
from proxmo_jax.errors import UserError
from proxmo_jax.training.buffers import Buffer
from proxmo_jax.training.rows import Rows

FOLDER = "nonfinite"  # in the run's
CHECKED = ("reward", "log-prob", "advantage")


@jax.jit
def _finite(buffer: Buffer, response_lengths: jax.Array, advantage: jax.Array) -> jax.Array:
    """Whether all of what `CHECKED` names is finite in the turns that happened: bool [3]."""
    tokens = jnp.arange(buffer.log_probs.shape[-1]) < response_lengths[..., None]
    parts = (
        (buffer.reward, buffer.mask),
        (buffer.log_probs, buffer.mask[..., None] & tokens),
        (advantage, buffer.mask),
    )
    return jnp.stack([(jnp.isfinite(values) | ~mask).all() for values, mask in parts])


def check_rollout(folder: Path, iteration: int, rollout: Rollout, advantage: jax.Array) -> None:
    """Refuse a rollout with numbers that are not finite, once its advantages are there.

    Args:
        folder: the run's.
        iteration: its number.
        rollout: what was played, with its buffer.
        advantage: float32 [E, T].

    Raises:
        UserError: naming what is not finite, and the file that holds the rollout.
    """
    assert rollout.buffer is not None
    finite = np.asarray(_finite(rollout.buffer, rollout.response_lengths, advantage))
    if finite.all():
        return
    arrays = {**rollout.buffer.__dict__, "advantage": advantage, "response_lengths": rollout.response_lengths}
    path = _write(folder, f"iteration_{iteration}_rollout", arrays)
    what = ", ".join(name for name, fine in zip(CHECKED, finite, strict=True) if not fine)
    raise UserError(
        f"iteration {iteration}: the rollout has values that are not finite ({what}); nothing was updated, {path} holds"
        " the rollout"
    )


def check_losses(folder: Path, part: str, losses: Sequence[Any], batches: Sequence[Rows]) -> None:
    """Refuse a loss that is not finite: the step that had it was not applied.

    Args:
        folder: the run's.
        part: what is trained, for the message and the file's name.
        losses: float [steps], from `policy_step` or `cloning_step`, NaN if the gradient was not finite.
        batches: the mini-batch of each step.

    Raises:
        UserError: naming the step, and the file that holds its mini-batch.
    """
    bad = np.flatnonzero(~np.isfinite(np.asarray(losses, np.float32)))
    if len(bad) == 0:
        return
    rows = batches[bad[0]]
    arrays = {f.name: getattr(rows, f.name) for f in dataclasses.fields(rows)}
    path = _write(folder, part.replace(" ", "_") + f"_batch_{bad[0] + 1}", arrays)
    raise UserError(
        f"{part}: the loss or its gradient is not finite in mini-batch {bad[0] + 1}, whose update was not applied;"
        f" {path} holds it, and a lower learning rate may help"
    )


def _write(folder: Path, name: str, arrays: dict[str, Any]) -> Path:
    """Write this process's part of the arrays; the file."""
    (folder / FOLDER).mkdir(exist_ok=True)
    host = f"_host{jax.process_index()}" if jax.process_count() > 1 else ""
    path = folder / FOLDER / f"{name}{host}.npz"
    on_host: dict[str, Any] = {key: _local(value) for key, value in arrays.items()}
    np.savez_compressed(path, **on_host)
    return path


def _local(x: Any) -> np.ndarray:
    """An array on the host, or the part of it that this process holds."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    shards = {str(shard.index): shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(data) for data in shards.values()])
