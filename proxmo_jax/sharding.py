"""Devices as one mesh: batches are split along `data`, parameters are on every device."""

import ctypes
import os
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def prepare_cpu(cores: int | None = None) -> None:
    """Make a CPU worth training on; call before JAX first touches a device. Changes nothing on an accelerator.

    One virtual device per core: XLA's fused loops run on one thread, so two half batches beat one (1.7 times on two
    cores). Freed memory is kept: else every step's temporaries come as fresh pages from the kernel (1.8 times).
    """
    count = cores or len(os.sched_getaffinity(0))
    flag = "--xla_force_host_platform_device_count"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        # Batches are powers of two, so the number of devices is one as well.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={1 << (min(count, 8).bit_length() - 1)}"
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
