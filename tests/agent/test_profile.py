"""A trace that Perfetto opens: the trace event format, with what ran inside."""

import gzip
import io
import json

import jax
import jax.numpy as jnp
import pytest
from nested import config_with
from rich.console import Console

from proxmo_jax.agent.profile import profiled, warn_if_over
from proxmo_jax.agent.run_files import open_folder, resumed
from proxmo_jax.errors import UserError


def test_a_trace_is_written_where_it_is_said_to_be(tmp_path):
    console = Console(file=io.StringIO(), width=40, markup=False)
    with profiled(tmp_path / "a[b]", False, console):
        pass
    assert not (tmp_path / "a[b]").exists()
    with profiled(tmp_path / "a[b]", True, console), jax.profiler.TraceAnnotation("the update"):
        jax.block_until_ready(jax.jit(lambda x: x @ x)(jnp.ones((64, 64))))
    path = console.file.getvalue().strip().rpartition(": ")[2]
    assert path.startswith(str(tmp_path / "a[b]" / "profile"))
    assert traced(path) >= {"the update"}


def traced(path) -> set[str]:
    """Names of the complete events of a trace."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        trace = json.load(file)
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    assert all({"ts", "dur", "pid", "tid", "name"} <= set(event) for event in events)
    return {event["name"] for event in events}


def test_an_iteration_that_never_comes_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"--profile must be at most the 3 of --iterations, got 4"):
        config_with(iterations=3, output__profile=4)
    with pytest.raises(UserError, match=r"--output.profile must be at least 0, got -1"):
        config_with(output__profile=-1)
    console = Console(file=io.StringIO(), width=200)
    for iteration, done in ((0, 5), (6, 5)):
        warn_if_over(tmp_path, iteration, done, console)
    assert console.file.getvalue() == ""
    warn_if_over(tmp_path, 4, 5, console)
    assert console.file.getvalue() == "--profile 4: the run goes on after iteration 5; no trace is written\n"


def test_a_resumed_run_takes_a_new_iteration_to_trace(tmp_path):
    stored = config_with(output__dir=tmp_path / "run", iterations=8)
    open_folder(stored)
    asked = config_with(output__dir=tmp_path / "run", iterations=8, output__profile=6, resume=True)
    config, ignored = resumed(asked)
    assert config.output.profile == 6
    assert ignored == []
