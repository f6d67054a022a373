"""The device mesh, and the table that maps logical axes to mesh axes.

Mesh axes: `data` (batches sharded, parameters replicated), `fsdp` (batches sharded, and parameters along `embed`) and
`tensor` (heads, MLP width and vocabulary sharded).

With several hosts (JAX processes) there are three meshes of the same devices: the training mesh over all of them,
`local_mesh` over those of this host, on which it samples without the others, and `by_host`, which splits arrays by the
host that made them.
"""

import ctypes
import math
import os
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from proxmo_jax.errors import UserError
from proxmo_jax.policy.decoder import LOGICAL_AXES, PolicyConfig, parameter_shapes

AXES = ("data", "fsdp", "tensor")
RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "layer": None,
    None: None,
}


def keep_freed_memory() -> None:
    """Make the C library keep freed memory, which speeds up a training step on a CPU by up to 1.8 times.

    XLA allocates a step's temporaries anew each time, and by default each allocation is fresh pages from the kernel.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)
        mallopt(top_pad, 1 << 28)


def enough_threads() -> None:
    """Give XLA enough threads for several CPU devices; call it before JAX starts.

    Each device's part of a program takes a thread while it waits for the others. With as many threads as cores or
    devices, which is XLA's choice, the last device may find none, since other programs have them: none goes on then,
    and XLA aborts the process after a minute. An update on four devices of two cores takes a third longer with eight
    threads for each; how few would do is not known.
    """
    flag = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    devices = max(jax.config.jax_num_cpu_devices, int(flag[1]) if flag else 1)  # type: ignore[attr-defined]
    if devices > 1:
        os.environ.setdefault("NPROC", str(max(os.cpu_count() or 1, 8 * devices)))


def make_mesh(data: int = 0, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices of all hosts.

    Args:
        data: size of the axis; 0: all devices that the other axes leave.
        fsdp: size of the axis.
        tensor: size of the axis.
        devices: default: all.

    Returns:
        The mesh.

    Raises:
        UserError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = (data or max(len(devices) // (fsdp * tensor), 1), fsdp, tensor)
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        wanted = " x ".join(f"{name} {size}" for name, size in zip(AXES, sizes, strict=True))
        raise UserError(f"mesh: {wanted} is {math.prod(sizes)} devices, need the {len(devices)} there are")
    try:
        found = jax.make_mesh(sizes, AXES, devices=devices).devices
    except NotImplementedError:  # on a torus, axes that are not products of its own, such as 8 on 4 x 4 x 4 chips
        found = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(found, AXES, axis_types=(AxisType.Auto,) * 3)


@cache
def by_host(mesh: Mesh) -> Mesh:
    """The devices of a mesh with an axis `host` before those of each host's `local_mesh`.

    A host's `tensor` and `fsdp` are the parts of the mesh's that its devices hold.
    """
    devices = sorted(mesh.devices.flat, key=lambda device: (device.process_index, device.id))
    hosts = len({device.process_index for device in devices})
    tensor = math.gcd(mesh.shape["tensor"], len(devices) // hosts)
    fsdp = math.gcd(mesh.shape["fsdp"], len(devices) // hosts // tensor)
    return Mesh(np.array(devices).reshape(hosts, -1, fsdp, tensor), ("host", *AXES), axis_types=(AxisType.Auto,) * 4)


@cache
def local_mesh(mesh: Mesh) -> Mesh:
    """The mesh of this host's devices; the mesh itself if there is one host."""
    if not mesh.is_multi_process:
        return mesh
    own = by_host(mesh).devices[jax.process_index()]
    return Mesh(own, AXES, axis_types=(AxisType.Auto,) * 3)


