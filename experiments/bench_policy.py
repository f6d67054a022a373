"""Time the policy's decoding and its train step, beside google-tunix's where an environment has it.

    proxmo bench policy                                # ours alone
    proxmo bench policy --tunix-python PY              # side by side; PY has google-tunix 0.1.7, in its own environment

The same Qwen2 shape, dtype, prompts and turns in a process each. Turns are those of an agent: prompts with a history of
two turns at small to large generated houses, answers of a few words to a paragraph. `packed` is what training does:
several turns in a row of tokens, logits at response tokens alone. The table is printed and appended to BENCHMARKS.md.
"""

import json
import os
import platform
import random
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from envs_bridge.household.expert import Habits, episodes
from envs_bridge.household.generate import LEVELS, generate_games
from envs_bridge.prompts import History
from experiments.timing import timed
from proxmo_jax.agent.report import terminal
from proxmo_jax.agent.rollout import demonstrations
from proxmo_jax.errors import UserError
from proxmo_jax.policy.decoder import PolicyConfig, init_params
from proxmo_jax.policy.decoding import sample
from proxmo_jax.policy.sampling import Decoding
from proxmo_jax.policy.sharding import keep_freed_memory
from proxmo_jax.training.losses import LossSettings
from proxmo_jax.training.rows import Rows, pack_turns
from proxmo_jax.training.update import TrainState, make_optimizer, policy_step

HERE = Path(__file__).resolve().parent
# glibc's names for what `keep_freed_memory` sets, so that the peer has it, too.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
WAITING = ("decode, batch after batch", "decode, rows given out again")
ROWS_AT_ONCE = 4  # in a micro-batch, as `proxmo train` has by default


@dataclass(frozen=True)
class Config:
    """What to time."""

    tunix_python: Path | None = None
    """Interpreter of an environment with google-tunix."""
    turns: int = 32
    """Turns in a train step."""
    decode_rows: int = 16
    decode_steps: int = 64
    hidden_size: int = 256
    layers: int = 4
    vocab_size: int = 4096
    dtype: str = "float32"
    seed: int = 0
    repeat: int = 5
    append: Path | None = Path("BENCHMARKS.md")
    """File to append the table to."""


def main(config: Config, console: Console | None = None) -> str:
    """Run the benchmark; returns the Markdown that was appended."""
    console = console or terminal()
    for name in ("turns", "decode_rows", "decode_steps", "layers", "repeat"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    if config.hidden_size % 64:
        raise UserError(f"--hidden-size must be a multiple of 64, got {config.hidden_size}")
    shape = PolicyConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=3 * config.hidden_size,
        num_hidden_layers=config.layers, num_attention_heads=config.hidden_size // 32,
        num_key_value_heads=config.hidden_size // 64, head_dim=32, dtype=config.dtype, param_dtype=config.dtype,
    )  # fmt: skip
    request = make_request(config, shape)
    console.print("timing ours")
    ours = time_ours(config, shape, request)
    theirs = None
    if config.tunix_python:
        console.print("timing google-tunix")
        theirs = time_tunix(config.tunix_python, request)
    text = report(config, request, ours, theirs)
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    if config.append is not None:
        with config.append.open("a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")
    return text


def make_request(config: Config, shape: PolicyConfig) -> dict:
    """Turns with an agent's lengths and random tokens: a word of the prompt is 1.4 tokens, answers are 8 to 160."""
    rng = random.Random(config.seed)
    with tempfile.TemporaryDirectory() as folder:
        files = [
            str(game)
            for level in LEVELS
            for game in generate_games(Path(folder), split="train", count=12, seed=config.seed, level=level)
        ]
        demos = demonstrations(episodes(files, seed=config.seed, habits=Habits(1.0), max_turns=30), History.start)
    prompts = [round(1.4 * len(demo.memory.prompt().split())) for demo in rng.sample(demos, config.turns)]
    answers = [min(160, max(8, round(rng.lognormvariate(3.7, 0.6)))) for _ in prompts]

    def tokens(count: int) -> list[int]:
        return [rng.randrange(1, config.vocab_size - 1) for _ in range(count)]

    return {
        "shape": asdict(shape),
        "dtype": config.dtype,
        "repeat": config.repeat,
        "prompts": [tokens(n) for n in prompts],
        "answers": [tokens(n) for n in answers],
        "advantages": [rng.gauss(0, 1) for _ in prompts],
        "decode": {"prompts": [tokens(128) for _ in range(config.decode_rows)], "steps": config.decode_steps},
    }


