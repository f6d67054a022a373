"""The `config.json` of Llama, Qwen2, Qwen2.5 and Qwen3 checkpoints: read as the policy's shape, and written."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from proxmo_jax.errors import UserError
from proxmo_jax.policy.decoder import PolicyConfig, Rope


class Family(NamedTuple):
    """An architecture of `transformers` that the policy computes.

    Attributes:
        name: its class.
        qkv_bias: biases of query, key and value.
        qk_norm: normalised query and key heads.
        longest: default of max_position_embeddings.
        kv_heads: default of num_key_value_heads; None: num_attention_heads.
        window: default of sliding_window.
    """

    name: str
    qkv_bias: bool
    qk_norm: bool
    longest: int = 32_768
    kv_heads: int | None = 32
    window: int | None = None


# By model_type. A shape is saved as the first that has it: a Mistral without a window computes what a Llama does.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", False, False, 2_048, None),
    "mistral": Family("LlamaForCausalLM", False, False, 131_072, 8, 4_096),
    "qwen2": Family("Qwen2ForCausalLM", True, False),
    "qwen3": Family("Qwen3ForCausalLM", False, True),
}


def read_json(path: Path) -> dict:
    """Read an object from a JSON file.

    Args:
        path: the file.

    Returns:
        The object.

    Raises:
        UserError: naming the file, if it contains anything else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds {_short(data)}, need an object with names")
    return data


def _short(value: Any) -> str:
    """A value for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_config(folder: Path, **choices: Any) -> PolicyConfig:
    """Read the shape of a policy from `config.json`, with the defaults of `transformers`.

    Args:
        folder: a Hugging Face folder.
        choices: fields of `PolicyConfig` that the file does not contain: dtype, param_dtype, remat, ...

    Returns:
        The shape.

    Raises:
        UserError: for a folder without the file, and an architecture or a setting that the policy does not support.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: holds no config.json")
    return config_of(read_json(path), path, **choices)


