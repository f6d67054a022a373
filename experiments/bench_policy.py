"""Time decoding and the training step of the policy, and those of google-tunix if an environment has it.

    proxmo bench policy                                # our policy alone
    proxmo bench policy --tunix-python PY              # and google-tunix 0.1.7, from the environment of PY

Both use the same Qwen2 shape, dtype, prompts and turns, each in a process of its own. Lengths are those of an agent:
prompts with a history of two turns in small to large generated houses, responses of a few words to a paragraph.
`packed` is what training does: sequence packing, with logits at response tokens only. The report is printed and
appended to BENCHMARKS.md.
"""

import json
import os
import random
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from envs_bridge.household.expert import Habits, episodes
from envs_bridge.household.generate import LEVELS, generate_games
from envs_bridge.prompts import History
from experiments import bench
from experiments.timing import timed
from proxmo_jax.agent.demonstrations import demonstrations
from proxmo_jax.agent.report import terminal
from proxmo_jax.errors import UserError
from proxmo_jax.policy.decoder import PolicyConfig, init_params
from proxmo_jax.policy.decoding import sample
from proxmo_jax.policy.sampling import Decoding
from proxmo_jax.policy.sharding import keep_freed_memory
from proxmo_jax.training.losses import LossSettings
from proxmo_jax.training.rows import Rows, pack_turns
from proxmo_jax.training.update import TrainState, make_optimizer, policy_step

HERE = Path(__file__).resolve().parent
# glibc's names for what `keep_freed_memory` sets: the other side gets the same setting.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
QUEUED = ("decode, batch after batch", "decode, continuous batching")
MICRO_BATCH_ROWS = 2  # about the tokens of `proxmo train`'s default, in rows of 636


@dataclass(frozen=True)
class Config:
    """What to time."""

    tunix_python: Path | None = None
    """Interpreter of an environment with google-tunix."""
    turns: int = 32
    """Turns in a training step."""
    decode_rows: int = 16
    decode_steps: int = 64
    hidden_size: int = 256
    layers: int = 4
    vocab_size: int = 4096
    dtype: str = "float32"
    seed: int = 0
    repeat: int = 5
    append: Path | None = Path("BENCHMARKS.md")
    """File to append the report to."""


def main(config: Config, console: Console | None = None) -> str:
    """Run the benchmark; returns the Markdown that was appended."""
    console = console or terminal()
    bench.require_positive(config, ("turns", "decode_rows", "decode_steps", "layers", "repeat"))
    if config.hidden_size % 64:
        raise UserError(f"--hidden-size must be a multiple of 64, got {config.hidden_size}")
    shape = PolicyConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=3 * config.hidden_size,
        num_hidden_layers=config.layers, num_attention_heads=config.hidden_size // 32,
        num_key_value_heads=config.hidden_size // 64, head_dim=32, dtype=config.dtype, param_dtype=config.dtype,
    )  # fmt: skip
    request = make_request(config, shape)
    console.print("timing proxmo-jax")
    ours = time_ours(config, shape, request)
    theirs = None
    if config.tunix_python:
        console.print("timing google-tunix")
        theirs = time_tunix(config.tunix_python, request)
    text = report(config, request, ours, theirs)
    return bench.publish(text, config.append, console)


def make_request(config: Config, shape: PolicyConfig) -> dict:
    """Random tokens with an agent's lengths: 1.4 tokens per word of a prompt, responses of 8 to 160 tokens."""
    rng = random.Random(config.seed)
    with tempfile.TemporaryDirectory() as folder:
        files = [
            str(game)
            for level in LEVELS
            for game in generate_games(Path(folder), split="train", count=12, seed=config.seed, level=level)
        ]
        demos = demonstrations(episodes(files, seed=config.seed, habits=Habits(1.0), max_turns=30), History.start)
    prompts = [round(1.4 * len(demo.memory.prompt().split())) for demo in rng.sample(demos, config.turns)]
    responses = [min(160, max(8, round(rng.lognormvariate(3.7, 0.6)))) for _ in prompts]

    def tokens(count: int) -> list[int]:
        return [rng.randrange(1, config.vocab_size - 1) for _ in range(count)]

    return {
        "shape": asdict(shape),
        "dtype": config.dtype,
        "repeat": config.repeat,
        "prompts": [tokens(n) for n in prompts],
        "responses": [tokens(n) for n in responses],
        "advantages": [rng.gauss(0, 1) for _ in prompts],
        "decode": {"prompts": [tokens(128) for _ in range(config.decode_rows)], "steps": config.decode_steps},
    }


