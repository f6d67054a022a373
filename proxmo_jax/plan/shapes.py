"""Shapes of published models, so that a plan needs neither weights nor a network.

Each is what the `config.json` of the model on Hugging Face says (organisations Qwen, HuggingFaceTB and meta-llama);
tests hold them to the published numbers of parameters.
"""

import re
from pathlib import Path
from typing import Any

from proxmo_jax.errors import UserError
from proxmo_jax.policy.decoder import PolicyConfig
from proxmo_jax.policy.model_config import config_of, read_config

Row = tuple[int, int, int, int, int, int, bool]
# Hidden size, width of the MLP, layers, heads, key-value heads, words, tied embeddings.
QWEN2: dict[str, Row] = {
    "qwen2.5-0.5b": (896, 4_864, 24, 14, 2, 151_936, True),
    "qwen2.5-1.5b": (1_536, 8_960, 28, 12, 2, 151_936, True),
    "qwen2.5-3b": (2_048, 11_008, 36, 16, 2, 151_936, True),
    "qwen2.5-7b": (3_584, 18_944, 28, 28, 4, 152_064, False),
    "qwen2.5-14b": (5_120, 13_824, 48, 40, 8, 152_064, False),
    "qwen2.5-32b": (5_120, 27_648, 64, 40, 8, 152_064, False),
}
QWEN3: dict[str, Row] = {
    "qwen3-0.6b": (1_024, 3_072, 28, 16, 8, 151_936, True),
    "qwen3-1.7b": (2_048, 6_144, 28, 16, 8, 151_936, True),
    "qwen3-4b": (2_560, 9_728, 36, 32, 8, 151_936, True),
    "qwen3-8b": (4_096, 12_288, 36, 32, 8, 151_936, False),
    "qwen3-14b": (5_120, 17_408, 40, 40, 8, 151_936, False),
    "qwen3-32b": (5_120, 25_600, 64, 64, 8, 151_936, False),
}
LLAMA: dict[str, Row] = {
    "smollm2-135m": (576, 1_536, 30, 9, 3, 49_152, True),
    "smollm2-360m": (960, 2_560, 32, 15, 5, 49_152, True),
    "smollm2-1.7b": (2_048, 8_192, 24, 32, 32, 49_152, True),
    "llama-3.2-1b": (2_048, 8_192, 16, 32, 8, 128_256, True),
    "llama-3.2-3b": (3_072, 8_192, 28, 24, 8, 128_256, True),
    "llama-3.1-8b": (4_096, 14_336, 32, 32, 8, 128_256, False),
}
FAMILIES: dict[str, tuple[dict[str, Row], dict[str, Any]]] = {
    "qwen2": (QWEN2, {"rope_theta": 1e6, "max_position_embeddings": 32_768}),
    "qwen3": (QWEN3, {"rope_theta": 1e6, "max_position_embeddings": 40_960, "head_dim": 128}),
    "llama": (LLAMA, {"rope_theta": 1e5, "max_position_embeddings": 131_072}),  # SmolLM2's is shorter
}
NAMES = [name for rows, _ in FAMILIES.values() for name in rows]


def shape(model: str, **choices: Any) -> PolicyConfig:
    """The shape of a published model, or of one in a folder.

    Args:
        model: a name of `NAMES`, also as its hub id (Qwen/Qwen2.5-7B-Instruct); or a folder with a config.json.
        choices: fields of `PolicyConfig` that a config.json does not contain.

    Returns:
        The shape.

    Raises:
        UserError: for a name that is not known, and what `read_config` refuses.
    """
    if (Path(model) / "config.json").is_file():
        return read_config(Path(model), **choices)
    name = re.sub(r"-(instruct|base|chat)$", "", model.rpartition("/")[2].lower())
    for kind, (rows, common) in FAMILIES.items():
        if name in rows:
            keys = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
            values = dict(zip(f"{keys} tie_word_embeddings".split(), rows[name], strict=True))
            return config_of({"model_type": kind, **common, **values}, Path(name), **choices)
    raise UserError(
        f"--model: {model!r} is neither a folder with a config.json nor one of the known shapes: {', '.join(NAMES)}"
    )
