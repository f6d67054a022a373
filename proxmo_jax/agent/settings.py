"""What a run is made of: its settings and its folder. (Its games and workers: `worlds`; its policy: `players`.)"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from envs_bridge.household.dataset import data_folder
from envs_bridge.household.generate import LEVELS
from envs_bridge.shop.catalogue import GOALS
from proxmo_jax.agent.chat import template_arguments
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.presets import PRESETS
from proxmo_jax.policy.attention import BLOCK
from proxmo_jax.policy.decoder import REMAT, PolicyConfig
from proxmo_jax.training.losses import AGGREGATIONS, KL

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
    decay_iterations: int = 0
    """Iterations after which that share is reached, and kept from then on; 0: all."""
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
# What numbers must be, by setting; every one must be finite.
AT_LEAST_ONE = (
    "train_games eval_games groups iterations max_turns workers eval_every save_every rows_per_batch micro_batch_tokens"
    " epochs warm_start_steps hidden_size layers max_prompt_tokens max_response_tokens fsdp tensor"
).split()
ABOVE_ZERO = ("temperature reward_scale learning_rate warm_start_rate max_grad_norm clip lora_alpha").split()
AT_LEAST_ZERO = (
    "seed history invalid_penalty decay_iterations weight_decay clip_high kl_weight entropy_weight lora_rank top_k"
    " decode_rows worker_timeout eval_temperature"
).split()
SHARES = ("careless_share", "mistake_rate", "search_rate", "final_rate", "answer_share", "clip")
# What only a --model has: a setting that would be read by nobody is refused.
OF_A_MODEL = ("lora_rank", "dtype", "param_dtype", "attention", "remat", "stop")


def need(ok: bool, message: str) -> None:
    """Raises UserError with the message if not ok."""
    if not ok:
        raise UserError(message)


def option(name: str) -> str:
    """A setting as the command line has it."""
    return f"--{name.replace('_', '-')}"


def check(config: Config) -> None:
    """Refuse settings that cannot work, or would be read by nobody, one clear sentence each (UserError)."""
    for name, choices in CHOICES.items():
        value = getattr(config, name)
        need(value in choices, f"{option(name)} must be one of {', '.join(choices)}; got {value!r}")
    if config.env == "alfworld":
        data_folder(config.data)
    if config.env == "webshop":
        need(config.webshop is not None, "--env webshop needs --webshop DIR, a checkout of WebShop")
    check_numbers(config)
    need(bool(config.model) or not config.chat_template_args, "--chat-template-args needs a --model with a template")
    template_arguments(config.chat_template_args)
    longest = config.max_prompt_tokens + config.max_response_tokens
    need(
        config.row_length >= longest,
        f"--row-length must hold a whole turn, at least {longest} tokens; got {config.row_length}",
    )
    need(
        config.attention != "splash" or config.row_length % BLOCK == 0,
        f"--row-length must be a multiple of {BLOCK} for --attention splash, got {config.row_length}",
    )
    need(all(config.stop), "--stop strings must not be empty")
    check_devices(config, jax.device_count())
    if config.model:
        need(config.warm_start_from is None, "--warm-start-from is for small policies, not for a --model")
        return
    for name in OF_A_MODEL:
        lacks = getattr(config, name) == getattr(Config, name)
        need(lacks, f"{option(name)} needs a --model; a small policy does not read it")
    check_small_policy(config)


def check_numbers(config: Config) -> None:
    """Refuse numbers out of their range."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float):
            need(math.isfinite(value), f"{option(field.name)} must be a finite number, got {value}")
    need(
        config.members >= 2,
        f"--members must be at least 2, got {config.members}: a group compares attempts at one task",
    )
    for names, fits, what in (
        (AT_LEAST_ONE, lambda x: x >= 1, "be at least 1"),
        (ABOVE_ZERO, lambda x: x > 0, "be > 0"),
        (AT_LEAST_ZERO, lambda x: x >= 0, "be at least 0"),
        (SHARES, lambda x: 0 <= x <= 1, "lie between 0 and 1"),
    ):
        for name in names:
            value = getattr(config, name)
            need(fits(value), f"{option(name)} must {what}, got {value}")
    need(config.seed < 1 << 32, f"--seed must be below {1 << 32}, got {config.seed}")
    need(config.dual_clip > 1, f"--dual-clip must be > 1, got {config.dual_clip}")
    need(0 < config.top_p <= 1, f"--top-p must be > 0 and at most 1, got {config.top_p}")


def check_devices(config: Config, count: int) -> None:
    """Refuse sizes that `count` devices do not divide."""
    need(
        count % (config.fsdp * config.tensor) == 0,
        f"--fsdp {config.fsdp} x --tensor {config.tensor} must divide the {count} devices",
    )
    devices = count // config.tensor  # over which batches are split
    rows = config.rows_per_batch
    need(rows % devices == 0, f"--rows-per-batch must be a multiple of the {devices} devices, got {rows}")
    need(
        config.decode_rows % devices == 0,
        f"--decode-rows must be a multiple of the {devices} devices, or 0 for all at once; got {config.decode_rows}",
    )