def time_ours(config: Config, shape: PolicyConfig, request: dict) -> dict:
    """Time decoding, without and with a queue of prompts, and a training step on padded and on packed rows."""
    keep_freed_memory()  # as `proxmo train` does
    params = init_params(shape, jax.random.key(0))
    prompts = np.array(request["decode"]["prompts"], np.int32)
    lengths = np.full(len(prompts), prompts.shape[1], np.int32)
    arguments = prompts, lengths, jax.random.key(0), jnp.float32(0.0)

    def draw(steps: int):
        decoding = Decoding(steps, (config.vocab_size - 1,), greedy=True)
        return sample(params, *arguments, config=shape, decoding=decoding)

    timings = {
        "prefill": {**timed(lambda: draw(1), config.repeat), "tokens": prompts.size},
        "decode": {
            **timed(lambda: draw(config.decode_steps), config.repeat),
            "tokens": int(draw(config.decode_steps).lengths.sum()),
        },
        **time_queue(config, shape, params, prompts),
    }
    prompt, response = (np.array([len(r) for r in request[name]]) for name in ("prompts", "responses"))
    whole = int(prompt.max() + response.max())
    for name, row_length, room in (("padded", whole, int(response.max())), ("packed", whole, whole // 2)):
        rows = make_rows(request, prompt, response, row_length, room, alone=name == "padded")
        timings[name] = {**time_step(shape, params, rows, config.repeat), "rows": rows.tokens.shape}
    return timings


def time_queue(config: Config, shape: PolicyConfig, params, prompts: np.ndarray) -> dict:
    """Time four times as many prompts as rows, batch after batch and with continuous batching.

    Responses have 40 tokens on average and at most 160.
    """
    rows, one = config.decode_rows, jnp.float32(1.0)
    queue = np.concatenate([prompts] * 4)
    lengths = np.full(len(queue), queue.shape[1], np.int32)
    decoding = Decoding(160, tuple(range(config.vocab_size // 40)))

    def draw(part: slice, slots: int):
        key = jax.random.key(part.start or 0)
        return sample(params, queue[part], lengths[part], key, one, config=shape, decoding=decoding, slots=slots)

    def batch_after_batch():
        return [draw(slice(start, start + rows), 0) for start in range(0, len(queue), rows)]

    tokens = {
        QUEUED[0]: sum(int(drawn.lengths.sum()) for drawn in batch_after_batch()),
        QUEUED[1]: int(draw(slice(None), rows).lengths.sum()),
    }
    took = {QUEUED[0]: timed(batch_after_batch, config.repeat)}
    took[QUEUED[1]] = timed(lambda: draw(slice(None), rows), config.repeat)
    return {name: {**took[name], "tokens": tokens[name]} for name in QUEUED}


def make_rows(request: dict, prompt, response, row_length: int, room: int, *, alone: bool) -> Rows:
    """Token rows of the turns: one turn per row, or packed."""
    lengths = prompt + response
    order = np.arange(len(lengths))
    if alone:
        turns = np.full((len(lengths), row_length), -1, np.int32)
        offsets = np.zeros_like(turns)
        for i, n in enumerate(lengths):
            turns[i, :n], offsets[i, :n] = i, np.arange(n)
    else:
        turns, offsets = pack_turns(lengths, response, order, row_length=row_length, row_answers=room)
    short = -len(turns) % MICRO_BATCH_ROWS
    turns = np.pad(turns, ((0, short), (0, 0)), constant_values=-1)
    offsets = np.pad(offsets, ((0, short), (0, 0)))
    texts = [np.array(p + r, np.int32) for p, r in zip(request["prompts"], request["responses"], strict=True)]
    shape, at_responses = turns.shape, (len(turns), room)
    rows = {name: np.zeros(shape, np.int32) for name in ("tokens", "segments")}
    per_response = {name: np.zeros(at_responses, np.int32) for name in ("places", "targets", "turn_tokens")}
    mask, advantage = np.zeros(at_responses, bool), np.zeros(at_responses, np.float32)
    for row in range(len(turns)):
        used = 0
        for segment, turn in enumerate(dict.fromkeys(turns[row][turns[row] >= 0].tolist()), start=1):
            at = np.flatnonzero(turns[row] == turn)
            rows["tokens"][row, at], rows["segments"][row, at] = texts[turn], segment
            span = slice(used, used + int(response[turn]))
            per_response["places"][row, span] = at[prompt[turn] - 1 : -1]
            per_response["targets"][row, span] = request["responses"][turn]
            per_response["turn_tokens"][row, span] = response[turn]
            mask[row, span], advantage[row, span] = True, request["advantages"][turn]
            used = span.stop
    old = np.where(mask, -5.0, 0.0).astype(np.float32)
    parts = {**rows, **per_response, "positions": offsets, "mask": mask, "advantage": advantage, "old_log_probs": old}
    return Rows(**{name: jnp.asarray(value) for name, value in parts.items()}, reference=jnp.asarray(old))


def time_step(shape: PolicyConfig, params, rows: Rows, repeat: int) -> dict:
    """Time a training step on rows of tokens."""
    optimizer = make_optimizer(1e-6, 0.01, 1.0, warmup=1)
    own = jax.tree.map(jnp.copy, params)
    state = TrainState(own, optimizer.init(own))

    def step():
        nonlocal state
        state, loss = policy_step(
            state, rows, jnp.float32(1.0), config=shape, optimizer=optimizer, settings=LossSettings(),
            micro_batches=len(rows.tokens) // MICRO_BATCH_ROWS,
        )  # fmt: skip
        return state, loss

    return timed(step, repeat)


def time_tunix(python: Path, request: dict) -> dict:
    """The result of `tunix_timing.py` in its own environment."""
    environment = {**os.environ, **KEEP_FREED_MEMORY, "JAX_PLATFORMS": jax.default_backend()}
    command = [str(python), str(HERE / "tunix_timing.py")]
    return json.loads(bench.run_child("timing google-tunix", command, request=request, environment=environment))


def report(config: Config, request: dict, ours: dict, theirs: dict | None) -> str:
    """The measurements as Markdown."""
    real = sum(map(len, request["prompts"])) + sum(map(len, request["responses"]))
    rows = [(name, "proxmo-jax", ours[name], ours[name]["tokens"]) for name in ("prefill", "decode", *QUEUED)]
    rows += [(f"training step, {name}", "proxmo-jax", ours[name], real) for name in ("padded", "packed")]
    if theirs:
        for place, what in ((1, "prefill"), (3, "decode")):
            rows.insert(place, (what, "google-tunix", theirs[what], theirs[what]["tokens"]))
        rows.append(("training step", "google-tunix", theirs["train"], real))
    longest = max(len(p) + len(r) for p, r in zip(request["prompts"], request["responses"], strict=True))
    lines = [
        bench.heading("Policy", f"proxmo bench policy{' --tunix-python PY' if theirs else ''}"),
        "",
        f"{bench.host_and_devices()}. Qwen2 with {config.layers} layers, width {config.hidden_size},"
        f" {config.vocab_size} words, {config.dtype}. Training step: {config.turns} turns of"
        f" {real / config.turns:.0f} tokens on average, the longest {longest}. Prefill: {config.decode_rows} prompts of"
        f" 128 tokens and one step. Decoding: the same with {config.decode_steps} steps, greedy; then four times as"
        f" many prompts on {config.decode_rows} rows, with responses of about 40 tokens, at most 160. Medians of"
        f" {config.repeat}. Tokens are real tokens, without padding.",
        "",
        "| what | implementation | seconds | tokens / s | relative to google-tunix | first call, s |",
        "|---|---|---|---|---|---|",
    ]
    for what, implementation, timing, tokens in rows:
        rate, ratio = tokens / timing["seconds"], "-"
        if theirs and what not in QUEUED:
            other = theirs.get(what, theirs["train"])
            ratio = f"{rate / ((other.get('tokens') or real) / other['seconds']):.2f}"
        lines.append(
            f"| {what} | {implementation} | {timing['seconds']:.3f} | {rate:,.0f} | {ratio} | {timing['first']:.1f} |"
        )
    return "\n".join(lines)
