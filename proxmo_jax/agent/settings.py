"""The settings of a training run, one frozen dataclass for each part; each checks itself when it is made.

On the command line: `--estimator.temperature 0.2 --loss.clip-high 0.28`; in a recipe: a table `[estimator]` with
`temperature = 0.2`.
Names are those of TRL, verl and Tunix where the meaning is the same.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
from tyro.conf import arg

from envs_bridge.environments import find
from proxmo_jax.agent.chat import template_arguments
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.presets import PRESETS, proxmo
from proxmo_jax.estimator.types import Settings
from proxmo_jax.policy.attention import BLOCK
from proxmo_jax.policy.decoder import PolicyConfig
from proxmo_jax.training.losses import LossSettings

Dtype = Literal["float32", "bfloat16"]
INVALID_PENALTY = 1.5  # default of training runs; published: 0.1 beside a reward of 10


def need(ok: bool, message: str) -> None:
    """Raise UserError with the message unless `ok`."""
    if not ok:
        raise UserError(message)


def option(*names: str) -> str:
    """A setting, by its part and name or both in one, as it is written on the command line."""
    return f"--{'.'.join(names)}".replace("_", "-")


def at_least(least: float, part: str, settings: Any, *names: str) -> None:
    """Refuse settings that are not finite numbers of at least `least`."""
    for name in names:
        value = getattr(settings, name)
        need(math.isfinite(value) and value >= least, f"{option(part, name)} must be at least {least:g}, got {value:g}")


def above_zero(part: str, settings: Any, *names: str) -> None:
    """Refuse settings that are not finite numbers above 0."""
    for name in names:
        value = getattr(settings, name)
        need(math.isfinite(value) and value > 0, f"{option(part, name)} must be above 0, got {value:g}")


def shares(part: str, settings: Any, *names: str) -> None:
    """Refuse settings outside [0, 1]."""
    for name in names:
        value = getattr(settings, name)
        need(0 <= value <= 1, f"{option(part, name)} must lie between 0 and 1, got {value:g}")


@dataclass(frozen=True)
class EnvSettings:
    """The environment and its tasks."""

    name: Annotated[str, arg(aliases=["--env"])] = "household"
    """household (games generated into the run's folder), alfworld (ALFWorld's own games, from --data), shop (WebShop's
    rules in our engine, on --data or on generated products), webshop (WebShop itself, from --env.webshop), or
    module:attribute of an environment of your own (docs/tutorial.md)."""
    data: Annotated[Path | None, arg(aliases=["--data"])] = None
    """ALFWorld's data folder (default: $ALFWORLD_DATA), or a shop's: a folder with WebShop's items_shuffle*.json,
    items_ins_v2*.json and items_human_ins.json, or one of its product files (default: generated products)."""
    level: Annotated[Literal["easy", "medium", "hard"], arg(aliases=["--level"])] = "easy"
    """Size of the generated houses."""
    train_games: int = 2000
    """Games to generate, or the most to take of a data set."""
    eval_games: int = 192
    """Held-out games: half in new houses (valid_unseen), half new games in houses of the training set (valid_seen)."""
    goals: Literal["human", "synthetic"] = "human"
    """A shop's goals: written by people, or every combination of a product's options."""
    engine: Literal["fast", "textworld", "textworld-stock"] = "fast"
    """Household engine: fast (ours), textworld (ALFWorld's own, with memoised parsing) or textworld-stock (unchanged).
    Games that ours does not implement always go to ALFWorld's own."""
    webshop: Path | None = None
    """Checkout of WebShop, run by the interpreter --env.python, which needs WebShop's packages."""
    python: str = ""
    """Interpreter of the worker processes, if the upstream packages live in another one; default: this one."""
    workers: int = 2
    """Worker processes."""
    worker_timeout: float = 0.0
    """Seconds after which a worker that does not answer is replaced; 0: 60, and 900 with an upstream engine."""
    reward: Literal["success", "score"] = "success"
    """What is rewarded: success (published; in a shop a score of 1), or a shop's score."""
    reward_scale: float = 10.0
    """Factor of the reward."""

    def __post_init__(self) -> None:
        find(self.name)
        at_least(1, "env", self, "train_games", "eval_games", "workers")
        at_least(0, "env", self, "worker_timeout")
        above_zero("env", self, "reward_scale")


@dataclass(frozen=True)
class RolloutSettings:
    """How episodes are played and responses are sampled."""

    num_groups: int = 16
    """Tasks in an iteration."""
    group_size: int = 8
    """Attempts at each task."""
    max_turns: int = 20
    """Turns after which an episode ends."""
    prompt: Literal["notes", "history"] = "notes"
    """What the policy reads: notes (short, for small policies) or history (the last turns as they were)."""
    history: int = 2
    """Past turns in a history prompt."""
    list_actions: bool = True
    """Whether a history prompt lists the admissible actions."""
    max_prompt_length: int = 128
    """Tokens of a prompt."""
    max_response_length: int = 8
    """Tokens of a response."""
    temperature: float = 1.0
    """Sampling temperature in training."""
    top_k: int = 0
    """Sample from so many of the likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability; 1: all."""
    stop: tuple[str, ...] = ()
    """Stop strings of a language model, such as '</action>', beside its end-of-text tokens."""
    max_num_seqs: int = 0
    """Responses decoded at the same time, which bounds the KV cache; the other prompts wait for a free row (continuous
    batching). 0: all."""
    gather_weights: bool = True
    """Sample with weights that are gathered over `--mesh.fsdp` once a rollout; off: gathered layer by layer for each
    token, where a device has no room for the share that `--mesh.tensor` leaves it, in the dtype of computation."""
    penalise_inadmissible: bool = True
    """Count commands that the environment does not admit as invalid; published: only ill-formed responses are."""
    overlong: Literal["keep", "mask", "penalise"] = "keep"
    """What is done with long responses (DAPO, arXiv 2503.14476): keep; mask (those that reach the limit without ending
    leave the loss; TRL's mask_truncated_completions); or penalise (verl's overlong_buffer: the turn's reward falls over
    the last --rollout.overlong-buffer tokens of the limit)."""
    overlong_buffer: int = 0
    """Tokens before the limit of a response over which its penalty grows (DAPO: a fifth of the limit)."""
    overlong_penalty: float = 1.0
    """Penalty of a response of the limit's length (verl's penalty_factor); DAPO: 1 where success is 1 and failure
    -1."""
    task_sampling: Literal["by_success", "uniform"] = "by_success"
    """How the tasks of an iteration are drawn: by_success (kinds of middling success more often, as their groups have
    more to say; weight sqrt(p (1 - p)) + 0.1, where p is a running mean of the kind's success and begins at 0.5) or
    uniform (published)."""
    dynamic_sampling: int = 0
    """Dynamic sampling (DAPO, arXiv 2503.14476; verl's filter_groups): groups whose attempts were all solved, or all
    not (with --env.reward score: have the same score) are replaced by groups of other games, so many times in an
    iteration at most (verl's max_num_gen_batches is one more); groups of that kind that are left then are kept. 0: off.
    The metric train/success_rate counts all that is played, train/success_rate_filtered and the other metrics of
    train/ what is trained on."""

    def __post_init__(self) -> None:
        at_least(1, "rollout", self, "num_groups", "max_turns", "max_prompt_length", "max_response_length")
        at_least(0, "rollout", self, "history", "top_k", "max_num_seqs", "dynamic_sampling")
        above_zero("rollout", self, "temperature")
        need(
            self.group_size >= 2,
            f"--rollout.group-size must be at least 2, got {self.group_size}: a group compares attempts at one task",
        )
        need(0 < self.top_p <= 1, f"--rollout.top-p must be above 0 and at most 1, got {self.top_p:g}")
        need(all(self.stop), "--rollout.stop: stop strings must not be empty")
        above_zero("rollout", self, "overlong_penalty")
        if self.overlong == "penalise":
            need(
                1 <= self.overlong_buffer <= self.max_response_length,
                f"--rollout.overlong-buffer must lie between 1 and the {self.max_response_length} tokens of"
                f" --rollout.max-response-length with --rollout.overlong penalise, got {self.overlong_buffer}",
            )
        else:
            need(self.overlong_buffer == 0, "--rollout.overlong-buffer needs --rollout.overlong penalise")


@dataclass(frozen=True)
class PolicyLossSettings:
    """The policy loss."""

    clip: float = 0.2
    """PPO clip range."""
    clip_high: float = 0.0
    """Upper end of the clip range where it differs from --loss.clip (DAPO's clip-higher); 0: the same."""
    dual_clip: float = 3.0
    """Bound of the loss for negative advantages (dual-clip PPO)."""
    kl_estimator: Literal["kl", "abs", "mse", "low_var_kl"] = "low_var_kl"
    """Estimator of the KL to the reference: kl (k1), abs, mse (k2) or low_var_kl (k3)."""
    kl_coef: float = 0.01
    """Coefficient of the KL to the reference; 0: no reference is computed."""
    entropy_coef: float = 0.001
    """Coefficient of the entropy bonus."""
    aggregation: Literal["token_mean", "turn_mean_token_sum", "turn_mean_token_mean", "turn_sum_over_length"] = (
        "token_mean"
    )
    """How token losses make a loss."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Probability ratio of each token (published), or of each whole action, normalised by its length (GAGPO, GSPO)."""
    old_log_probs: Literal["sampler", "trainer"] = "sampler"
    """Whose log-probs are the ratio's denominator: the sampler's, or the trainer's (one more forward pass)."""
    importance_cap: float = 0.0
    """Truncated importance sampling between sampler and trainer (Yao et al., 2025; verl's tis_imp_ratio_cap): the
    surrogate of a token is multiplied by min(pi_trainer / pi_sampler, cap). Usual: 2, with --loss.old-log-probs
    trainer; 0: off."""

    def __post_init__(self) -> None:
        above_zero("loss", self, "clip")
        shares("loss", self, "clip")
        at_least(0, "loss", self, "clip_high", "kl_coef", "entropy_coef", "importance_cap")
        need(
            self.importance_cap == 0 or self.old_log_probs == "trainer",
            f"--loss.importance-cap {self.importance_cap:g} needs --loss.old-log-probs trainer, whose log-probs it"
            " compares with the sampler's",
        )
        need(
            math.isfinite(self.dual_clip) and self.dual_clip > 1,
            f"--loss.dual-clip must be above 1, got {self.dual_clip:g}",
        )


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and how a rollout is cut into batches."""

    learning_rate: float = 3e-4
    """Peak learning rate."""
    final_rate: float = 0.05
    """Fraction of the learning rate left at the last iteration (cosine schedule); published: constant, 1."""
    decay_iterations: int = 0
    """Iteration at which the cosine ends; 0: the last one. A run that is made longer keeps that of its first plan."""
    num_iterations: int = 1
    """Passes over each rollout (PPO epochs)."""
    rows_per_batch: int = 32
    """Packed rows in a mini-batch."""
    skip_zero_advantages: bool = False
    """Leave turns whose advantage is exactly 0 out of the update, such as those of a group that won nothing. Without KL
    and entropy terms they have no gradient, but they take time, and count in token means."""
    skip_gradient_share: float = 0.0
    """Leave the turns with the smallest gradients out of the update, as many as have together at most this share of all
    turns' (estimated: |advantage| times the probability that was not on the sampled tokens). Saves time where the
    policy is sure of most of its commands. Needs an update without KL and entropy terms, as those train all turns."""
    sum_equal_turns: bool = False
    """Train turns of one prompt and response once, with the sum of their advantages: less time where the policy repeats
    itself, and the same gradient as long as none is clipped, but means over fewer turns and fewer mini-batches. With
    one of the two options above."""
    micro_batch_tokens: int = 1280
    """Tokens a device computes at once, at least one row. Gradients are accumulated over the micro-batches of a
    mini-batch: the result is the same, memory and speed are not."""
    row_length: int = 160
    """Tokens of a packed row."""
    response_share: float = 0.125
    """Fraction of a row's tokens that responses may take."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradient clipping by the global norm."""
    moments_dtype: Dtype = "float32"
    """Dtype of Adam's moments between steps."""

    def __post_init__(self) -> None:
        above_zero("optimizer", self, "learning_rate", "max_grad_norm")
        at_least(0, "optimizer", self, "weight_decay", "decay_iterations")
        at_least(1, "optimizer", self, "num_iterations", "rows_per_batch", "micro_batch_tokens", "row_length")
        shares("optimizer", self, "final_rate", "response_share")
        need(
            0 <= self.skip_gradient_share < 1,
            f"--optimizer.skip-gradient-share must be from 0 to below 1, got {self.skip_gradient_share:g}",
        )
        need(
            self.skip_zero_advantages or self.skip_gradient_share > 0 or not self.sum_equal_turns,
            "--optimizer.sum-equal-turns needs --optimizer.skip-zero-advantages or --optimizer.skip-gradient-share",
        )


@dataclass(frozen=True)
class ModelSettings:
    """The policy: a small one made for the run, or a pretrained language model."""

    path: Annotated[str, arg(aliases=["--model"])] = ""
    """Hugging Face folder or hub id of a Llama, Qwen2, Qwen2.5 or Qwen3; without one a small policy is made."""
    dtype: Dtype = "float32"
    """Compute dtype of a language model; CPUs sample in float32, which is faster there for few rows."""
    param_dtype: Dtype = "float32"
    """Dtype of its parameters."""
    attention: Literal["auto", "dense", "splash"] = "auto"
    """Attention over training rows: dense, splash (JAX's TPU kernel; rows of a multiple of 128 tokens) or auto: splash
    on a TPU where it can."""
    remat: Literal["none", "full", "dots"] = "none"
    """Rematerialisation of a layer in the backward pass: none, full, or dots (all but products with weights)."""
    lora_rank: int = 0
    """Rank of LoRA adapters that are trained in place of a language model's weights; 0: the weights are trained."""
    lora_alpha: float = 32.0
    """LoRA scale: the adapters' product is multiplied by this over the rank."""
    chat_template_args: tuple[str, ...] = ()
    """Arguments of a language model's chat template as name=value, such as enable_thinking=false (in a recipe, a
    table)."""
    hidden_size: int = 64
    """Width of a small policy, a multiple of 32."""
    layers: int = 2
    """Layers of a small policy."""

    def __post_init__(self) -> None:
        at_least(0, "model", self, "lora_rank")
        above_zero("model", self, "lora_alpha")
        at_least(1, "model", self, "hidden_size", "layers")
        template_arguments(self.chat_template_args)
        heads, shared = self.hidden_size // 16, self.hidden_size // 32
        need(
            shared > 0 and heads % shared == 0,
            f"--model.hidden-size must be a multiple of 32, got {self.hidden_size}: {heads} heads cannot share {shared}"
            " key-value heads",
        )


@dataclass(frozen=True)
class WarmStartSettings:
    """Behaviour cloning of demonstrations (supervised fine-tuning), before reinforcement learning."""

    steps: int | None = None
    """Optimiser steps; a language model may have 0. Default: 1500 for a small policy, 0 for a language model."""
    thoughts: bool = True
    """Whether a language model's demonstrations give a reason inside the think tags."""
    learning_rate: float = 4e-3
    """Peak learning rate."""
    search_rate: float = 1.0
    """How much the demonstrator has to search: from 0 (it knows where everything is) to 1 (it knows nothing)."""
    mistake_rate: float = 0.9
    """How often a careless demonstrator wastes a turn, though never two in a row."""
    careless_share: float = 0.15
    """Last part of the steps that clones careless demonstrations, so that something is left to learn."""
    demonstrations: Path | None = None
    """Episodes to clone beside those of the environment's demonstrator, or alone where it has none: a file of `proxmo
    play --keep`."""
    from_run: Path | None = None
    """Take the warm start and tokenizer of another run's folder instead."""

    def __post_init__(self) -> None:
        if self.steps is not None:
            at_least(0, "warm_start", self, "steps")
        above_zero("warm_start", self, "learning_rate")
        shares("warm_start", self, "search_rate", "mistake_rate", "careless_share")


@dataclass(frozen=True)
class MeshSettings:
    """The device mesh; devices that these do not use split batches alone (data parallelism)."""

    fsdp: int = 1
    """Devices over which parameters and batches are sharded."""
    tensor: int = 1
    """Devices over which heads, the MLP's width and the vocabulary are sharded."""

    def __post_init__(self) -> None:
        at_least(1, "mesh", self, "fsdp", "tensor")


@dataclass(frozen=True)
class HostSettings:
    """The hosts (processes) of a run. On a TPU pod, under Slurm and in a Kubernetes Job they find each other."""

    coordinator: str = ""
    """Address and port of host 0, such as 10.0.0.1:8476, at which the hosts meet. All of them get the same."""
    count: int = 0
    """Number of hosts; 0: found by itself, and one host without a --hosts.coordinator."""
    index: int | None = None
    """Number of this host, from 0. Host 0 reports and writes the run's files. Default: found by itself."""
    timeout: int = 300
    """Seconds to wait for all hosts at the start."""
    heartbeat: int = 100
    """Seconds without a sign of life after which a host is given up, and the run with it."""

    def __post_init__(self) -> None:
        at_least(0, "hosts", self, "count")
        at_least(1, "hosts", self, "timeout", "heartbeat")
        if not self.coordinator:
            need(self.index is None, "--hosts.index needs a --hosts.coordinator")
            need(self.count <= 1, "--hosts.count needs a --hosts.coordinator; without one the hosts find each other")
            return
        host, _, port = self.coordinator.rpartition(":")
        need(
            bool(host) and port.isdecimal() and 0 < int(port) < 1 << 16,
            f"--hosts.coordinator must be an address and a port, such as 10.0.0.1:8476, got {self.coordinator!r}",
        )
        need(self.count > 0, f"--hosts.coordinator {self.coordinator} needs --hosts.count, the number of hosts")
        need(
            self.index is not None and 0 <= self.index < self.count,
            f"--hosts.index must lie between 0 and {self.count - 1} (--hosts.count - 1), got {self.index}",
        )


@dataclass(frozen=True)
class OutputSettings:
    """What is written, and when."""

    dir: Annotated[Path, arg(aliases=["--out"])] = Path("runs/household")
    """Folder of the run; must be new, or hold this run and be given with --resume."""
    eval_every: int = 10
    """Iterations between evaluations on held-out games."""
    eval_temperature: float = 0.4
    """Sampling temperature of evaluations."""
    eval_turns: int = 0
    """Turns after which an episode of an evaluation ends; 0: as in training."""
    save_every: int = 10
    """Iterations between checkpoints."""
    save_minutes: float = 10.0
    """Minutes after which the next iteration, or step of the warm start, is followed by a checkpoint; 0: never."""
    keep: int = 2
    """Newest checkpoints that are kept, beside the one that was best in evaluation."""
    grace_seconds: float = 25.0
    """Seconds from a signal (SIGTERM, Ctrl-C) to the end of the process at the latest, even if it is compiling;
    schedulers usually grant 30. 0: no limit."""
    watchdog_seconds: float = 1800.0
    """Seconds without progress (a turn, an update, a compilation) after which the part that does not go on is named,
    and the stacks of all threads are written into the run's folder; 0: never."""
    profile: Annotated[int, arg(aliases=["--profile"])] = 0
    """Number of an iteration of which a trace is written into the run's folder, for Perfetto (ui.perfetto.dev); the
    first one compiles the programs. 0: none."""
    report_to: Annotated[tuple[Literal["tensorboard", "wandb"], ...], arg(aliases=["--report-to"])] = ("tensorboard",)
    """Where metrics, sample episodes and the learning curve go beside the run's folder (TRL's report_to): tensorboard
    (event files in its folder tensorboard/), wandb (Weights & Biases, pip install 'proxmo-jax[wandb]'), both, or none
    (no value). metrics.jsonl is always written."""
    keep_rollouts: Annotated[int, arg(aliases=["--keep-rollouts"])] = 10
    """Iterations between rollouts that are kept in rollouts/, with prompts and responses, for `proxmo report`; those of
    the first and the last iteration are kept, too. 0: none."""
    page: bool = True
    """Write page.html at the end: the learning curves and the kept rollouts, turn by turn."""

    def __post_init__(self) -> None:
        at_least(1, "output", self, "eval_every", "save_every", "keep")
        at_least(0, "output", self, "eval_temperature", "eval_turns", "profile", "keep_rollouts")
        at_least(0, "output", self, "save_minutes", "grace_seconds", "watchdog_seconds")


@dataclass(frozen=True)
class Config:
    """Settings of a training run. Published values are the defaults where a small model on a CPU can use them."""

    preset: str = "proxmo"
    """Estimator that --estimator.* starts from: grpo, dr_grpo, rloo, gigpo, gigpo_similarity, proxmo,
    proxmo_without_modulation, proxmo_without_proximity, official, hgpo, graphgpo, g2po or gagpo. (empg needs entropies
    that the loop does not record: `proxmo advantages`.)"""
    iterations: int = 45
    """Iterations of rollout and update. With --resume and a larger number, a run goes on longer."""
    seed: int = 0
    """Seed of everything that is random."""
    resume: bool = False
    """Go on from the newest checkpoint in --out, with the settings stored there."""
    config: Path | None = None
    """Name of a recipe (shop, alfworld_qwen2.5_1.5b, ...) or a TOML file with a table for each part; options on the
    command line win."""
    env: EnvSettings = field(default_factory=EnvSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    estimator: Settings = field(default_factory=lambda: proxmo(invalid_penalty=INVALID_PENALTY))
    loss: PolicyLossSettings = field(default_factory=PolicyLossSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    warm_start: WarmStartSettings = field(default_factory=WarmStartSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)
    hosts: HostSettings = field(default_factory=HostSettings)
    output: OutputSettings = field(default_factory=OutputSettings)

    def __post_init__(self) -> None:
        need(self.preset in PRESETS, f"--preset must be one of {', '.join(PRESETS)}; got {self.preset!r}")
        need(self.iterations >= 1, f"--iterations must be at least 1, got {self.iterations}")
        need(
            self.output.profile <= self.iterations,
            f"--profile must be at most the {self.iterations} of --iterations, got {self.output.profile}",
        )
        need(0 <= self.seed < 1 << 32, f"--seed must be at least 0 and below {1 << 32}, got {self.seed}")
        row, turn = self.optimizer.row_length, self.rollout.max_prompt_length + self.rollout.max_response_length
        need(row >= turn, f"--optimizer.row-length must hold a whole turn, at least {turn} tokens; got {row}")
        need(
            self.model.attention != "splash" or row % BLOCK == 0,
            f"--optimizer.row-length must be a multiple of {BLOCK} for --model.attention splash, got {row}",
        )
        if self.model.path:
            return
        need(self.warm_start.steps != 0, "--warm-start.steps 0 needs a --model; a small policy knows nothing at first")
        default = ModelSettings()
        for name in ("lora_rank", "dtype", "param_dtype", "attention", "remat", "chat_template_args"):
            unused = getattr(self.model, name) == getattr(default, name)
            need(unused, f"{option('model', name)} needs a --model; the small policy does not read it")
        need(not self.rollout.stop, "--rollout.stop needs a --model; the small policy does not read it")


def check_estimator(estimator: Settings, env: EnvSettings) -> None:
    """Refuse estimators that need what a rollout does not record, and values of the goal that no episode is paid."""
    need(
        not estimator.entropy,
        "--preset empg needs the entropy of each response, which a rollout does not record; use proxmo advantages",
    )
    need(
        estimator.values_over == "group",
        "--estimator.values-over must be group, got 'batch': a rollout numbers observations in each group",
    )
    need(
        (estimator.score, estimator.aggregation) != ("distance", "similar"),
        "--estimator.aggregation must be hard or soft with score distance, got 'similar'",
    )
    need(
        estimator.score != "gain" or estimator.success_reward == env.reward_scale,
        f"--estimator.success-reward must be --env.reward-scale, {env.reward_scale:g}, with score gain, got"
        f" {estimator.success_reward:g}: the episodes with this return have reached the goal",
    )


def check_reward(config: Config) -> None:
    """Refuse scores of an environment that has none, and penalties in rewards by which an estimator knows the goal."""
    need(
        config.env.reward != "score" or find(config.env.name).scored,
        f"--env.reward score needs an environment with scores, such as shop; {config.env.name} has success alone",
    )
    need(
        config.rollout.overlong != "penalise" or config.estimator.score not in ("gain", "distance"),
        f"--rollout.overlong penalise changes the rewards by which score {config.estimator.score} (g2po, graphgpo)"
        " knows that the goal was reached; need keep or mask",
    )


def of_preset(name: str, **parts: Any) -> Config:
    """The default settings with the estimator of a preset. Raises UserError for a name that is none."""
    need(name in PRESETS, f"--preset must be one of {', '.join(PRESETS)}; got {name!r}")
    return Config(preset=name, estimator=PRESETS[name](invalid_penalty=INVALID_PENALTY), **parts)


def check(config: Config) -> None:
    """Refuse what this machine's devices and files cannot do, before anything is written or compiled (UserError)."""
    find(config.env.name).check(config.env)
    check_reward(config)
    check_estimator(config.estimator, config.env)
    check_devices(config, jax.device_count(), jax.process_count())
    check_hosts(config, jax.process_count())
    check_skipped(config)
    check_from_run(config)
    if not config.model.path:
        check_small_policy(config)


def check_devices(config: Config, count: int, hosts: int = 1) -> None:
    """Refuse sizes that `count` devices, or those of each of the hosts, do not divide."""
    fsdp, tensor = config.mesh.fsdp, config.mesh.tensor
    need(count % (fsdp * tensor) == 0, f"--mesh.fsdp {fsdp} x --mesh.tensor {tensor} must divide the {count} devices")
    devices = count // tensor  # over which batches are split
    rows, together = config.optimizer.rows_per_batch, config.rollout.max_num_seqs
    need(rows % devices == 0, f"--optimizer.rows-per-batch must be a multiple of the {devices} devices, got {rows}")
    own = count // hosts  # a host samples on its own devices
    devices = own // math.gcd(tensor, own)
    need(
        together % devices == 0,
        f"--rollout.max-num-seqs must be a multiple of the {devices} devices, or 0 for all at once; got {together}",
    )


def for_playing(config: Config, count: int) -> Config:
    """The settings of a run that only plays on `count` devices, be they other than those it was trained on: without its
    mesh where that does not divide them, and with as many rows as they share."""
    mesh = config.mesh if count % (config.mesh.fsdp * config.mesh.tensor) == 0 else MeshSettings()
    devices = count // mesh.tensor
    rows, together = (
        -(-number // devices) * devices for number in (config.optimizer.rows_per_batch, config.rollout.max_num_seqs)
    )
    return dataclasses.replace(
        config,
        mesh=mesh,
        optimizer=dataclasses.replace(config.optimizer, rows_per_batch=rows),
        rollout=dataclasses.replace(config.rollout, max_num_seqs=together),
    )


def check_hosts(config: Config, count: int) -> None:
    """Refuse groups that `count` hosts do not divide, and games that do not suffice for all of them."""
    groups, games = config.rollout.num_groups, config.env.eval_games
    need(groups % count == 0, f"--rollout.num-groups must be a multiple of the {count} hosts, got {groups}")
    need(games >= count, f"--env.eval-games must be at least the {count} hosts, got {games}")


def check_skipped(config: Config) -> None:
    """Refuse to leave turns out where KL or entropy terms train all of them."""
    terms = [f"--loss.{name}-coef {getattr(config.loss, name + '_coef'):g}" for name in ("kl", "entropy")
             if getattr(config.loss, name + "_coef")]  # fmt: skip
    for name in ("skip_zero_advantages", "skip_gradient_share"):
        need(
            not (getattr(config.optimizer, name) and terms),
            f"--optimizer.{name.replace('_', '-')} needs 0 instead of {' and '.join(terms)}, which train all turns",
        )


def warm_steps(config: Config) -> int:
    """Optimiser steps of the warm start."""
    if config.warm_start.steps is not None:
        return config.warm_start.steps
    return 0 if config.model.path else 1500


def has_warm_start(config: Config) -> bool:
    """Whether the run begins with a warm start, its own or another run's."""
    return config.warm_start.from_run is not None or warm_steps(config) > 0


def small_policy(config: Config, vocab_size: int) -> PolicyConfig:
    """The shape of the small policy: heads of 16, half as many of them for keys and values."""
    multiple, size = math.lcm(32, config.mesh.tensor), config.model.hidden_size
    return PolicyConfig(
        vocab_size=-(-vocab_size // multiple) * multiple,
        hidden_size=size,
        intermediate_size=3 * size,
        num_hidden_layers=config.model.layers,
        num_attention_heads=size // 16,
        num_key_value_heads=size // 32,
        head_dim=16,
        initializer_range=0.15,
    )


def check_small_policy(config: Config) -> None:
    """Refuse a shape that the mesh does not divide, or that is not that of --warm-start.from-run."""
    shape, size, mesh = small_policy(config, 1), config.model.hidden_size, config.mesh
    need(size % mesh.fsdp == 0, f"--model.hidden-size must be a multiple of --mesh.fsdp {mesh.fsdp}, got {size}")
    need(
        shape.num_key_value_heads % mesh.tensor == 0 and shape.intermediate_size % mesh.tensor == 0,
        f"--model.hidden-size must be a multiple of 32 x --mesh.tensor {mesh.tensor}, got {size}",
    )


def check_from_run(config: Config) -> None:
    """Refuse another run whose warm start is not there, or is that of another shape."""
    taken = (config.output.dir / "warm_start" / "config.json").is_file()  # then the other run is not needed any more
    if config.warm_start.from_run is None or taken:
        return
    path = config.warm_start.from_run / "warm_start" / "config.json"
    need(path.is_file(), f"--warm-start.from-run: {config.warm_start.from_run} holds no warm start")
    found = json.loads(path.read_text(encoding="utf-8"))
    small = {"hidden_size": "hidden_size", "layers": "num_hidden_layers"}
    for name, key in ({"lora_rank": "lora_rank"} if config.model.path else small).items():
        value = getattr(config.model, name)
        need(
            found.get(key) == value,
            f"{option('model', name)} must be {found.get(key)}, as in --warm-start.from-run, got {value}",
        )


def micro_batches(config: Config, count: int = 0) -> int:
    """Into how many equal parts a mini-batch is cut: the fewest whose rows, on each device, keep to the budget.

    `count` is the number of devices; 0: all that there are.
    """
    settings = config.optimizer
    rows = settings.rows_per_batch * config.mesh.tensor // (count or jax.device_count())
    at_most = max(settings.micro_batch_tokens // settings.row_length, 1)
    return next(parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts <= at_most)


def loss_settings(config: Config) -> LossSettings:
    """The policy loss as `training.losses` takes it."""
    loss = config.loss
    return LossSettings(
        clip=loss.clip,
        clip_high=loss.clip_high or None,
        dual_clip=loss.dual_clip,
        kl_coef=loss.kl_coef,
        entropy_coef=loss.entropy_coef,
        kl=loss.kl_estimator,
        aggregation=loss.aggregation,
        importance_sampling_level=loss.importance_sampling_level,
        longest_response=config.rollout.max_response_length,
    )
