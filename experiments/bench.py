"""What the benchmarks share: checks of options, the machine's description, child processes and the report."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console

from proxmo_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def require_positive(config: Any, names: Sequence[str]) -> None:
    """Raise UserError if one of these options of `config` is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")


def heading(title: str, command: str) -> str:
    """The heading of a report, with the date and the command."""
    return f"## {title}, {date.today().isoformat()}: `{command}`"


def host() -> str:
    """CPU cores and the version of Python."""
    return f"{_cores()}, Python {platform.python_version()}"


def host_and_devices() -> str:
    """CPU cores, JAX's devices, and the versions of Python, jax and numpy."""
    import jax
    import numpy as np

    return (
        f"{_cores()}, {jax.device_count()} x {jax.devices()[0].device_kind}; Python {platform.python_version()},"
        f" jax {jax.__version__}, numpy {np.__version__}"
    )


def _cores() -> str:
    """The number of CPU cores and their architecture."""
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def publish(text: str, append: Path | None, console: Console) -> str:
    """Print a report, append it to a file if one is given, and return it."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    if append is not None:
        with append.open("a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")
    return text


def with_project() -> dict[str, str]:
    """This process's environment variables, with the repository's root on PYTHONPATH."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def run_child(
    what: str, command: Sequence[str], *, request: dict | None = None, environment: Mapping[str, str] | None = None
) -> str:
    """Run a process that times something.

    Args:
        what: the measurement, for the message of an error.
        command: program and arguments.
        request: written to its standard input as JSON.
        environment: its environment variables; default: those of `with_project`.

    Returns:
        The last line of its standard output; empty if there is none.

    Raises:
        UserError: the process failed; the message ends with the last line of its standard error.
    """
    done = subprocess.run(
        list(command), input=None if request is None else json.dumps(request), capture_output=True, encoding="utf-8",
        errors="replace", env=with_project() if environment is None else dict(environment), check=False,
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"{what} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return (done.stdout.strip().splitlines() or [""])[-1]
