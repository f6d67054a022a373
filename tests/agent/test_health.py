"""A run that stands still says where, one that is asked to stop ends in time, and NaN trains nothing."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_dynamic_sampling import make

from proxmo_jax.agent import loop as loop_module
from proxmo_jax.agent.stop import StopOnSignal, Stopped
from proxmo_jax.agent.watchdog import Watchdog
from proxmo_jax.errors import UserError


def until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_watchdog_names_what_stands_still_and_dumps_the_stacks(tmp_path):
    said = []
    with Watchdog(tmp_path, 0.2, said.append) as watch:
        for step in range(20):  # slow, but never for so long
            watch(f"step {step}")
            time.sleep(0.01)
        watch("iteration 3, rollout, turn 2")
        until(lambda: said)
        first = list(said)
        watch("iteration 3, update")
        until(lambda: "update" in said[-1])
    path = tmp_path / "stacks_host0.txt"
    assert first[0].startswith("host 0: no progress for ")
    assert first[0].endswith(f" s in iteration 3, rollout, turn 2; the stacks of all threads are in {path}")
    stacks = path.read_text(encoding="utf-8")
    assert "in until" in stacks  # what this thread was doing
    assert "in _watch" in stacks
    with Watchdog(tmp_path / "off", 0.0, said.append):
        pass
    assert not (tmp_path / "off").exists()


def test_a_signal_is_seen_at_the_next_point_and_by_the_agreed_answer(capsys):
    asked = []
    before = signal.getsignal(signal.SIGTERM)
    with StopOnSignal(agree=lambda own: asked.append(own) or own) as stop:
        stop.check()
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            stop.check()
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat it
        assert stop
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: stop._announced)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert asked == [False, True]
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().out.count("Stopping after the turn or update under way") == 1


BUSY = """
import ctypes, sys
from proxmo_jax.agent import loop as loop_module
from proxmo_jax.agent.stop import StopOnSignal
with StopOnSignal(grace=0.3) as stop:
    stop.rescue, stop.where = lambda: "iteration 7 is the newest that is saved", lambda: "a compilation"
    mutex = ctypes.create_string_buffer(64)  # of zeros: a mutex
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    print("busy", flush=True)
    lock(mutex)  # for ever, in C, where Python runs no signal handler
"""


def test_a_process_that_is_busy_in_c_ends_with_the_grace_period():
    """As in a compilation of XLA, which does not return to Python."""
    command = [sys.executable, "-c", BUSY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stdout.readline() == "busy\n"
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert "in 0.3 s at the latest" in said
    assert "Ended after 0.3 s, in a compilation; iteration 7 is the newest that is saved. To go on: --resume" in said


def copy(state):
    return jax.tree.map(lambda x: np.array(x), state)


def same(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b))


def test_numbers_that_are_not_finite_train_nothing_and_are_written_down(tmp_path, monkeypatch):
    """A reward before the update; a loss inside the step, whose state stays as it was."""
    loop, state = make(tmp_path, 0, output__dir=tmp_path)
    before, played = copy(state), loop.collect

    def with_bad_reward(*arguments):
        rollout = played(*arguments)
        reward = rollout.buffer.reward.at[0, 0].set(jnp.nan)
        rollout.buffer = dataclasses.replace(rollout.buffer, reward=reward)
        return rollout

    loop.collect = with_bad_reward
    with pytest.raises(
        UserError, match=r"iteration 1: the rollout has values that are not finite [(]reward, advantage[)]"
    ) as error:
        loop.iteration(state, 1, jax.random.key(1))
    assert same(copy(state), before)
    file = tmp_path / "nonfinite" / "iteration_1_rollout.npz"
    assert str(file) in str(error.value)
    assert np.isnan(np.load(file)["reward"][0, 0])

    loop, state = make(tmp_path / "second", 0, output__dir=tmp_path)
    step, seen = loop_module.policy_step, []

    def with_bad_row(state, rows, *arguments, **settings):
        bad = dataclasses.replace(rows, old_log_probs=rows.old_log_probs.at[0, 0].set(jnp.nan))
        before = copy(state)
        state, terms = step(state, bad, *arguments, **settings)
        seen.append((same(copy(state), before), float(terms.loss)))
        return state, terms

    monkeypatch.setattr(loop_module, "policy_step", with_bad_row)
    with pytest.raises(UserError, match=r"iteration 2: the loss or its gradient is not finite in mini-batch 1, whose"):
        loop.iteration(state, 2, jax.random.key(1))
    assert all(unchanged and np.isnan(loss) for unchanged, loss in seen)
    assert (tmp_path / "nonfinite" / "iteration_2_batch_1.npz").is_file()
