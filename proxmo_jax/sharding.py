"""Devices as one mesh: batches are split along `data`, parameters are on every device."""

import ctypes
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def keep_freed_memory() -> None:
    """Tell the C library to keep freed memory; on a CPU this makes a training step up to 1.8 times faster.

    XLA allocates a step's temporaries anew each time, and by default each comes as fresh pages from the kernel.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)
        mallopt(top_pad, 1 << 28)


def data_mesh() -> Mesh:
    """All devices of all hosts along one axis, `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def split(mesh: Mesh, tree: Any) -> Any:
    """Put arrays on the mesh, their first axis split along `data`; it must divide by the number of devices."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Put arrays whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
