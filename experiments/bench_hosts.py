"""Train the small agent on 1, 2 and 4 hosts (processes of this machine), and compare parameters and times.

    proxmo bench hosts                  # the same global batch on 1, 2 and 4 hosts: largest difference of a parameter
    proxmo bench hosts --scaling        # and a batch that grows with the devices: times of estimator and update

In the first table all have as many devices in all as the most hosts. The report is printed and appended to
BENCHMARKS.md.
"""

import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from experiments import bench
from proxmo_jax.agent import evaluate
from proxmo_jax.agent.make_player import make_player
from proxmo_jax.agent.report import read_metrics, terminal
from proxmo_jax.agent.run_files import stored_config
from proxmo_jax.errors import UserError
from proxmo_jax.policy.sharding import make_mesh

SMALL = (
    "--env.train-games 48 --env.eval-games 8 --rollout.group-size 4 --rollout.max-turns 6 --warm-start.steps 20"
    " --model.hidden-size 64 --model.layers 2 --env.workers 1 --output.eval-every 100 --output.save-every 100"
).split()


@dataclass(frozen=True)
class Config:
    """What to train."""

    hosts: tuple[int, ...] = (1, 2, 4)
    """Numbers of hosts; each divides the largest."""
    iterations: int = 2
    scaling: bool = False
    """Also train with 4 groups and 8 packed rows for each device: one host with more devices, more hosts with one."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Devices of one host, for the scaling."""
    append: Path | None = Path("BENCHMARKS.md")
    """File to append the report to."""


def main(config: Config, console: Console | None = None) -> str:
    """Run the benchmark; returns the Markdown that was appended."""
    console = console or terminal()
    bench.require_positive(config, ("iterations",))
    if config.scaling and (not config.devices or min(config.devices) < 1):
        raise UserError(f"--devices must be positive numbers, got {config.devices}")
    most = max(config.hosts, default=0)
    if not config.hosts or min(config.hosts) < 1 or any(most % count for count in config.hosts):
        raise UserError(f"--hosts must be numbers that divide the largest, got {config.hosts}")
    lines = ["| hosts | devices each | largest difference of a parameter from the first row |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        first: list[np.ndarray] = []
        for count in config.hosts:
            out = Path(folder) / f"same{count}"
            batch = ["--rollout.num-groups", str(4 * most), "--optimizer.rows-per-batch", str(8 * most)]
            train(out, count, most // count, [*batch, "--iterations", str(config.iterations)])
            params = parameters(out)
            first = first or params
            apart = max(float(np.abs(a - b).max()) for a, b in zip(first, params, strict=True))
            lines.append(f"| {count} | {most // count} | {apart:.2g} |")
            console.print(lines[-1])
        if config.scaling:
            lines += ["", "| hosts | devices each | estimator, s | update, s | time a device beside the first row's |"]
            lines += ["|---|---|---|---|---|"]
            alone: dict[str, float] = {}
            for hosts, each in [(1, n) for n in config.devices] + [(n, 1) for n in config.hosts if n > 1]:
                count = hosts * each
                out = Path(folder) / f"scaled{hosts}x{each}"
                batch = ["--rollout.num-groups", str(4 * count), "--optimizer.rows-per-batch", str(8 * count)]
                train(out, hosts, each, [*batch, "--iterations", str(config.iterations + 2)])
                rows = read_metrics(out / "metrics.jsonl")[2:]  # the first iteration compiles
                took = {part: min(row[f"time/{part}"] for row in rows) for part in ("estimator", "update")}
                alone = alone or {part: seconds / count for part, seconds in took.items()}
                ratios = [f"{seconds / count / alone[part]:.2f}" for part, seconds in took.items()]
                times = " | ".join(f"{seconds:.3f}" for seconds in took.values())
                lines.append(f"| {hosts} | {each} | {times} | {' and '.join(ratios)} |")
                console.print(lines[-1])
    head = [
        bench.heading("Several hosts", f"proxmo bench hosts{' --scaling' if config.scaling else ''}"), "",
        f"{bench.host_and_devices()}, gloo. Times: the best of {config.iterations + 1} iterations. Options of"
        f" `proxmo train`: `{' '.join(SMALL)}`.", "",
    ]  # fmt: skip
    return bench.publish("\n".join(head + lines), config.append, console)


def train(out: Path, count: int, devices: int, arguments: list[str]) -> None:
    """Train on so many hosts with so many devices each. Raises UserError with what a host says that fails."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{trial.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-m", "proxmo_jax", "train", "--out", str(out), *SMALL, *arguments]
    running = []
    for index in range(count):
        hosts = ["--hosts.coordinator", address, "--hosts.count", str(count), "--hosts.index", str(index)]
        log = (out.parent / f"{out.name}.{index}.log").open("w+", encoding="utf-8")
        part = command if count == 1 else [*command, *hosts]
        running.append((subprocess.Popen(part, env=environment, stdout=log, stderr=log), log))
    codes = [process.wait() for process, _ in running]
    for index, (code, (_, log)) in enumerate(zip(codes, running, strict=True)):
        log.seek(0)
        said = log.read()
        log.close()
        if code:
            raise UserError(f"host {index} of {count} ended with status {code}: {said[-1000:]}")


def parameters(run: Path) -> list[np.ndarray]:
    """The trained parameters of a run."""
    stored = stored_config(run)
    player = make_player(stored, make_mesh(devices=jax.devices()[:1]))
    params, _ = evaluate.trained_params(evaluate.Config(run), stored, player)
    return [np.asarray(x) for x in jax.tree.leaves(params)]
