"""What a run is made of: its settings and its folder. (Its games and workers: `worlds`; its policy: `players`.)"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from envs_bridge.household.dataset import data_folder
from envs_bridge.household.generate import LEVELS
from envs_bridge.shop.catalogue import GOALS
from experiments.chat import template_arguments
from proxmo_jax.advantages import PRESETS
from proxmo_jax.attention import BLOCK
from proxmo_jax.errors import UserError
from proxmo_jax.losses import AGGREGATIONS, KL
from proxmo_jax.policy import REMAT

SHOPS = ("shop", "webshop")
ENGINES = ("fast", "textworld", "textworld-stock")


@dataclass(frozen=True)
class Config:
    """Settings of a training run. Published values are the defaults where a small model on a CPU can use them."""

    out: Path = Path("runs/household")
    """Folder of the run; must be new, or hold this run and be given with --resume."""
    resume: bool = False
    """Go on from the newest checkpoint in --out, with the settings stored there."""
    config: Path | None = None
    """Name of a recipe in experiments/configs, or TOML file with settings of these names; options on the command line
    win."""
    method: str = "proxmo"
    """Estimator: grpo, dr_grpo, rloo, gigpo, gigpo_similarity, proxmo, proxmo_without_modulation,
    proxmo_without_proximity, official."""
    seed: int = 0

    env: str = "household"
    """Games: household (generated into --out), alfworld (ALFWorld's own, from --data), shop (WebShop's rules in our
    engine, on --data or invented products) or webshop (WebShop itself, from --webshop)."""
    data: Path | None = None
    """ALFWorld's data folder (default: $ALFWORLD_DATA), or a shop's: a folder with WebShop's items_shuffle*.json,
    items_ins_v2*.json and items_human_ins.json, or one of its products' files (default: invented products)."""
    goals: str = "human"
    """A shop's goals: human (written by people) or synthetic (every combination of a product's options)."""
    webshop: Path | None = None
    """Checkout of WebShop, played by the interpreter named with --python, which needs WebShop's packages."""
    engine: str = "fast"
    """What plays them: fast (ours), textworld (ALFWorld's own, its repeated work remembered) or textworld-stock (as it
    is). Games that ours does not implement are left to ALFWorld's own in any case."""
    python: str = ""
    """Interpreter for the workers, where ALFWorld's packages live in another; default: this one."""
    level: str = "easy"
    """Size of the generated houses: easy, medium or hard."""
    train_games: int = 2000
    """Games to generate, or to take of ALFWorld's at most."""
    eval_games: int = 192
    """Held-out games, half in new houses (valid_unseen), half new games in known ones (valid_seen)."""

    prompt: str = "notes"
    """What the policy reads: notes (short, for small policies) or history (the last turns as they were)."""
    history: int = 2
    """Past turns in a history prompt."""
    list_actions: bool = True
    """Whether a history prompt lists the admissible actions."""

    iterations: int = 50
    groups: int = 16
    members: int = 8
    max_turns: int = 20
    temperature: float = 1.0
    reward: str = "success"
    """What is rewarded, times --reward-scale: success (published; in a shop a score of 1), or score (a shop's)."""
    reward_scale: float = 10.0
    invalid_penalty: float = 1.5
    """Taken from the scores of a turn with an invalid action; published: 0.1 beside a reward of 10."""
    penalise_inadmissible: bool = True
    """Commands that do nothing count as invalid, too; published: only ill-formed answers do."""

    learning_rate: float = 3e-4
    final_rate: float = 0.05
    """Share of the learning rate left at the last iteration (cosine); published: constant, 1."""
    epochs: int = 1
    rows_per_batch: int = 32
    micro_batch_tokens: int = 640
    """Tokens that a device computes at once, at least a row; a mini-batch is cut into as many parts as that needs. The
    result is the same, memory and speed are not."""
    row_length: int = 160
    answer_share: float = 0.125
    """Share of a row's tokens that responses may take."""
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    clip: float = 0.2
    clip_high: float = 0.0
    """The upper end of the clip where it differs from --clip; 0: the same."""
    dual_clip: float = 3.0
    kl: str = "low_var_kl"
    """Estimator of the KL to the reference: kl (k1), abs, mse (k2) or low_var_kl (k3)."""
    kl_weight: float = 0.01
    entropy_weight: float = 0.001
    aggregation: str = "token_mean"
    """How tokens make a loss: token_mean, turn_mean_token_sum, turn_mean_token_mean or turn_sum_over_length."""

    warm_start_steps: int = 2000
    warm_start_rate: float = 4e-3
    search_rate: float = 1.0
    """Demonstrations of the warm start: how little the demonstrator knows of where things are (0 all, 1 nothing)."""
    mistake_rate: float = 0.9
    """How often a careless demonstrator wastes a turn, though never two in a row."""
    careless_share: float = 0.15
    """Share of the warm start, its end, that clones careless demonstrations, so that something is left to learn."""
    warm_start_from: Path | None = None
    """Take the warm start (and tokenizer) of another run's folder instead of making one."""

    fsdp: int = 1
    """Devices over which parameters and batches are split; what these and --tensor leave splits batches alone."""
    tensor: int = 1
    """Devices over which heads, the MLP's width and the vocabulary are split."""

    model: str = ""
    """Hugging Face folder or hub id of a Qwen2, Qwen2.5 or Qwen3 to train; without one a small policy is made and
    warm-started on demonstrations."""
    dtype: str = "float32"
    """What a --model computes in: float32 or bfloat16."""
    param_dtype: str = "float32"
    """What its parameters are kept in: float32 or bfloat16."""
    moments_dtype: str = "float32"
    """What the optimiser's moments are kept in: float32 or bfloat16."""
    attention: str = "auto"
    """Attention over training rows of a --model: dense, splash (JAX's TPU kernel; --row-length a multiple of 128), or
    auto: splash on a TPU where it can."""
    lora_rank: int = 0
    """Rank of the adapters that are learned in the place of a --model's weights; 0: the weights are learned."""
    lora_alpha: float = 32.0
    """The adapters' product is scaled by this over the rank."""
    old_log_probs: str = "sampler"
    """Whose log-probs the ratio's denominator has: the sampler's, or the trainer's (one more forward)."""
    remat: str = "none"
    """What of a layer is computed again for its gradient: none, full (all) or dots (all but products with weights)."""
    top_k: int = 0
    """Tokens among which answers are drawn; 0: all."""
    top_p: float = 1.0
    """Probability of the likeliest tokens among which answers are drawn; 1: all."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer of a --model, such as '</action>', besides its own end of text."""
    chat_template_args: tuple[str, ...] = ()
    """Arguments of a --model's chat template, name=value: enable_thinking=false. In a recipe a table of them."""
    hidden_size: int = 64
    layers: int = 2
    max_prompt_tokens: int = 128
    max_response_tokens: int = 8

    decode_rows: int = 0
    """Answers that are decoded side by side, which bounds the cache's memory; the others wait for a row that has
    stopped. 0: all."""

    workers: int = 2
    worker_timeout: float = 0.0
    """Seconds after which a worker that does not answer is replaced; 0: 60, and 900 with ALFWorld's own engine."""
    eval_every: int = 10
    eval_temperature: float = 0.4
    save_every: int = 10