def config_of(data: dict, path: Path, **choices: Any) -> PolicyConfig:
    """The shape of a policy from what a `config.json` contains; as `read_config`, with `path` for its messages."""
    kind = data.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{path}: architecture {kind!r} is not supported, need {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    hidden, heads, kv_heads, head_dim = _read_heads(data, kind, path)
    longest = _whole(data, "max_position_embeddings", path, family.longest)
    tied = data.get("tie_word_embeddings", False)
    _refuse(
        path,
        {
            f"tie_word_embeddings {tied!r}, need true or false": not isinstance(tied, bool),
            f"{heads} num_attention_heads, need a multiple of its {kv_heads} num_key_value_heads": heads % kv_heads,
            f"head_dim {head_dim}, need an even number": head_dim % 2,
            **_other_computations(data, kind, longest),
        },
    )
    return PolicyConfig(
        vocab_size=_whole(data, "vocab_size", path),
        hidden_size=hidden,
        intermediate_size=_whole(data, "intermediate_size", path),
        num_hidden_layers=_whole(data, "num_hidden_layers", path),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope=_read_rope(data, longest, path),
        rms_norm_eps=_number(data, "rms_norm_eps", path, 1e-6),
        initializer_range=_number(data, "initializer_range", path, 0.02),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tie_word_embeddings=tied,
        max_position_embeddings=longest,
        **choices,
    )


def _read_heads(data: dict, kind: str, path: Path) -> tuple[int, int, int, int]:
    """(hidden size, attention heads, key-value heads, dimensions of a head). Raises UserError."""
    hidden, heads = (_whole(data, key, path) for key in ("hidden_size", "num_attention_heads"))
    kv_heads = heads
    default = FAMILIES[kind].kv_heads or heads
    if data.get("num_key_value_heads", default) is not None:
        kv_heads = _whole(data, "num_key_value_heads", path, default)
    head_dim = hidden // heads
    if kind == "qwen3" or data.get("head_dim") is not None:
        head_dim = _whole(data, "head_dim", path, 128)
    return hidden, heads, kv_heads, head_dim


def _refuse(path: Path, wrong: dict[str, Any]) -> None:
    """Raise UserError for the first description that holds."""
    for what, holds in wrong.items():
        if holds:
            raise UserError(f"{path}: has {what}")


# Settings whose names suggest that they change what a decoder computes, and those of them that do not or are read here.
# `transformers` ignores unknown names, but a file that contains one describes another model.
COMPUTES = re.compile(r"rope|rotary|attention|attn|norm|bias|scal|multiplier|softcap|window|expert|quant|per_layer")
HARMLESS = re.compile(r"^_|dropout|flash|implementation|^output_")
READ = (
    "num_attention_heads rope_parameters rope_scaling rope_theta rms_norm_eps use_sliding_window sliding_window"
    " max_window_layers attention_bias partial_rotary_factor quantization_config"
).split()


def _other_computations(data: dict, kind: str, longest: int) -> dict[str, Any]:
    """Descriptions of what would make the model differ from the policy, each with whether it holds."""
    types = data.get("layer_types")
    full = types is None or (isinstance(types, list) and all(t in ("full_attention", "attention") for t in types))
    window = data.get("sliding_window", FAMILIES[kind].window)
    if FAMILIES[kind].name != "LlamaForCausalLM" or (isinstance(window, int) and window >= longest):
        window = None  # a Qwen's is not used without use_sliding_window
    biased = kind != "qwen2" and data.get("attention_bias")  # what a qwen2 says of it is not read
    unknown = [key for key, value in data.items() if value not in (None, False, [], {})]
    unknown = [key for key in unknown if COMPUTES.search(key) and not HARMLESS.search(key) and key not in READ]
    return {
        f"hidden_act {data.get('hidden_act')!r}, need silu": data.get("hidden_act", "silu") not in ("silu", "swish"),
        "use_sliding_window, need full attention": data.get("use_sliding_window", False),
        "layer_types other than full_attention": not full,
        f"attention_bias in a {kind}, need none": biased,
        f"sliding_window {window!r}, need null or at least its {longest} max_position_embeddings": window is not None,
        "quantised weights, need float32, float16 or bfloat16": data.get("quantization_config"),
        "transformers_weights, need model.safetensors or its index": data.get("transformers_weights"),
        f"{', '.join(unknown)}, which may change what is computed and is not known here": unknown,
    }


def _whole(data: dict, key: str, path: Path, default: int | None = None) -> int:
    """A positive whole number; `default`, if there is one, for a missing key. Raises UserError."""
    if key not in data and default is None:
        raise UserError(f"{path}: has no {key!r}")
    value = data.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise UserError(f"{path}: has {key} {_short(value)}, need a whole number of at least 1")
    return value


def _number(data: dict, key: str, path: Path, default: float | None = None, *, above: float | None = None) -> float:
    """A finite number of at least 0, or greater than `above`; `default` for a missing key. Raises UserError."""
    value = data.get(key, default)
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not 0 <= value < 3e38
        or (above is not None and value <= above)
    ):
        need = "at least 0" if above is None else f"more than {above:g}"
        raise UserError(f"{path}: has {key} {_short(value)}, need a number of {need}")
    return float(value)


ROPE_KEYS = set(
    "rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings attention_factor beta_fast"
    " beta_slow mscale mscale_all_dim truncate low_freq_factor high_freq_factor".split()
)


def _read_rope(data: dict, longest: int, path: Path) -> Rope:
    """Rotary parameters as `transformers` 5 reads all three generations of names.

    Non-empty `rope_scaling` takes precedence over `rope_parameters`; either may have one entry for each layer type.
    Theta in there takes precedence over `rope_theta` beside it, and that over 10,000.
    """
    found = data.get("rope_scaling") or data.get("rope_parameters") or {}
    nested = isinstance(found, dict) and "full_attention" in found
    if nested:
        found = {k: v for k, v in found.items() if k != "sliding_attention"}
        if len(found) == 1:
            found = found["full_attention"]
    if not isinstance(found, dict):
        raise UserError(f"{path}: has rotary parameters {_short(found)}, need an object with names")
    kind = found["rope_type"] if "rope_type" in found else found.get("type", "default")
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise UserError(f"{path}: rope_type {kind!r} is not supported, need default, linear, yarn or llama3")
    if unknown := sorted(set(found) - ROPE_KEYS):
        raise UserError(f"{path}: has the rotary parameters {', '.join(unknown)}, which are not known here")
    partial = found.get("partial_rotary_factor", data.get("partial_rotary_factor"))
    _refuse(path, {f"partial_rotary_factor {partial!r}, need 1": partial not in (None, 1)})
    found = {"rope_theta": data.get("rope_theta", 10_000.0), **found}
    theta = _number(found, "rope_theta", path, above=1)
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, _number(found, "factor", path, above=0))
    if "original_max_position_embeddings" in data and not nested:
        # A length beside the rotary parameters takes precedence, unless they are nested by layer type.
        found["original_max_position_embeddings"] = data["original_max_position_embeddings"]
    return (_read_llama3 if kind == "llama3" else _read_yarn)(found, theta, longest, path)


