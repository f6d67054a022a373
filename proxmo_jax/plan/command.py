"""What a training run needs of a TPU slice: memory, time and the share of each part, without a TPU or weights.

    proxmo plan --model qwen2.5-7b --topology v5e:16x16 --recipe webshop_qwen2.5_7b
    proxmo plan --model qwen2.5-1.5b --topology v5e:4x4 --search --json plan.json

It compiles the programs that `proxmo train` with the same settings would call. Takes all options of `train`.
"""

import dataclasses
import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from proxmo_jax.agent import run_files
from proxmo_jax.agent.report import progress_bar, terminal
from proxmo_jax.agent.settings import Config as TrainConfig
from proxmo_jax.agent.settings import need
from proxmo_jax.paths import write_whole
from proxmo_jax.plan.chips import devices, prepare_compiler, topology
from proxmo_jax.plan.iteration import Lengths, Plan, make_plan
from proxmo_jax.plan.report import text
from proxmo_jax.plan.search import candidates, with_mesh
from proxmo_jax.plan.shapes import shape
from proxmo_jax.policy.attention import attention_kind

RECIPE = "alfworld_qwen2.5_1.5b"  # whose settings are taken if none is named


def before_jax_starts(_: object) -> None:
    """Called by the command line with the command's settings."""
    prepare_compiler()


@dataclass(frozen=True)
class Config:
    """The slice, what is assumed of the episodes, and the settings of the run."""

    topology: str = "v5e:4x4"
    """The slice: v5e, v5p or v6e, and its sizes, such as v5e:16x16 or v5p:4x4x4."""
    recipe: str = ""
    """Recipe or TOML file with the settings of the run, as --config of train; default: alfworld_qwen2.5_1.5b."""
    mesh: str = ""
    """Sizes of the mesh's axes data,fsdp,tensor, such as 1,16,1; default: --mesh.fsdp, --mesh.tensor and the rest."""
    search: bool = False
    """Try the meshes that the model and the slice allow, and rank those that fit by the time of an iteration."""
    search_limit: int = 4
    """Meshes that --search compiles, at most: those that promise most by their memory and what they gather."""
    turns: int = 0
    """Turns of an episode; 0: the limit."""
    prompt_tokens: int = 0
    """Tokens of a prompt on average; 0: the limit."""
    response_tokens: int = 0
    """Tokens of a response on average; 0: the limit."""
    longest_response: int = 0
    """Tokens of the longest response of a turn, which the others wait for; 0: the limit."""
    only: tuple[str, ...] = ()
    """Programs to compile: 'gather weights', turn, estimator, packing, log-probs, update; none: all."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File to write the plan to, as JSON."""
    run: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    """Settings of the run, as of proxmo train."""

    def __post_init__(self) -> None:
        for name in ("turns", "prompt_tokens", "response_tokens", "longest_response"):
            value = getattr(self, name)
            need(value >= 0, f"--{name.replace('_', '-')} must be at least 0, got {value}")
        need(self.search_limit >= 1, f"--search-limit must be at least 1, got {self.search_limit}")


def default(arguments: list[str]) -> Config:
    """The settings that the options start from: those of the recipe, by default a published one."""
    return Config(run=run_files.default(with_recipe(arguments)))


def with_recipe(arguments: list[str]) -> list[str]:
    """The arguments with `--recipe` under the name that `train` has for it, or with the default one."""
    found = [re.sub("^--recipe(?==|$)", "--config", word) for word in arguments]
    named = any(word.split("=")[0] in ("--config", "--resume") for word in found)
    return found if named else [*found, "--config", RECIPE]


def main(config: Config, console: Console | None = None) -> bool:
    """Plan and report; whether a plan fits. Raises UserError for a model, slice or settings that cannot be."""
    console = console or terminal()
    where = topology(config.topology)
    need(config.run.model.path != "", "--model must be a known shape or a folder with a config.json, got none")
    run = with_mesh(config.run, config.mesh, where) if config.mesh else config.run
    names = ("dtype", "param_dtype", "remat", "lora_rank", "lora_alpha")
    choices = {name: getattr(run.model, name) for name in names}
    attention = attention_kind(run.model.attention, run.optimizer.row_length, tpu=True)
    policy = shape(run.model.path, attention=attention, **choices)
    found, lengths = devices(where), lengths_of(config)
    recipe = config.recipe or str(run.config or RECIPE)
    runs = [run]
    if config.search:
        runs = candidates(run, policy, where, found, lengths)
        chosen = runs[: config.search_limit]
        console.print(f"{len(runs)} meshes have room for what is kept; compiling {len(chosen)}.", highlight=False)
        runs = chosen
    plans, began = [], time.time()
    with progress_bar(console) as bar:
        task = bar.add_task("compiling", total=None, note="")
        for number, settings in enumerate(runs):

            def note(name: str, number: int = number) -> None:
                bar.update(task, advance=1, note=f"{name}, mesh {number + 1} of {len(runs)}")

            plans.append(make_plan(settings, policy, where, found, lengths, recipe, config.only, note))
            if number == 0:
                bar.update(task, total=len(runs) * len(plans[0].programs))
    plans.sort(key=lambda plan: (not plan.fits, plan.seconds or float("inf")))
    for plan in plans:
        console.print(text(plan), markup=False, highlight=False, soft_wrap=True)
        console.print()
    console.print(f"Compiled in {time.time() - began:.0f} s.", highlight=False)
    if config.json is not None:
        write(config.json, plans)
    return any(plan.fits for plan in plans)


def lengths_of(config: Config) -> Lengths:
    """What is assumed of the episodes. Raises UserError for more than the limits."""
    rollout = config.run.rollout
    limits = {
        "turns": rollout.max_turns,
        "prompt_tokens": rollout.max_prompt_length,
        "response_tokens": rollout.max_response_length,
        "longest_response": rollout.max_response_length,
    }
    for name, limit in limits.items():
        value = getattr(config, name)
        need(value <= limit, f"--{name.replace('_', '-')} must be at most the run's limit {limit}, got {value}")
    return Lengths(*(getattr(config, name) or limit for name, limit in limits.items()))


def write(path: Path, plans: list[Plan]) -> None:
    """Write plans as JSON, the best first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"plans": [dataclasses.asdict(plan) for plan in plans]}
    write_whole(path, json.dumps(values, indent=1) + "\n")
