"""Hold our decoder to `transformers` on a checkpoint: the largest difference of the logits, and greedy answers.

    proxmo check-model PATH        # a folder or a hub id; needs torch (CPU is enough)

Both compute in float32 on a left-padded batch of random tokens.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from proxmo_jax.agent.report import terminal
from proxmo_jax.errors import UserError
from proxmo_jax.policy.decoder import Policy, PolicyConfig
from proxmo_jax.policy.decoding import sample
from proxmo_jax.policy.model_config import read_config, read_json
from proxmo_jax.policy.sampling import Decoding
from proxmo_jax.policy.weights import find_model, load_weights, parameter_count

CURE = "install torch (its CPU build is enough) in this environment"


@dataclass(frozen=True)
class Config:
    """What to compare."""

    model: tyro.conf.Positional[str]
    """Folder of a Hugging Face checkpoint, or a hub id."""
    prompts: int = 4
    length: int = 64
    """Tokens of the longest prompt."""
    new_tokens: int = 32
    tolerance: float = 1e-3
    """Largest difference of the logits to accept, relative to the largest logit (float32)."""
    seed: int = 0


def main(config: Config, console: Console | None = None) -> bool:
    """Compare and report; whether the two agree. Raises UserError for a checkpoint that is wrong, or without torch."""
    console = console or terminal()
    folder = find_model(config.model)
    shape = read_config(folder)
    if config.length + config.new_tokens > shape.max_position_embeddings:
        raise UserError(
            f"--length and --new-tokens add up to {config.length + config.new_tokens}, need at most the model's"
            f" {shape.max_position_embeddings}"
        )
    for name in ("prompts", "length", "new_tokens"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    if (generation := folder / "generation_config.json").is_file():
        read_json(generation)  # transformers reads it, too, and stumbles over one that is none
    params = load_weights(folder, shape)
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"check-model compares with transformers on torch, which is not installed; {CURE}")
    tokens, lengths = random_prompts(config, shape)
    console.print(f"{config.model}: {parameter_count(shape):,} parameters, {len(lengths)} prompts")
    ours, our_answers = answers_here(config, shape, params, tokens, lengths)
    theirs, their_answers = answers_there(config, folder, tokens, lengths)
    real = np.arange(tokens.shape[1])[None] >= tokens.shape[1] - lengths[:, None]
    difference = float(np.abs(ours - theirs)[real].max())
    relative = difference / float(np.abs(theirs[real]).max())
    same = int((our_answers == their_answers).all(1).sum())
    console.print(f"largest difference of the logits: {difference:.2e} ({relative:.1e} of the largest logit)")
    console.print(f"greedy answers of {config.new_tokens} tokens that are the same: {same} of {len(lengths)}")
    agree = relative <= config.tolerance and same == len(lengths)
    console.print("they agree" if agree else "they DIFFER")
    return agree


def random_prompts(config: Config, shape: PolicyConfig) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded tokens [B, L] and lengths [B], the first as long as can be."""
    rng = np.random.default_rng(config.seed)
    lengths = rng.integers(1, config.length + 1, config.prompts)
    lengths[0] = config.length
    tokens = np.zeros((config.prompts, config.length), np.int64)
    for row, length in zip(tokens, lengths, strict=True):
        row[config.length - length :] = rng.integers(0, shape.vocab_size, length)
    return tokens, lengths


def answers_here(config: Config, shape: PolicyConfig, params, tokens: np.ndarray, lengths: np.ndarray):
    """(logits, greedy tokens) of our decoder."""
    start = tokens.shape[1] - lengths
    slots = np.arange(tokens.shape[1])
    positions = np.maximum(slots[None] - start[:, None], 0)
    mask = (slots[None, None] >= start[:, None, None]) & (slots[None, None] <= slots[None, :, None])
    logits, _ = jax.jit(Policy(shape).apply)({"params": params}, tokens.astype(np.int32), positions, mask)
    drawn = sample(
        params, tokens.astype(np.int32), lengths.astype(np.int32), jax.random.key(0), jnp.float32(0.0),
        config=shape, decoding=Decoding(config.new_tokens, ()),
    )  # fmt: skip
    return np.asarray(logits), np.asarray(drawn.tokens)


def answers_there(config: Config, folder: Path, tokens: np.ndarray, lengths: np.ndarray):
    """The same of `transformers`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(tokens)
    mask = torch.arange(tokens.shape[1])[None] >= torch.tensor(tokens.shape[1] - lengths)[:, None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask.long(), position_ids=positions).logits.float().numpy()
        drawn = model.generate(
            ids, attention_mask=mask.long(), max_new_tokens=config.new_tokens, do_sample=False, eos_token_id=None,
            pad_token_id=0, temperature=None, top_p=None, top_k=None, repetition_penalty=1.0,
        )  # fmt: skip
    return logits, drawn.numpy()[:, tokens.shape[1] :]
