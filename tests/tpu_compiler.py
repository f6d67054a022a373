"""Programs compiled for a TPU where there is none."""

import os
import subprocess
import sys

import pytest


def compile_for_tpu(program: str) -> None:
    """Run a Python program, which is to print "compiled" at its end, in a process that has libtpu's compiler."""
    pytest.importorskip("libtpu", reason="libtpu (pip install libtpu) compiles for TPU without one")
    # Two test processes may be compiling at once; without a device there is nothing to lock.
    variables = {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(sys.path)  # it may import the tests
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **variables}, check=False
    )
    assert done.stdout.strip().endswith("compiled"), done.stderr[-3000:]