def split(mesh: Mesh, tree: Any) -> Any:
    """Shard the first axis of arrays over the batch axes of the mesh.

    Args:
        mesh: the mesh.
        tree: pytree of arrays [B, ...], equal on all hosts; B is a multiple of data x fsdp.

    Returns:
        The tree on the mesh.
    """
    return _place(NamedSharding(mesh, PartitionSpec(RULES["batch"])), tree)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Copy arrays to every device of the mesh.

    Args:
        mesh: the mesh.
        tree: pytree of arrays, equal on all hosts.

    Returns:
        The tree on the mesh.
    """
    return _place(NamedSharding(mesh, PartitionSpec()), tree)


def _place(sharding: NamedSharding, tree: Any) -> Any:
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def place(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        whole = np.asarray(x)  # `device_put` would compare it between the hosts first
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, tree)


def join_hosts(mesh: Mesh, tree: Any) -> Any:
    """Concatenate arrays of all hosts along their first axis; nothing is copied between hosts.

    Args:
        mesh: the training mesh.
        tree: pytree of arrays [N / hosts, ...] on this host's `local_mesh`, of the same shapes on all hosts.

    Returns:
        The tree of arrays [N, ...], each host's part replicated over its devices; the tree itself if there is one host.
    """
    if not mesh.is_multi_process:
        return tree
    over = NamedSharding(by_host(mesh), PartitionSpec("host"))
    whole = NamedSharding(local_mesh(mesh), PartitionSpec())

    def join(x):
        shape = (over.mesh.shape["host"] * x.shape[0], *x.shape[1:])
        parts = [shard.data for shard in jax.device_put(x, whole).addressable_shards]
        return jax.make_array_from_single_device_arrays(shape, over, parts)

    return jax.tree.map(join, tree)


def split_by_host(x: jax.Array) -> bool:
    """Whether an array is one of `join_hosts`."""
    return isinstance(x.sharding, NamedSharding) and "host" in x.sharding.mesh.axis_names


def to_host(mesh: Mesh, params: Any, config: PolicyConfig, *, gathered: bool) -> Any:
    """Copy parameters to every host's own devices, so that the host can compute without the others.

    Args:
        mesh: the training mesh, over several hosts.
        params: the parameters on it.
        config: their shape.
        gathered: as in `parameter_shardings`.

    Returns:
        The parameters on this host's `local_mesh`.
    """
    local = parameter_shardings(local_mesh(mesh), config, gathered=gathered)
    everywhere = jax.tree.map(lambda sharding: NamedSharding(by_host(mesh), sharding.spec), local)

    def own(x, sharding):
        return jax.make_array_from_single_device_arrays(x.shape, sharding, [s.data for s in x.addressable_shards])

    return jax.tree.map(own, jax.device_put(params, everywhere), local)


def cache_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a `Cache`, keys and values alike: by row and by head."""
    return NamedSharding(mesh, PartitionSpec(None, RULES["batch"], RULES["kv_heads"], None, None))


def parameter_shardings(mesh: Mesh, config: PolicyConfig, *, gathered: bool = False) -> Any:
    """Sharding of each parameter, by `LOGICAL_AXES` and `RULES`.

    Args:
        mesh: the mesh.
        config: shape of the policy.
        gathered: replicate over `fsdp`.

    Returns:
        A tree of NamedSharding.

    Raises:
        UserError: naming every axis whose size the mesh does not divide.
    """
    wrong: set[str] = set()

    def place(path, leaf) -> NamedSharding:
        names = LOGICAL_AXES["/".join(part.key for part in path)]
        for name, size in zip(names, leaf.shape, strict=True):
            axis = RULES[name]
            if isinstance(axis, str) and size % mesh.shape[axis]:
                wrong.add(f"{name} {size} by {axis} {mesh.shape[axis]}")
        axes = (RULES[name] for name in names)
        return NamedSharding(mesh, PartitionSpec(*(None if gathered and axis == "fsdp" else axis for axis in axes)))

    tree = jax.tree_util.tree_map_with_path(place, parameter_shapes(config))
    if wrong:
        raise UserError(f"mesh: does not divide {', '.join(sorted(wrong))}; need sizes that do")
    return tree


def optimizer_shardings(optimizer: optax.GradientTransformation, params: Any, shardings: Any) -> Any:
    """Sharding of each array of the optimiser state: as its parameter, or replicated.

    Args:
        optimizer: the optimiser.
        params: trainable parameters, or their shapes.
        shardings: their shardings, a tree.

    Returns:
        A tree of NamedSharding.
    """
    whole = NamedSharding(jax.tree.leaves(shardings)[0].mesh, PartitionSpec())
    shapes = jax.eval_shape(optimizer.init, params)
    return optax.tree_map_params(
        optimizer, lambda _, sharding: sharding, shapes, shardings, transform_non_params=lambda _: whole
    )


def place_optimizer(optimizer: optax.GradientTransformation, params: Any, shardings: Any) -> Any:
    """Initialise the optimiser state, each array sharded as its parameter.

    Args:
        optimizer: the optimiser.
        params: trainable parameters.
        shardings: their shardings, a tree.

    Returns:
        The state on the mesh.
    """
    placed = optimizer_shardings(optimizer, params, shardings)
    return jax.jit(optimizer.init, out_shardings=placed)(params)