def _read_llama3(found: dict, theta: float, longest: int, path: Path) -> Rope:
    """Llama 3.1's parameters. Raises UserError."""
    original = _whole({"original_max_position_embeddings": longest, **found}, "original_max_position_embeddings", path)
    low, high = (_number(found, key, path) for key in ("low_freq_factor", "high_freq_factor"))
    _refuse(path, {f"high_freq_factor {high:g}, need more than its low_freq_factor {low:g}": high <= low})
    factor = _number(found, "factor", path, above=0)
    return Rope(theta, "llama3", factor, original, low_freq_factor=low, high_freq_factor=high)


def _read_yarn(found: dict, theta: float, longest: int, path: Path) -> Rope:
    """YaRN's parameters. Raises UserError."""
    original = _whole({"original_max_position_embeddings": longest, **found}, "original_max_position_embeddings", path)
    if found.get("factor") is None:
        found["factor"] = longest / original
    factor = _number(found, "factor", path, above=0)
    return Rope(
        theta,
        "yarn",
        factor,
        original,
        beta_fast=_number(found, "beta_fast", path) if found.get("beta_fast") else 32.0,
        beta_slow=_number(found, "beta_slow", path) if found.get("beta_slow") else 1.0,
        attention_factor=_attention_factor(found, factor, path),
        truncate=bool(found.get("truncate", True)),
    )


def _attention_factor(found: dict, factor: float, path: Path) -> float | None:
    """Factor on sines and cosines if YaRN's parameters set it; None: as in its paper."""
    if found.get("attention_factor") is not None:
        return _number(found, "attention_factor", path)
    if not (found.get("mscale") and found.get("mscale_all_dim")):
        return None
    stretch = 0.1 * math.log(max(factor, 1.0))
    above, below = (stretch * _number(found, key, path) + 1.0 for key in ("mscale", "mscale_all_dim"))
    return above / below


def hugging_face_config(config: PolicyConfig) -> dict:
    """The policy as a `config.json` for `transformers` 5, with the names that 4 reads as well.

    Args:
        config: shape of the policy.

    Returns:
        A JSON object.

    Raises:
        UserError: for a policy that is of no family.
    """
    shape = (config.qkv_bias, config.qk_norm)
    kind = next((kind for kind, family in FAMILIES.items() if (family.qkv_bias, family.qk_norm) == shape), None)
    if kind is None:
        raise UserError("a policy with both biases and normalised heads is no Llama, no Qwen2 and no Qwen3")
    rope: dict[str, Any] = {"rope_type": config.rope.kind}
    if config.rope.kind != "default":
        rope["factor"] = config.rope.factor
    if config.rope.kind in ("yarn", "llama3"):
        rope |= {"original_max_position_embeddings": config.rope.original_length}
    if config.rope.kind == "llama3":
        rope |= {"low_freq_factor": config.rope.low_freq_factor, "high_freq_factor": config.rope.high_freq_factor}
    if config.rope.kind == "yarn":
        rope |= {"beta_fast": config.rope.beta_fast, "beta_slow": config.rope.beta_slow}
        if config.rope.attention_factor is not None:
            rope["attention_factor"] = config.rope.attention_factor
        if not config.rope.truncate:
            rope["truncate"] = False
    same = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    same += " rms_norm_eps initializer_range tie_word_embeddings max_position_embeddings"
    return {
        "architectures": [FAMILIES[kind].name],
        "model_type": kind,
        "hidden_act": "silu",
        "dtype": config.param_dtype,
        "torch_dtype": config.param_dtype,
        "rope_parameters": {**rope, "rope_theta": config.rope.theta},
        "rope_theta": config.rope.theta,
        "rope_scaling": None if config.rope.kind == "default" else rope,
        **{key: getattr(config, key) for key in same.split()},
    }
