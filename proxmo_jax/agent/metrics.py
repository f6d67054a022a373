"""A run's metrics in TensorBoard and Weights & Biases; `metrics.jsonl` (`report.Metrics`) is always written."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imread
from rich.console import Console
from tensorboardX import SummaryWriter

from proxmo_jax.agent import hosts
from proxmo_jax.agent.settings import Config

# Our names in metrics.jsonl, and verl's or (completions/, sampling/) TRL's where they mean the same.
NAMES = {
    "train/reward": "critic/score/mean",
    "train/overlong_rate": "completions/clipped_ratio",
    "loss/policy": "actor/pg_loss",
    "loss/kl": "actor/kl_loss",
    "loss/entropy": "actor/entropy",
    "loss/clip_fraction": "actor/pg_clipfrac",
    "loss/approx_kl": "actor/ppo_kl",
    "loss/sampler_mismatch": "sampling/sampling_logp_difference/mean",
    "time/rollout": "timing_s/gen",
    "time/estimator": "timing_s/adv",
    "time/iteration": "timing_s/step",
    "time/eval": "timing_s/testing",
}


def shared_names(row: Mapping[str, float]) -> dict[str, float]:
    """A row of metrics under the names of `NAMES`, without its iteration.

    Args:
        row: as in metrics.jsonl.

    Returns:
        Numbers by name; docs/metrics.md lists the names.
    """
    return {NAMES.get(name, name): float(value) for name, value in row.items() if name != "iteration"}


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder."""

    def __init__(self, config: Config, kept: int | None):
        # TensorBoard hides what an interrupted run has written after the checkpoint that it resumes from.
        purge = 0 if kept is None else kept + 1
        folder = str(config.output.dir / "tensorboard")
        self.writer = SummaryWriter(folder, purge_step=purge if config.resume else None, flush_secs=10)
        self.writer.add_text("config", as_code(json.dumps(settings_of(config), indent=1)), kept or 0)

    def write(self, row: Mapping[str, float]) -> None:
        for name, value in shared_names(row).items():
            self.writer.add_scalar(name, value, row["iteration"])

    def text(self, name: str, text: str, iteration: int) -> None:
        self.writer.add_text(name, as_code(text), iteration)

    def image(self, name: str, path: Path, iteration: int) -> None:
        pixels = np.rint(imread(path)[..., :3] * 255).astype(np.uint8)
        self.writer.add_image(name, pixels, iteration, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; its name and project are those of WANDB_NAME and WANDB_PROJECT, if they are set."""

    def __init__(self, wandb: Any, config: Config, mode: str | None):
        self.wandb = wandb
        folder = config.output.dir
        identity = folder / "wandb_run_id.txt"
        known = identity.read_text(encoding="utf-8").strip() if config.resume and identity.is_file() else None
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "proxmo-jax"),
            name=os.environ.get("WANDB_NAME", folder.name),
            dir=str(folder), config=settings_of(config), mode=mode, id=known, resume="allow" if known else None,
            settings=wandb.Settings(silent=True, console="off"),  # the terminal is the progress bar's
        )  # fmt: skip
        identity.write_text(self.run.id, encoding="utf-8")
        # Its own step only grows, which a run resumed from an earlier checkpoint does not.
        self.run.define_metric("iteration")
        self.run.define_metric("*", step_metric="iteration")

    def write(self, row: Mapping[str, float]) -> None:
        self.run.log({**shared_names(row), "iteration": row["iteration"]})

    def text(self, name: str, text: str, iteration: int) -> None:
        self.run.log({name: self.wandb.Table(columns=["text"], data=[[text]]), "iteration": iteration})

    def image(self, name: str, path: Path, iteration: int) -> None:
        self.run.log({name: self.wandb.Image(str(path)), "iteration": iteration})

    def close(self) -> None:
        self.run.finish()


class Trackers:
    """All that a run reports to beside its own files; with several hosts the first one does."""

    def __init__(self, config: Config, kept: int | None, console: Console):
        """Open what `--report-to` names.

        Args:
            config: the run's settings; its folder is there.
            kept: the last iteration whose row of metrics.jsonl a resumed run keeps; None if all is new.
            console: where it is said what cannot be reported to.
        """
        self.trackers: list[TensorBoard | WeightsAndBiases] = []
        if not hosts.is_first():
            return
        if "tensorboard" in config.output.report_to:
            self.trackers.append(TensorBoard(config, kept))
        if "wandb" in config.output.report_to:
            found = weights_and_biases(config, console)
            self.trackers += [found] if found else []

    def write(self, row: Mapping[str, float]) -> None:
        """Report a row of metrics.jsonl."""
        for tracker in self.trackers:
            tracker.write(row)

    def episodes(self, path: Path, iteration: int) -> None:
        """Report a file of sample episodes."""
        for tracker in self.trackers:
            tracker.text(path.stem, path.read_text(encoding="utf-8", errors="replace"), iteration)

    def curve(self, path: Path, iteration: int) -> None:
        """Report the picture of the learning curve."""
        for tracker in self.trackers:
            tracker.image(path.stem, path, iteration)

    def close(self) -> None:
        """Write all that is left."""
        for tracker in self.trackers:
            tracker.close()


def weights_and_biases(config: Config, console: Console) -> WeightsAndBiases | None:
    """Weights & Biases, offline without a key; None, with a line that says why, where it cannot be had."""
    try:
        import wandb
    except ImportError:
        console.print("--report-to wandb: the package is not installed (pip install 'proxmo-jax[wandb]'); going on")
        return None
    try:
        mode = os.environ.get("WANDB_MODE")
        if mode is None and not wandb.login(prompt=False):
            mode = "offline"
            console.print(
                "--report-to wandb: no API key (WANDB_API_KEY, or wandb login); recording offline, to be uploaded with"
                f" wandb sync {config.output.dir}/wandb/offline-run-*",
                soft_wrap=True,
            )
        opened = WeightsAndBiases(wandb, config, mode)
    except wandb.errors.Error as error:
        console.print(f"--report-to wandb: {' '.join(str(error).split())}; going on without", soft_wrap=True)
        return None
    if opened.run.url:
        console.print(f"Weights & Biases: {opened.run.url}", soft_wrap=True)
    return opened


def as_code(text: str) -> str:
    """Text that TensorBoard, which reads Markdown, shows as it is."""
    clean = text.encode("utf-8", "replace").decode()  # half a surrogate pair has no place in an event file
    return "\n".join(f"    {line}" for line in clean.splitlines())


def settings_of(config: Config) -> dict[str, Any]:
    """Settings as JSON takes them, in nested dictionaries."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items()}
        return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))