CHOICES = {
    "method": tuple(PRESETS),
    "env": ("household", "alfworld", *SHOPS),
    "goals": GOALS,
    "reward": ("success", "score"),
    "engine": ENGINES,
    "level": tuple(LEVELS),
    "prompt": ("notes", "history"),
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
    "moments_dtype": ("float32", "bfloat16"),
    "attention": ("auto", "dense", "splash"),
    "old_log_probs": ("sampler", "trainer"),
    "remat": tuple(REMAT),
    "kl": tuple(KL),
    "aggregation": AGGREGATIONS,
}
AT_LEAST_ONE = (
    "train_games eval_games groups iterations max_turns workers eval_every save_every rows_per_batch micro_batch_tokens"
    " epochs warm_start_steps max_response_tokens"
).split()


def check(config: Config) -> None:
    """Refuse settings that cannot work, one clear sentence each (ValueError)."""

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise UserError(message)

    for name, choices in CHOICES.items():
        value = getattr(config, name)
        need(value in choices, f"--{name.replace('_', '-')} must be one of {', '.join(choices)}; got {value!r}")
    if config.env == "alfworld":
        data_folder(config.data)
    if config.env == "webshop":
        need(config.webshop is not None, "--env webshop needs --webshop DIR, a checkout of WebShop")
        need(bool(config.model), "--env webshop needs a --model: there are no demonstrations in WebShop itself")
    need(config.dual_clip > 1, f"--dual-clip must be > 1, got {config.dual_clip}")
    need(config.history >= 0, f"--history must be at least 0, got {config.history}")
    need(config.worker_timeout >= 0, f"--worker-timeout must be at least 0, got {config.worker_timeout}")
    need(
        config.members >= 2,
        f"--members must be at least 2, got {config.members}: a group compares attempts at one task",
    )
    for name in AT_LEAST_ONE:
        option = f"--{name.replace('_', '-')}"
        need(getattr(config, name) >= 1, f"{option} must be at least 1, got {getattr(config, name)}")
    for name in ("careless_share", "mistake_rate", "search_rate", "final_rate", "answer_share"):
        value = getattr(config, name)
        need(0 <= value <= 1, f"--{name.replace('_', '-')} must lie between 0 and 1, got {value}")
    need(config.top_k >= 0 and 0 < config.top_p <= 1, "--top-k must be at least 0 and --top-p in (0, 1]")
    need(all(config.stop), "--stop strings must not be empty")
    need(bool(config.model) or not config.chat_template_args, "--chat-template-args needs a --model with a template")
    template_arguments(config.chat_template_args)
    need(config.temperature > 0, f"--temperature must be > 0, got {config.temperature}")
    longest = config.max_prompt_tokens + config.max_response_tokens
    need(
        config.row_length >= longest,
        f"--row-length must hold a whole turn, at least {longest} tokens; got {config.row_length}",
    )
    need(min(config.fsdp, config.tensor) >= 1, "--fsdp and --tensor must be at least 1")
    count = jax.device_count()
    need(
        count % (config.fsdp * config.tensor) == 0,
        f"--fsdp {config.fsdp} x --tensor {config.tensor} must divide the {count} devices",
    )
    devices = count // config.tensor  # over which batches are split
    for name, count in (("--rows-per-batch", config.rows_per_batch), ("--groups", config.groups)):
        need(count % devices == 0, f"{name} must be a multiple of the {devices} devices, got {count}")
    need(
        config.decode_rows >= 0 and config.decode_rows % devices == 0,
        f"--decode-rows must be a multiple of the {devices} devices, or 0 for all at once; got {config.decode_rows}",
    )
    need(config.lora_rank >= 0, f"--lora-rank must be at least 0, got {config.lora_rank}")
    need(bool(config.model) or not config.lora_rank, "--lora-rank needs a --model, whose weights stay as they are")
    need(config.lora_alpha > 0, f"--lora-alpha must be > 0, got {config.lora_alpha}")
    need(
        config.attention != "splash" or config.row_length % BLOCK == 0,
        f"--row-length must be a multiple of {BLOCK} for --attention splash, got {config.row_length}",
    )


