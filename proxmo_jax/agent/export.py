"""Write a trained policy as a Hugging Face folder: weights, config, tokenizer.

proxmo export runs/household out/policy      # the newest checkpoint; `transformers` and --model load the folder
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from proxmo_jax.agent import evaluate
from proxmo_jax.agent.make_player import make_player
from proxmo_jax.agent.report import terminal
from proxmo_jax.paths import free_target, plain_path
from proxmo_jax.policy import adapters
from proxmo_jax.policy.model_config import read_config
from proxmo_jax.policy.sharding import make_mesh, parameter_shardings
from proxmo_jax.policy.weights import load_weights, save_weights


@dataclass(frozen=True)
class Config:
    """What to write, and where."""

    run: tyro.conf.Positional[Path]
    """Folder of a training run."""
    target: tyro.conf.Positional[Path]
    """Folder to write; must not hold anything yet."""
    checkpoint: int | Literal["best"] | None = None
    """Iteration of the checkpoint, or best: the best one in the run's evaluations (default: the newest); 0 is the
    start."""


def main(config: Config, console: Console | None = None) -> Path:
    """Export; returns the folder. Raises UserError for a run or checkpoint that is not there, or a target in use."""
    console = console or terminal()
    free_target(config.target)
    asked = evaluate.Config(run=config.run, checkpoint=config.checkpoint)
    stored = evaluate.run_settings(asked)
    player = make_player(stored, make_mesh(0, stored.mesh.fsdp, stored.mesh.tensor))
    params, iteration = evaluate.trained_params(asked, stored, player)
    params, shape = adapters.without(params, player.config)
    config.target.mkdir(parents=True, exist_ok=True)
    with plain_path(config.target) as plain:
        files = save_weights(plain, params, shape)
        player.tokenizer.save_pretrained(plain)
        ends = {"eos_token_id": list(player.decoding.stop_ids), "pad_token_id": player.decoding.pad_id}
        (plain / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n", encoding="utf-8")
        size = sum(file.stat().st_size for file in files) / 2**20
        del params
        load_weights(plain, read_config(plain), parameter_shardings(player.mesh, shape))  # it can be read back
    console.print(
        f"{config.target}: iteration {iteration} of {config.run}, {size:.1f} MiB in {len(files)} file(s)",
        soft_wrap=True,
    )
    return config.target