def small_policy(config: Config, vocab_size: int) -> PolicyConfig:
    """The shape of the small policy: heads of 16, half as many of them for keys and values."""
    multiple = math.lcm(32, config.tensor)
    return PolicyConfig(
        vocab_size=-(-vocab_size // multiple) * multiple,
        hidden_size=config.hidden_size,
        intermediate_size=3 * config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.hidden_size // 16,
        num_key_value_heads=config.hidden_size // 32,
        head_dim=16,
        initializer_range=0.15,
    )


def check_small_policy(config: Config) -> None:
    """Refuse a shape that cannot be, that the mesh does not divide, or that is not that of --warm-start-from."""
    shape, size = small_policy(config, 1), config.hidden_size
    heads, shared = shape.num_attention_heads, shape.num_key_value_heads
    need(
        shared > 0 and heads % shared == 0,
        f"--hidden-size must be a multiple of 32, got {size}: {heads} heads cannot share {shared} key-value heads",
    )
    need(size % config.fsdp == 0, f"--hidden-size must be a multiple of --fsdp {config.fsdp}, got {size}")
    need(
        shared % config.tensor == 0 and shape.intermediate_size % config.tensor == 0,
        f"--hidden-size must be a multiple of 32 x --tensor {config.tensor}, got {size}",
    )
    own = config.out / "warm_start" / "config.json"
    if config.warm_start_from is None or own.is_file():  # a run that has taken it needs the other no more
        return
    path = config.warm_start_from / "warm_start" / "config.json"
    need(path.is_file(), f"--warm-start-from: {config.warm_start_from} holds no warm start")
    found = json.loads(path.read_text())
    for name, field in (("hidden_size", "hidden_size"), ("layers", "num_hidden_layers")):
        value = getattr(config, name)
        need(
            found.get(field) == value,
            f"{option(name)} must be {found.get(field)}, as --warm-start-from has it, got {value}",
        )


def micro_batches(config: Config) -> int:
    """Into how many equal parts a mini-batch is cut: the fewest whose rows, on each device, keep to the budget."""
    rows = config.rows_per_batch * config.tensor // jax.device_count()
    at_most = max(config.micro_batch_tokens // config.row_length, 1)
    return next(parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts <= at_most)


def stored_config(config: Config) -> Config:
    """The settings of the run in `config.out`, as they are stored there."""
    path = config.out / "config.json"
    if not path.is_file():
        raise UserError(f"--resume: {config.out} holds no run (no config.json)")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}); need the settings that the run has written") from error
    if not isinstance(stored, dict) or not stored:
        raise UserError(f"{path}: holds no settings; need those that the run has written")
    paths = {"out", "config", "warm_start_from", "data", "webshop"}
    values: dict[str, Any] = {k: Path(v) if k in paths and v is not None else v for k, v in stored.items()}
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(Config)})
    if unknown:
        raise UserError(f"{path}: has {', '.join(unknown)}, which is no setting of this version; need a run of its own")
    if isinstance(values.get("stop"), list):
        values["stop"] = tuple(values["stop"])
    return Config(**{**values, "out": config.out, "resume": True})


def extended(stored: Config, iterations: int) -> Config:
    """The run made longer: its learning rate falls as it was planned to, and stays where it ends. A run is not made
    shorter. Raises UserError if it would learn nothing."""
    if iterations <= stored.iterations:
        return stored
    need(stored.final_rate > 0, f"--iterations {iterations}: with --final-rate 0 the run learns nothing any more")
    planned = stored.decay_iterations or stored.iterations
    return dataclasses.replace(stored, iterations=iterations, decay_iterations=planned)


def not_taken(stored: Config, asked: Config, *, longer: bool = False) -> list[str]:
    """Settings asked for that a resumed run does not take, each with what the run has in its place. longer: whether it
    takes the iterations."""
    taken = {"out", "resume", *(["iterations"] if longer else [])}
    values = [(f.name, getattr(stored, f.name), getattr(asked, f.name)) for f in dataclasses.fields(Config)]
    return [
        f"{option(name)} {wanted} (the run has {had})"
        for name, had, wanted in values
        if wanted != had and name not in taken
    ]


def open_folder(config: Config) -> None:
    """Make the run's folder and note its settings. Raises UserError if another run lives there."""
    path = config.out / "config.json"
    if path.exists() and not config.resume:
        raise UserError(f"--out: {config.out} holds another run; name a new folder, or add --resume to go on with it")
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out: {config.out} is a file; name a new folder")
    if config.out.exists() and not config.resume and any(config.out.iterdir()):
        raise UserError(f"--out: {config.out} is not empty; name a new folder")
    config.out.mkdir(parents=True, exist_ok=True)
    values = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**values, "resume": False}, indent=1), encoding="utf-8")
    temporary.replace(path)
