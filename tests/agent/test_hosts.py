"""Several hosts: settings, refusals, launch scripts, and two processes that compute what one does."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import host_program
import jax
import numpy as np
import pytest
import yaml
from nested import config_with
from test_train import SMALL, proxmo

from proxmo_jax import cli
from proxmo_jax.agent import hosts
from proxmo_jax.agent.report import read_metrics
from proxmo_jax.agent.settings import HostSettings, check_devices, check_hosts
from proxmo_jax.errors import UserError
from proxmo_jax.policy.decoder import init_params
from proxmo_jax.policy.sharding import by_host, join_hosts, local_mesh, make_mesh

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


def program(index: int, count: int, port: int, folder: Path) -> subprocess.Popen:
    """A host in a process of its own, with one device."""
    paths = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(HERE / "host_program.py"), str(index), str(count), str(port), str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )


@pytest.mark.slow
def test_two_hosts_compute_what_one_does(tmp_path):
    """Rollout, shared words, estimator, packing, two updates and a checkpoint, of the same global batch."""
    port = free_port()
    running = [program(index, 2, port, tmp_path) for index in range(2)]
    outputs = [process.communicate(timeout=280)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(outputs)
    alone = host_program.iteration(make_mesh(devices=jax.devices()[:2]))
    both = [dict(np.load(tmp_path / f"host{index}.npz")) for index in range(2)]
    assert list(both[0]["said"]) == list(both[1]["said"])
    assert both[0]["said"][0] == "host 1 has --seed 1, host 0 has 0; need the same on all 2 hosts"
    assert both[0]["said"][1] == "host 1: no disk"
    assert both[0]["numbers"][0] == 1  # lost episodes are summed
    assert list(alone["task"]) == list(both[0]["task"]) == list(range(host_program.GROUPS * host_program.MEMBERS))
    assert list(alone["numbers"][1:]) == list(both[0]["numbers"][1:])
    for name in alone:
        np.testing.assert_array_equal(both[0][name], both[1][name], err_msg=name)
    for name in ("loss", "tokens", "advantage"):
        np.testing.assert_allclose(both[0][name], alone[name], atol=2e-5, err_msg=name)
    # Gradients differ by about 1e-5 of their norm, and about as large a share of their elements is smaller than that.
    # Adam divides each by its own size, so that these may be two steps apart: sqrt(4e-5) of the way that all have gone.
    for path, start in jax.tree_util.tree_leaves_with_path(init_params(host_program.CONFIG, jax.random.key(0))):
        found, value = (x[f"param{jax.tree_util.keystr(path)}"] for x in (both[0], alone))
        assert np.linalg.norm(found - value) <= 0.01 * np.linalg.norm(value - start), path


# Which turns are left out is decided on every host, from what all have played.
LEAVING_OUT = (
    "--optimizer.skip-zero-advantages --optimizer.skip-gradient-share 0.1 --optimizer.sum-equal-turns"
    " --loss.kl-coef 0 --loss.entropy-coef 0"
).split()


@pytest.mark.slow
def test_a_run_on_two_hosts_stops_on_both_and_goes_on_on_one(tmp_path):
    """The command, on two devices each, then on one. SIGTERM reaches one host alone, in any part of an iteration."""
    two_each = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    out, address, running = tmp_path / "run", f"127.0.0.1:{free_port()}", []
    for index in range(2):
        command = [sys.executable, "-m", "proxmo_jax", "train", "--out", str(out), "--iterations", "4", *SMALL]
        command += ["--output.save-every", "1", "--hosts.coordinator", address, "--hosts.count", "2"]
        command += ["--hosts.index", str(index), *LEAVING_OUT]
        with (tmp_path / f"{index}.log").open("w", encoding="utf-8") as log:
            running.append(subprocess.Popen(command, env=two_each, cwd=ROOT, stdout=log, stderr=log))
    deadline = time.monotonic() + 240
    while not (out / "checkpoints" / "1").exists() and time.monotonic() < deadline:
        assert all(process.poll() is None for process in running), (tmp_path / "0.log").read_text(encoding="utf-8")
        time.sleep(0.1)
    running[1].send_signal(signal.SIGTERM)
    codes = [process.wait(timeout=100) for process in running]
    said = [(tmp_path / f"{index}.log").read_text(encoding="utf-8") for index in range(2)]
    assert codes == [0, 0], said
    assert "Stopped and saved" in said[0]
    assert "Stopped" not in said[1]
    rows = read_metrics(out / "metrics.jsonl")
    resumed = proxmo("train", "--resume", "--out", str(out))
    assert resumed.returncode == 0, resumed.stderr
    every = read_metrics(out / "metrics.jsonl")
    assert [row["iteration"] for row in every] == [0, 1, 2, 3, 4]
    assert every[: len(rows)] == rows  # nothing was played again


@pytest.mark.slow
def test_a_missing_host_is_said(tmp_path):
    """The time-out ends the process with a sentence, not with JAX's abort."""
    code = (
        "from proxmo_jax.agent import hosts; from proxmo_jax.agent.settings import HostSettings;"
        f"hosts.start(HostSettings('127.0.0.1:{free_port()}', 2, 1, timeout=1))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", timeout=120, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match(r"proxmo: host 1 waited 1 s \(--hosts.timeout\), but no coordinator answers at 127.0.0.1:\d+", line)


def test_a_port_in_use_is_refused():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"host 0 cannot listen on port {port} .*in use"):
            hosts.start(HostSettings(f"127.0.0.1:{port}", 2, 0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "10.0.0.1"}, "must be an address and a port"),
        ({"coordinator": "10.0.0.1:99999", "count": 2, "index": 0}, "must be an address and a port"),
        ({"coordinator": "10.0.0.1:8476"}, "needs --hosts.count"),
        ({"coordinator": "10.0.0.1:8476", "count": 2, "index": 2}, "must lie between 0 and 1"),
        ({"coordinator": "10.0.0.1:8476", "count": 2}, "got None"),
        ({"index": 1}, "needs a --hosts.coordinator"),
        ({"count": 2}, "needs a --hosts.coordinator"),
    ],
)
def test_settings_that_cannot_work_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        HostSettings(**given)


