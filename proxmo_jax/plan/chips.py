"""TPU chips: their published peak numbers, and the devices of a named topology as the TPU compiler sees them."""

import math
import os
import re
from dataclasses import dataclass
from typing import Any

from proxmo_jax.errors import UserError

GIB = 2**30
# libtpu looks for a TPU's host and complains; without a device there is nothing to look for, nor to lock.
COMPILER_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Chip:
    """Published peak numbers of a chip.

    Attributes:
        flops: bfloat16 FLOP/s.
        hbm: bytes of HBM that a program can use, as libtpu 0.0.52 says when one does not fit; published are 16, 95 and
            32 GB.
        bandwidth: of HBM, bytes/s.
        links: bytes/s over all ICI links of a chip, both directions.
        ports: ICI links of a chip.
        axes: dimensions of its torus.
        matrix_units: multiply-adds in a cycle, of all matrix units; with `flops` it gives the clock.
        source: where the numbers are published.
    """

    flops: float
    hbm: float
    bandwidth: float
    links: float
    ports: int
    axes: int
    matrix_units: int
    source: str

    @property
    def clock(self) -> float:
        """Cycles per second."""
        return self.flops / (2 * self.matrix_units)

    @property
    def axis_bandwidth(self) -> float:
        """Bytes/s that a chip receives in a ring along one axis of the torus, from both sides."""
        return self.links / self.ports


DOCS = "https://docs.cloud.google.com/tpu/docs"
CHIPS = {
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 400e9, 4, 2, 4 * 128 * 128, f"{DOCS}/v5e"),
    "v5p": Chip(459e12, 95.73 * GIB, 2765e9, 1200e9, 6, 3, 8 * 128 * 128, f"{DOCS}/v5p"),
    "v6e": Chip(918e12, 31.24 * GIB, 1638e9, 800e9, 4, 2, 2 * 256 * 256, f"{DOCS}/v6e"),
}


@dataclass(frozen=True)
class Topology:
    """A slice: a kind of chip, and the sizes of its axes.

    Attributes:
        name: as libtpu takes it, such as v5e:4x4.
        chip: its chips.
        sizes: chips along each axis.
    """

    name: str
    chip: Chip
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of chips, each of which is one device."""
        return math.prod(self.sizes)


def topology(name: str) -> Topology:
    """Read the name of a slice.

    Args:
        name: chip and sizes, such as v5e:16x16.

    Returns:
        The slice.

    Raises:
        UserError: for a name that is none.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not found or found[1] not in CHIPS:
        examples = "v5e:4x4, v5p:4x4x4 or v6e:16x16"
        raise UserError(f"--topology must be one of {', '.join(CHIPS)} and sizes, such as {examples}; got {name!r}")
    chip, sizes = CHIPS[found[1]], tuple(map(int, found[2].split("x")))
    if len(sizes) != chip.axes or min(sizes) < 1:
        raise UserError(f"--topology: a {found[1]} slice has {chip.axes} sizes, got {name!r}")
    return Topology(name, chip, sizes)


def devices_of_a_host(found: list[Any], where: Topology) -> list[Any]:
    """The devices of one host as a slice of their own, since libtpu compiles for whole slices alone.

    Args:
        found: the devices of a slice.
        where: the slice.

    Returns:
        `found` itself where it is one host.
    """
    own = sum(device.process_index == found[0].process_index for device in found)
    if own == len(found):
        return found
    side = math.isqrt(own)
    sizes = (side, own // side, *(1,) * (where.chip.axes - 2))
    kind = where.name.partition(":")[0]
    return devices(topology(f"{kind}:{'x'.join(map(str, sizes))}"))


def prepare_compiler() -> None:
    """Make JAX start on the CPU, with libtpu as a compiler alone; call it before JAX's devices are asked for."""
    import jax

    for variable, value in COMPILER_ONLY.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")


def devices(where: Topology) -> list[Any]:
    """The devices of a slice, to compile for.

    Args:
        where: the slice.

    Returns:
        A device for each chip.

    Raises:
        UserError: without libtpu, or for sizes that it does not know.
    """
    import importlib.util

    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise UserError("plan: needs Google's TPU compiler, libtpu: pip install 'proxmo-jax[plan]'")
    three = "x".join(map(str, (*where.sizes, 1)[:3])) if where.chip.axes == 3 else None
    name = where.name if three is None else f"{where.name.split(':')[0]}:{three}"
    try:
        found = list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # libtpu raises what it likes for sizes that no slice has
        raise UserError(f"--topology {where.name}: libtpu has no such slice ({str(error)[:200]})") from error
    if len(found) != where.count:
        raise UserError(f"--topology {where.name}: libtpu has {len(found)} devices there, need {where.count}")
    return found