def time_ours(config: Config, shape: PolicyConfig, request: dict) -> dict:
    """Decoding, with prompts that wait and without; a train step on padded turns, one on packed rows."""
    keep_freed_memory()  # as `proxmo train` does
    params = init_params(shape, jax.random.key(0))
    prompts = np.array(request["decode"]["prompts"], np.int32)
    lengths = np.full(len(prompts), prompts.shape[1], np.int32)
    decoding = Decoding(config.decode_steps, (config.vocab_size - 1,), greedy=True)
    decode = timed(
        lambda: sample(params, prompts, lengths, jax.random.key(0), jnp.float32(0.0), config=shape, decoding=decoding),
        config.repeat,
    )
    drawn = sample(params, prompts, lengths, jax.random.key(0), jnp.float32(0.0), config=shape, decoding=decoding)
    answer = {"decode": {**decode, "tokens": int(drawn.lengths.sum())}, **time_waiting(config, shape, params, prompts)}
    prompt, response = (np.array([len(r) for r in request[name]]) for name in ("prompts", "answers"))
    whole = int(prompt.max() + response.max())
    for name, row_length, room in (("padded", whole, int(response.max())), ("packed", whole, whole // 2)):
        rows = make_rows(request, prompt, response, row_length, room, alone=name == "padded")
        answer[name] = {**time_step(shape, params, rows, config.repeat), "rows": rows.tokens.shape}
    return answer


def time_waiting(config: Config, shape: PolicyConfig, params, prompts: np.ndarray) -> dict:
    """Four times as many prompts as rows, answers of 40 tokens on average and 160 at most: batch after batch, or each
    row given to the next prompt when it has stopped."""
    rows, one = config.decode_rows, jnp.float32(1.0)
    waiting = np.concatenate([prompts] * 4)
    lengths = np.full(len(waiting), waiting.shape[1], np.int32)
    decoding = Decoding(160, tuple(range(config.vocab_size // 40)))

    def draw(part: slice, slots: int):
        key = jax.random.key(part.start or 0)
        return sample(params, waiting[part], lengths[part], key, one, config=shape, decoding=decoding, slots=slots)

    def after_another():
        return [draw(slice(start, start + rows), 0) for start in range(0, len(waiting), rows)]

    tokens = {
        WAITING[0]: sum(int(drawn.lengths.sum()) for drawn in after_another()),
        WAITING[1]: int(draw(slice(None), rows).lengths.sum()),
    }
    took = {WAITING[0]: timed(after_another, config.repeat)}
    took[WAITING[1]] = timed(lambda: draw(slice(None), rows), config.repeat)
    return {name: {**took[name], "tokens": tokens[name]} for name in WAITING}


def make_rows(request: dict, prompt, response, row_length: int, room: int, *, alone: bool) -> Rows:
    """Token rows of the turns: one a row, or packed."""
    lengths = prompt + response
    order = np.arange(len(lengths))
    if alone:
        turns = np.full((len(lengths), row_length), -1, np.int32)
        offsets = np.zeros_like(turns)
        for i, n in enumerate(lengths):
            turns[i, :n], offsets[i, :n] = i, np.arange(n)
    else:
        turns, offsets = pack_turns(lengths, response, order, row_length=row_length, row_answers=room)
    short = -len(turns) % ROWS_AT_ONCE
    turns = np.pad(turns, ((0, short), (0, 0)), constant_values=-1)
    offsets = np.pad(offsets, ((0, short), (0, 0)))
    texts = [np.array(p + r, np.int32) for p, r in zip(request["prompts"], request["answers"], strict=True)]
    shape, answers = turns.shape, (len(turns), room)
    rows = {name: np.zeros(shape, np.int32) for name in ("tokens", "segments")}
    per_answer = {name: np.zeros(answers, np.int32) for name in ("places", "targets", "turn_tokens")}
    mask, advantage = np.zeros(answers, bool), np.zeros(answers, np.float32)
    for row in range(len(turns)):
        used = 0
        for segment, turn in enumerate(dict.fromkeys(turns[row][turns[row] >= 0].tolist()), start=1):
            at = np.flatnonzero(turns[row] == turn)
            rows["tokens"][row, at], rows["segments"][row, at] = texts[turn], segment
            said = slice(used, used + int(response[turn]))
            per_answer["places"][row, said] = at[prompt[turn] - 1 : -1]
            per_answer["targets"][row, said] = request["answers"][turn]
            per_answer["turn_tokens"][row, said] = response[turn]
            mask[row, said], advantage[row, said] = True, request["advantages"][turn]
            used = said.stop
    old = np.where(mask, -5.0, 0.0).astype(np.float32)
    parts = {**rows, **per_answer, "positions": offsets, "mask": mask, "advantage": advantage, "old": old}
    return Rows(**{name: jnp.asarray(value) for name, value in parts.items()}, reference=jnp.asarray(old))


def time_step(shape: PolicyConfig, params, rows: Rows, repeat: int) -> dict:
    optimizer = make_optimizer(1e-6, 0.01, 1.0, warmup=1)
    own = jax.tree.map(jnp.copy, params)
    state = TrainState(own, optimizer.init(own))

    def step():
        nonlocal state
        state, loss = policy_step(
            state, rows, jnp.float32(1.0), config=shape, optimizer=optimizer, settings=LossSettings(),
            micro_batches=len(rows.tokens) // ROWS_AT_ONCE,
        )  # fmt: skip
        return state, loss

    return timed(step, repeat)


def time_tunix(python: Path, request: dict) -> dict:
    """`tunix_timing.py` in its own environment. Raises UserError with what it said last."""
    done = subprocess.run(
        [str(python), str(HERE / "tunix_timing.py")],
        input=json.dumps(request),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, **KEEP_FREED_MEMORY, "JAX_PLATFORMS": jax.default_backend()},
        check=False,
    )
    if done.returncode:
        raise UserError(f"google-tunix: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(config: Config, request: dict, ours: dict, theirs: dict | None) -> str:
    """The measurements as Markdown."""
    real = sum(map(len, request["prompts"])) + sum(map(len, request["answers"]))
    rows = [(name, "ours", ours[name], ours[name]["tokens"]) for name in ("decode", *WAITING)]
    rows += [(f"train step, {name}", "ours", ours[name], real) for name in ("padded", "packed")]
    if theirs:
        rows.insert(1, ("decode", "google-tunix", theirs["decode"], theirs["decode"]["tokens"]))
        rows.append(("train step", "google-tunix", theirs["train"], real))
    device = jax.devices()[0]
    lines = [
        f"## Policy, {date.today().isoformat()}: `proxmo bench policy{' --tunix-python PY' if theirs else ''}`",
        "",
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {jax.device_count()} x {device.device_kind}; jax"
        f" {jax.__version__}. Qwen2 of {config.layers} layers, width {config.hidden_size}, {config.vocab_size} words,"
        f" {config.dtype}; {config.turns} turns of {real / config.turns:.0f} tokens on average, the longest"
        f" {max(len(p) + len(a) for p, a in zip(request['prompts'], request['answers'], strict=True))};"
        f" {config.decode_rows} prompts of 128 tokens, {config.decode_steps} steps, greedy; then four times as many"
        f" prompts on {config.decode_rows} rows, answers of some 40 tokens, at most 160. Medians of {config.repeat};"
        " tokens are real ones, padding not counted.",
        "",
        "| what | whose | seconds | tokens / s | times google-tunix | first call s |",
        "|---|---|---|---|---|---|",
    ]
    for what, whose, timing, tokens in rows:
        rate, ratio = tokens / timing["seconds"], "-"
        if theirs and what not in WAITING:
            peer = theirs["decode"] if what == "decode" else theirs["train"]
            ratio = f"{rate / ((peer.get('tokens') or real) / peer['seconds']):.2f}"
        lines.append(f"| {what} | {whose} | {timing['seconds']:.3f} | {rate:,.0f} | {ratio} | {timing['first']:.1f} |")
    return "\n".join(lines)
