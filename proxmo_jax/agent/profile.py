"""A trace of one iteration for Perfetto."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from rich.console import Console

TRACES = "profile"  # folder in the run's


@contextmanager
def profiled(folder: Path, wanted: bool, console: Console) -> Iterator[None]:
    """Trace what is done inside into the run's folder, and say where the trace is.

    The tracer of Python functions is off: it slows the iteration, and its events push those of the device out.

    Args:
        folder: the run's.
        wanted: whether to trace at all.
        console: where it is said.
    """
    if not wanted:
        yield
        return
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder / TRACES), create_perfetto_trace=True, profiler_options=options):
        yield
    newest = max((folder / TRACES).rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
    console.print(f"Trace of the iteration, for https://ui.perfetto.dev: {newest}", soft_wrap=True)


def warn_if_over(folder: Path, iteration: int, done: int, console: Console) -> None:
    """Say so if the iteration to trace lies before those that a resumed run still does, and has no trace."""
    if 0 < iteration <= done and not (folder / TRACES).exists():
        console.print(f"--profile {iteration}: the run goes on after iteration {done}; no trace is written")