def micro_batches(config: Config) -> int:
    """Into how many equal parts a mini-batch is cut: the fewest whose rows, on each device, keep to the budget."""
    rows = config.rows_per_batch * config.tensor // jax.device_count()
    at_most = max(config.micro_batch_tokens // config.row_length, 1)
    return next(parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts <= at_most)


def stored_config(config: Config) -> Config:
    """The settings of the run to resume; more `iterations` than it has stored go on from where it ended."""
    path = config.out / "config.json"
    if not path.is_file():
        raise UserError(f"--resume: {config.out} holds no run (no config.json)")
    stored = json.loads(path.read_text())
    paths = {"out", "config", "warm_start_from", "data", "webshop"}
    values: dict[str, Any] = {k: Path(v) if k in paths and v is not None else v for k, v in stored.items()}
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(Config)})
    if unknown:
        raise UserError(f"{path}: has {', '.join(unknown)}, which is no setting of this version; need a run of its own")
    iterations = max(values["iterations"], config.iterations)
    return Config(**{**values, "out": config.out, "resume": True, "iterations": iterations})


def open_folder(config: Config) -> None:
    """Make the run's folder and note its settings. Raises UserError if another run lives there."""
    path = config.out / "config.json"
    if path.exists() and not config.resume:
        raise UserError(f"--out: {config.out} holds another run; name a new folder, or add --resume to go on with it")
    if config.out.exists() and not config.resume and any(config.out.iterdir()):
        raise UserError(f"--out: {config.out} is not empty; name a new folder")
    config.out.mkdir(parents=True, exist_ok=True)
    values = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**values, "resume": False}, indent=1))
    temporary.replace(path)
