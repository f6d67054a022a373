"""The estimator on a whole batch `[group, member, turn]`: on one device, on a mesh, or under pmap.

One function body serves all three. Groups are independent but for TF-IDF's corpus frequency, document frequency and
number of texts, which are summed over the mapped axis; nothing else crosses devices.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from proxmo_jax.estimator.embeddings import documents, unit_vectors
from proxmo_jax.estimator.estimator import advantages
from proxmo_jax.estimator.types import Advantages, Group, Settings


def batch_advantages(
    group: Group,
    settings: Settings,
    *,
    axis_name: str | None = None,
    chunk: int | None = None,
    with_proximity: bool = False,
) -> Advantages:
    """`advantages` of every group of a batch `[G, ...]`, the embedding made of `group.words` where it is needed.

    TF-IDF is over the whole batch, with `axis_name` over the whole mapped axis. `chunk` groups are computed at a
    time (default: all), which bounds memory by chunk x (M T)^2, or chunk x U^2 for U distinct observations.
    A program to be traced: put it under `jax.jit`. Raises ValueError as `advantages` does.
    """
    words, group = group.words, replace(group, words=None)
    if settings.aggregation != "soft" or group.embedding is not None:
        words = None
    sparse: tuple = ()
    if words is not None:
        repeats = text_repeats(group, words.ids.shape[1])
        corpus = documents(words, repeats, max_features=settings.max_features, axis_name=axis_name)
        sparse = (words.ids, words.counts)

    def one(member: tuple) -> Advantages:
        own, *counts = member
        if words is not None:
            unit = unit_vectors(words._replace(ids=counts[0], counts=counts[1]), corpus)
            own = replace(own, embedding=unit, comparable=corpus.any)
        return advantages(own, settings, with_proximity=with_proximity)

    if chunk is None:
        return jax.vmap(one)((group, *sparse))
    return jax.lax.map(one, (group, *sparse), batch_size=chunk)


def text_repeats(group: Group, texts: int) -> jax.Array:
    """How many steps of each group `[G, M, T]` have each of its distinct observations: float32 [G, U]."""
    row = jnp.where(group.mask, group.anchor, texts).reshape(group.mask.shape[0], -1)
    return jax.vmap(lambda r: jnp.zeros(texts, jnp.float32).at[r].add(1.0, mode="drop"))(row)


def pad_groups(group: Group, multiple: int) -> Group:
    """The batch with empty groups at its end, so that their number divides by `multiple`; they change nothing."""
    short = -group.reward.shape[0] % multiple

    def pad(x):
        return jnp.pad(x, ((0, short), *[(0, 0)] * (x.ndim - 1)))

    return _with_groups(pad, group)


def _with_groups(change, group: Group) -> Group:
    """`change` each array that has a group axis."""
    words = group.words
    if words is None:
        return jax.tree.map(change, group)
    changed = words._replace(ids=change(words.ids), counts=change(words.counts))
    return replace(jax.tree.map(change, replace(group, words=None)), words=changed)


@partial(jax.jit, static_argnames=("mesh", "chunk"))
def sharded_advantages(group: Group, settings: Settings, *, mesh: Mesh, chunk: int | None = None) -> Advantages:
    """`batch_advantages` with the groups split over the mesh's axis `data`; any number of groups."""
    count = group.reward.shape[0]
    group = pad_groups(group, mesh.shape["data"])
    split = _with_groups(lambda _: PartitionSpec("data"), group)
    if split.words is not None:
        split = replace(split, words=split.words._replace(alphabetical=PartitionSpec()))
    mapped = jax.shard_map(
        partial(batch_advantages, axis_name="data", chunk=chunk),
        mesh=mesh,
        in_specs=(split, PartitionSpec()),
        out_specs=PartitionSpec("data"),
        check_vma=settings.kernel != "pallas",
    )
    return jax.tree.map(lambda x: x[:count], mapped(group, settings))


def pmapped_advantages(group: Group, settings: Settings, *, devices: int | None = None) -> Advantages:
    """The same under `jax.pmap` over `devices` (default: all local ones); any number of groups.

    JAX keeps pmap in maintenance; new code should prefer `sharded_advantages`.
    """
    devices = devices or jax.local_device_count()
    count = group.reward.shape[0]
    group = _with_groups(lambda x: x.reshape(devices, -1, *x.shape[1:]), pad_groups(group, devices))
    alphabetical = None
    if group.words is not None:
        alphabetical = group.words.alphabetical
        group = replace(group, words=group.words._replace(alphabetical=None))
    answer = _on_every_device(group, alphabetical, settings)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], answer)


@partial(jax.pmap, axis_name="data", in_axes=(0, None, None))
def _on_every_device(group: Group, alphabetical, settings: Settings) -> Advantages:
    if group.words is not None:
        group = replace(group, words=group.words._replace(alphabetical=alphabetical))
    return batch_advantages(group, settings, axis_name="data")
