"""Time a call. `tunix_timing` imports this file in an environment without this project."""

import statistics
import time
from collections.abc import Callable

import jax


def timed(function: Callable, repeat: int) -> dict[str, float]:
    """Seconds of the first call, compilation included, and median seconds of `repeat` later calls."""
    took = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        jax.block_until_ready(function())
        took.append(time.perf_counter() - began)
    return {"first": took[0], "seconds": statistics.median(took[1:])}
