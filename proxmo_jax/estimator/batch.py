"""The estimator on a batch `[G, M, T]`: on one device, on a mesh, or under pmap.

All three run the same function. Groups are independent except for TF-IDF: word frequencies, document frequencies and
the number of texts are summed over the mapped axis, and nothing else is communicated.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from proxmo_jax.errors import UserError
from proxmo_jax.estimator.embeddings import documents, unit_vectors
from proxmo_jax.estimator.entropy import modulate
from proxmo_jax.estimator.estimator import advantages
from proxmo_jax.estimator.states import discounted_returns
from proxmo_jax.estimator.types import Advantages, Batch, Group, Settings


def batch_advantages(
    batch: Batch,
    settings: Settings,
    *,
    axis_name: str | None = None,
    chunk: int | None = None,
    with_proximity: bool = False,
) -> Advantages:
    """`advantages` of every group of a batch, with TF-IDF embeddings computed from `batch.words` where they are needed.

    TF-IDF is fitted on the whole batch. The function is meant to be traced: call it under `jax.jit`.

    Args:
        batch: arrays [G, M, T] as in `Group`.
        settings: of the estimator.
        axis_name: mapped axis over which TF-IDF statistics are summed, under `shard_map` or `pmap`.
        chunk: groups computed at a time (default: all). Bounds memory by chunk x (M T)^2, or chunk x U^2 for U distinct
            observations.
        with_proximity: also return the weights of the soft baseline.

    Returns:
        `Advantages` with a leading axis [G].

    Raises:
        ValueError, UserError: as `advantages`.
    """
    words, batch = batch.words, replace(batch, words=None)
    if settings.aggregation != "soft" or batch.embedding is not None:
        words = None
    sparse: tuple = ()
    if words is not None:
        repeats = text_repeats(batch, words.ids.shape[1])
        corpus = documents(words, repeats, max_features=settings.max_features, axis_name=axis_name)
        sparse = (words.ids, words.counts)
    of_settings = replace(settings, entropy=False)
    values = batch_values(batch, settings, axis_name) if settings.values_over == "batch" else None

    def of_group(arrays: tuple[Group, jax.Array | None, *tuple[jax.Array, ...]]) -> Advantages:
        group, values, *counts = arrays
        if words is not None:
            unit = unit_vectors(words._replace(ids=counts[0], counts=counts[1]), corpus)
            group = replace(group, embedding=unit, comparable=corpus.any)
        return advantages(group, of_settings, with_proximity=with_proximity, values=values)

    if chunk is None:
        result = jax.vmap(of_group)((batch, values, *sparse))
    else:
        result = jax.lax.map(of_group, (batch, values, *sparse), batch_size=chunk)
    if not settings.entropy:
        return result
    if batch.entropy is None:
        raise UserError("entropy: got none, settings with entropy (empg) need that of each response")
    return modulate(result, batch, settings, axis_name)


def batch_values(batch: Batch, settings: Settings, axis_name: str | None) -> jax.Array:
    """Mean discounted return of all visits of the whole batch to the same observation (public code of GAGPO).

    Args:
        batch: with `text` [G, M, T].
        settings: discount is used.
        axis_name: mapped axis over which visits are counted.

    Returns:
        float32 [G, M, T], 0 on padding.
    """
    if batch.text is None:
        raise UserError("values_over: 'batch' needs observations that are numbered across the batch; use 'group'")
    mask, devices = batch.mask, jax.lax.axis_size(axis_name) if axis_name else 1
    place, zero = batch.text.reshape(-1), jnp.zeros(batch.text.size * devices, jnp.float32)

    def total(values):
        summed = zero.at[place].add(jnp.where(mask, values, 0.0).reshape(-1), mode="drop")
        summed = jax.lax.psum(summed, axis_name) if axis_name else summed
        return summed[place].reshape(mask.shape)

    reward = jnp.where(mask, batch.reward, 0.0)
    returns = jax.vmap(discounted_returns, (0, 0, None))(reward, mask, settings.discount)
    count = jnp.maximum(total(jnp.ones_like(returns)), 1.0)
    mean = total(returns) / count
    return jnp.where(mask, mean + total(returns - mean) / count, 0.0)


def text_repeats(batch: Batch, texts: int) -> jax.Array:
    """The number of steps that have each distinct observation of their batch.

    Args:
        batch: mask and anchor [G, M, T].
        texts: U, the most distinct observations of a group.

    Returns:
        float32 [G, U].
    """
    assert batch.anchor is not None
    row = jnp.where(batch.mask, batch.anchor, texts).reshape(batch.mask.shape[0], -1)
    return jax.vmap(lambda r: jnp.zeros(texts, jnp.float32).at[r].add(1.0, mode="drop"))(row)


def pad_groups(batch: Batch, multiple: int) -> Batch:
    """Append empty groups, which change no result, until the number of groups is a multiple of `multiple`."""
    missing = -batch.reward.shape[0] % multiple

    def pad(x):
        return jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1)))

    return _with_groups(pad, batch)


def _with_groups(change: Callable, batch: Batch) -> Batch:
    """Apply `change` to each array that has a group axis."""
    words = batch.words
    if words is None:
        return jax.tree.map(change, batch)
    changed = words._replace(ids=change(words.ids), counts=change(words.counts))
    return replace(jax.tree.map(change, replace(batch, words=None)), words=changed)


def _with_alphabetical(batch: Batch, alphabetical: Any) -> Batch:
    """The batch with another `words.alphabetical`, which has no group axis."""
    return batch if batch.words is None else replace(batch, words=batch.words._replace(alphabetical=alphabetical))


@partial(jax.jit, static_argnames=("mesh", "chunk"))
def sharded_advantages(batch: Batch, settings: Settings, *, mesh: Mesh, chunk: int | None = None) -> Advantages:
    """`batch_advantages` with the groups split over the mesh axis `data`.

    Args:
        batch: arrays [G, M, T]; G need not divide by the size of the axis.
        settings: of the estimator.
        mesh: with an axis `data`.
        chunk: groups that each device computes at a time.

    Returns:
        `Advantages` with a leading axis [G].
    """
    count = batch.reward.shape[0]
    batch = pad_groups(batch, mesh.shape["data"])
    specs = _with_groups(lambda _: PartitionSpec("data"), batch)
    specs = _with_alphabetical(specs, PartitionSpec())
    mapped = jax.shard_map(
        partial(batch_advantages, axis_name="data", chunk=chunk),
        mesh=mesh,
        in_specs=(specs, PartitionSpec()),
        out_specs=PartitionSpec("data"),
        check_vma=settings.kernel != "pallas",
    )
    return jax.tree.map(lambda x: x[:count], mapped(batch, settings))


def pmapped_advantages(batch: Batch, settings: Settings, *, devices: int | None = None) -> Advantages:
    """`batch_advantages` under `jax.pmap`. JAX only maintains pmap; new code should prefer `sharded_advantages`.

    Args:
        batch: arrays [G, M, T]; G need not divide by the number of devices.
        settings: of the estimator.
        devices: the number of devices (default: all local ones).

    Returns:
        `Advantages` with a leading axis [G].
    """
    devices = devices or jax.local_device_count()
    count = batch.reward.shape[0]
    batch = _with_groups(lambda x: x.reshape(devices, -1, *x.shape[1:]), pad_groups(batch, devices))
    alphabetical = None if batch.words is None else batch.words.alphabetical
    result = _on_every_device(_with_alphabetical(batch, None), alphabetical, settings)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], result)


@partial(jax.pmap, axis_name="data", in_axes=(0, None, None))
def _on_every_device(batch: Batch, alphabetical, settings: Settings) -> Advantages:
    """`batch_advantages` of each device's groups."""
    return batch_advantages(_with_alphabetical(batch, alphabetical), settings, axis_name="data")
