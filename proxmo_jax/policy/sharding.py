"""The device mesh, and the table that maps logical axes to mesh axes.

Mesh axes: `data` (batches sharded, parameters replicated), `fsdp` (batches sharded, and parameters along `embed`) and
`tensor` (heads, MLP width and vocabulary sharded).
"""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import jax
import optax
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
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def split(mesh: Mesh, tree: Any) -> Any:
    """Shard the first axis of arrays over the batch axes of the mesh.

    Args:
        mesh: the mesh.
        tree: pytree of arrays [B, ...]; B is a multiple of data x fsdp.

    Returns:
        The tree on the mesh.
    """
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(RULES["batch"])))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Copy arrays to every device of the mesh.

    Args:
        mesh: the mesh.
        tree: pytree of arrays.

    Returns:
        The tree on the mesh.
    """
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


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
