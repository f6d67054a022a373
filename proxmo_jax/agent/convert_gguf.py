"""Convert a GGUF file to a Hugging Face folder: dequantised weights, config, tokenizer and chat template.

proxmo convert-gguf model.gguf models/name      # then: proxmo train --model.path models/name
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from proxmo_jax.agent.report import terminal
from proxmo_jax.errors import UserError
from proxmo_jax.paths import free_target, plain_path
from proxmo_jax.policy.gguf_file import GgufFile, gguf_config, gguf_tensors, open_gguf
from proxmo_jax.policy.gguf_tokenizer import gguf_tokenizer, stop_tokens
from proxmo_jax.policy.tokenizer import token_count
from proxmo_jax.policy.weights import parameter_count, save_tensors


@dataclass(frozen=True)
class Config:
    """What to convert, and where it goes."""

    file: tyro.conf.Positional[Path]
    """GGUF file of a llama, qwen2 or qwen3."""
    target: tyro.conf.Positional[Path]
    """Folder to write; must not hold anything yet."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights; quantised ones gain nothing from float32 but keep all that they have."""


def main(config: Config, console: Console | None = None) -> Path:
    """Convert; returns the folder. Raises UserError for a file that cannot be read, or a target in use."""
    console = console or terminal()
    free_target(config.target)
    return convert(open_gguf(config.file), config.target, config.dtype, console)


def convert(file: GgufFile, target: Path, dtype: str, console: Console) -> Path:
    """Write the folder of an opened file. Raises UserError, before anything is written, for one that is wrong."""
    shape = gguf_config(file, param_dtype=dtype)
    tensors, tokenizer = gguf_tensors(file, shape), gguf_tokenizer(file)
    if (size := token_count(tokenizer)) > shape.vocab_size:
        raise UserError(f"{file.path}: has {size} tokens, need at most the {shape.vocab_size} rows of its embedding")
    target.mkdir(parents=True, exist_ok=True)
    with plain_path(target) as plain:
        files = save_tensors(plain, tensors, shape)
        tokenizer.save_pretrained(plain)
        ends = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
        ends = {"eos_token_id": stop_tokens(file) or None, **ends}
        kept = {name: value for name, value in ends.items() if value is not None}
        (plain / "generation_config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        megabytes = sum(path.stat().st_size for path in files) / 2**20
    template = "" if tokenizer.chat_template else ", without a chat template"
    console.print(
        f"{target}: {file.architecture}, {parameter_count(shape):,} parameters, {megabytes:.1f} MiB in"
        f" {len(files)} file(s){template}",
        soft_wrap=True,
    )
    return target