def test_groups_must_divide_by_the_hosts():
    check_hosts(config_with(rollout__num_groups=16), 4)
    with pytest.raises(UserError, match=r"--rollout.num-groups must be a multiple of the 3 hosts, got 16"):
        check_hosts(config_with(rollout__num_groups=16), 3)


def test_rows_decoded_at_once_are_those_of_a_host():
    config = config_with(rollout__max_num_seqs=4, optimizer__rows_per_batch=32)
    check_devices(config, 16, hosts=4)
    with pytest.raises(UserError, match=r"--rollout.max-num-seqs must be a multiple of the 16 devices"):
        check_devices(config, 16)


def test_one_host_needs_nothing():
    """Every function returns what it is given."""
    mesh = make_mesh(fsdp=2)
    assert local_mesh(mesh) is mesh
    assert join_hosts(mesh, "anything") == "anything"
    assert by_host(mesh).shape == {"host": 1, "data": 4, "fsdp": 2, "tensor": 1}
    assert hosts.any_host(True)
    assert hosts.share(7) == slice(0, 7)
    assert hosts.of_first("x", 3) == 3
    with pytest.raises(UserError, match=r"^no disk$"), hosts.together("x"):
        raise UserError("no disk")


def arguments_in(text: str) -> list[str]:
    """The arguments of `train` in a launch script's command, without what the shell adds."""
    words = shlex.split(text.partition("train ")[2].partition(" $(")[0])
    return ["train", *words]


RECIPE = "--config alfworld_qwen2.5_1.5b --rollout.num-groups 16 --out".split()


def test_launch_scripts_start_this_version(tmp_path, monkeypatch):
    """Dry runs: the commands that the scripts would run on the hosts are `proxmo train` with the arguments given."""
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    given = ["train", *RECIPE, str(tmp_path / "a run")]
    dry = {**os.environ, "DRY_RUN": "1", "IMAGE": "i", "SHARE": "h:/s", "CLUSTER": "c", "ZONE": "z"}
    commands = []
    for line in (["launch/tpu_vm.sh", "pod", "z", "v5litepod-16"], ["launch/xpk.sh", "pod", "v5litepod-16"]):
        done = subprocess.run([*line, *given], cwd=ROOT, env=dry, capture_output=True, encoding="utf-8", check=True)
        commands.append(shlex.split(done.stdout.splitlines()[-1].replace("$'", "'"))[-1].replace("\\\\", "\\"))
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / "config.json").touch()
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nshift 2\necho "$JAX_LOCAL_DEVICE_IDS"\nfor word; do echo "$word"; done\n')
    srun.chmod(0o755)
    slurm = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_GPUS_ON_NODE": "4"}
    done = subprocess.run(
        ["launch/slurm.sbatch", *given[1:]], cwd=ROOT, env=slurm, capture_output=True, encoding="utf-8", check=True
    )
    assert done.stdout.splitlines() == ["0,1,2,3", *given, "--resume"]
    jobset = yaml.safe_load((ROOT / "launch" / "gke_jobset.yaml").read_text(encoding="utf-8"))
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    topology = job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = np.prod([int(n) for n in topology.split("x")])
    assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
    assert [arguments_in(command) for command in commands] == [given, given]
    for arguments in (given, arguments_in(container["command"][-1])):
        config = cli.parse(arguments, cli.find(arguments))
        assert config.rollout.num_groups == 16
