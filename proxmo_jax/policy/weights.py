"""Conversion between Hugging Face checkpoints of Llama, Qwen2, Qwen2.5 and Qwen3 and our parameters: names and layouts.

Parameters are read one tensor at a time, directly into sharded arrays; there is never a second copy of the model.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from proxmo_jax.errors import UserError
from proxmo_jax.policy.decoder import PolicyConfig, Rope, parameter_shapes

SHARD = 4 << 30  # bytes of a file of a saved checkpoint, at most
FLOATS = ("BF16", "F16", "F32", "F64")  # as safetensors names them


class Entry(NamedTuple):
    """One of our parameters in a checkpoint.

    Attributes:
        name: of the tensor in the checkpoint; `{}` is the layer.
        ours: converts their tensor, given the shape of ours (of one layer).
        theirs: converts our array (of one layer).
    """

    name: str
    ours: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


def _same(name: str) -> Entry:
    """The same layout."""
    return Entry(name, lambda x, shape: x, lambda x: x)


def _matrix(name: str) -> Entry:
    """[out, in] there, [in, out] here."""
    return Entry(name, lambda x, shape: x.T, lambda x: x.T)


def _to_heads(name: str) -> Entry:
    """[heads * head_dim, in] there, [in, heads, head_dim] here."""
    return Entry(name, lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(x.shape[0], -1).T)


def _from_heads(name: str) -> Entry:
    """[out, heads * head_dim] there, [heads, head_dim, out] here."""
    return Entry(name, lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(-1, x.shape[-1]).T)


def _head_bias(name: str) -> Entry:
    """[heads * head_dim] there, [heads, head_dim] here."""
    return Entry(name, lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1))


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

LAYER = "model.layers.{}."
ENTRIES = {
    "embedding": _same("model.embed_tokens.weight"),
    "head": _same("lm_head.weight"),
    "norm/weight": _same("model.norm.weight"),
    "layers/input_norm/weight": _same(LAYER + "input_layernorm.weight"),
    "layers/mlp_norm/weight": _same(LAYER + "post_attention_layernorm.weight"),
    "layers/query_norm/weight": _same(LAYER + "self_attn.q_norm.weight"),
    "layers/key_norm/weight": _same(LAYER + "self_attn.k_norm.weight"),
    "layers/query/kernel": _to_heads(LAYER + "self_attn.q_proj.weight"),
    "layers/key/kernel": _to_heads(LAYER + "self_attn.k_proj.weight"),
    "layers/value/kernel": _to_heads(LAYER + "self_attn.v_proj.weight"),
    "layers/query/bias": _head_bias(LAYER + "self_attn.q_proj.bias"),
    "layers/key/bias": _head_bias(LAYER + "self_attn.k_proj.bias"),
    "layers/value/bias": _head_bias(LAYER + "self_attn.v_proj.bias"),
    "layers/output/kernel": _from_heads(LAYER + "self_attn.o_proj.weight"),
    "layers/gate/kernel": _matrix(LAYER + "mlp.gate_proj.weight"),
    "layers/up/kernel": _matrix(LAYER + "mlp.up_proj.weight"),
    "layers/down/kernel": _matrix(LAYER + "mlp.down_proj.weight"),
}


def find_model(model: str) -> Path:
    """The folder of a model: a local one, or a download from the Hugging Face hub.

    Args:
        model: a folder or a hub id.

    Returns:
        The folder.

    Raises:
        UserError: if it is neither.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists() or model.startswith((".", "/", "~")):
        cure = "; `proxmo convert-gguf` makes one of it" if folder.suffix == ".gguf" and folder.exists() else ""
        raise UserError(f"--model: {model} is not a folder{cure}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--model: {model} is neither a folder here nor can it be fetched ({reason})") from error


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


def load_weights(folder: Path, config: PolicyConfig, shardings: Any = None) -> Any:
    """Load the parameters of a checkpoint.

    Args:
        folder: a Hugging Face folder.
        config: shape of the policy; parameters get `config.param_dtype`.
        shardings: a tree of shardings (default: one device).

    Returns:
        The tree of parameters.

    Raises:
        UserError: once for everything that is wrong: no weights, a truncated file, missing or unexpected tensors,
            shapes that differ from those of the config.
    """
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for file, names in weight_files(Path(folder)).items():
            try:
                opened = stack.enter_context(safe_open(file, framework="np"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: is truncated or no safetensors file ({error})") from error
            held = set(opened.keys())
            if lacking := sorted(set(names or ()) - held):
                raise UserError(f"{file}: lacks {lacking[0]}, which the index of its folder has there")
            where |= dict.fromkeys(held if names is None else names, opened)
        shapes = parameter_shapes(config)
        paths, tree = jax.tree_util.tree_flatten_with_path(shapes)
        _check_names(folder, config, where)
        if shardings is None:
            one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            placed = [one] * len(paths)
        else:
            placed = jax.tree.leaves(shardings)
        leaves = [
            _load(_key(path), leaf, sharding, where) for (path, leaf), sharding in zip(paths, placed, strict=True)
        ]
    return jax.tree.unflatten(tree, leaves)


def _key(path) -> str:
    """Path of a parameter, joined by slashes."""
    return "/".join(part.key for part in path)


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The safetensors files of a checkpoint, as `transformers` chooses them.

    `model.safetensors`, or without it the files named in `model.safetensors.index.json`.

    Args:
        folder: a Hugging Face folder.

    Returns:
        The tensors to read from each file; None: all of them.

    Raises:
        UserError: if there is neither, or a file is missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if not index.is_file():
        others = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))[:3])
        found = f", but {others}" if others else ""
        raise UserError(f"{folder}: holds no weights (model.safetensors, or {index.name} and what it names){found}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: is no index of weights, need a weight_map from tensors to files")
    files: dict[Path, list[str] | None] = {}
    for file in sorted(set(weight_map.values())):
        files[folder / file] = [tensor for tensor, place in weight_map.items() if place == file]
    if not files:
        raise UserError(f"{index}: holds no weights, its weight_map is empty")
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{folder}: lacks {', '.join(missing)}, which its index names")
    return files


def checkpoint_shapes(config: PolicyConfig) -> dict[str, list[int]]:
    """The tensors of a checkpoint of this shape: their names and shapes."""
    shapes: dict[str, list[int]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(parameter_shapes(config))[0]:
        entry = ENTRIES[_key(path)]
        stacked = _key(path).startswith("layers/")
        shape = list(entry.theirs(np.empty(leaf.shape[1:] if stacked else leaf.shape, np.bool_)).shape)
        layers = range(config.num_hidden_layers if stacked else 1)
        shapes |= dict.fromkeys((entry.name.format(layer) for layer in layers), shape)
    return shapes


def _check_names(folder: Path, config: PolicyConfig, where: dict[str, Any]) -> None:
    """Raise UserError naming every tensor that is missing, unexpected, of another shape or not of a float type."""
    wrong = []
    shapes = checkpoint_shapes(config)
    for name, expected in shapes.items():
        if name not in where:
            wrong.append(f"{name} is missing")
            continue
        tensor = where[name].get_slice(name)
        if (found := tensor.get_shape()) != expected:
            wrong.append(f"{name} has shape {found}, need {expected}")
        elif (dtype := tensor.get_dtype()) not in FLOATS:
            wrong.append(f"{name} has type {dtype}, need one of {', '.join(FLOATS)}")
    harmless = {"lm_head.weight"} if config.tie_word_embeddings else set()
    left = sorted(name for name in set(where) - set(shapes) - harmless if not name.endswith("rotary_emb.inv_freq"))
    report_wrong(folder, [*wrong, *(f"{name} is left over" for name in left)])


def report_wrong(folder: Path, wrong: list[str], verdict: str = "are not those of its config.json") -> None:
    """Raise UserError if something about the weights is wrong, naming at most five things."""
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{folder}: the weights {verdict}: {'; '.join(wrong[:5])}{more}")


def _load(key: str, like: jax.ShapeDtypeStruct, sharding, where: dict[str, Any]) -> jax.Array:
    """One parameter; each device's shard is read separately."""
    entry = ENTRIES[key]

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return entry.ours(where[name].get_tensor(name), shape)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        if not key.startswith("layers/"):
            return np.ascontiguousarray(read(entry.name, like.shape)[index].astype(like.dtype))
        layers = range(*index[0].indices(like.shape[0]))
        shape = tuple(len(range(*s.indices(n))) for s, n in zip(index[1:], like.shape[1:], strict=True))
        stacked = np.empty((len(layers), *shape), like.dtype)
        for row, layer in enumerate(layers):
            stacked[row] = read(entry.name.format(layer), like.shape[1:])[index[1:]]
        return stacked

    return jax.make_array_from_callback(like.shape, sharding, part)


def save_weights(folder: Path, params: Any, config: PolicyConfig) -> list[Path]:
    """Write `config.json` and safetensors files that `transformers` loads.

    One layer at a time is copied to the host; a file has at most `SHARD` bytes.

    Args:
        folder: the target; made if it does not exist.
        params: the tree of parameters.
        config: shape of the policy.

    Returns:
        The weight files.

    Raises:
        UserError: as `hugging_face_config`.
    """
    return save_tensors(folder, _their_tensors(params), config)


def _their_tensors(params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a checkpoint, by their names; one at a time is copied to the host."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        key = _key(path)
        entry = ENTRIES[key]
        stacked = key.startswith("layers/")
        for layer in range(leaf.shape[0] if stacked else 1):
            yield entry.name.format(layer), entry.theirs(np.asarray(leaf[layer] if stacked else leaf))


def save_tensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], config: PolicyConfig) -> list[Path]:
    """As `save_weights`, for tensors with the names and layouts of the checkpoint."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hugging_face_config(config), indent=2) + "\n", encoding="utf-8")
    pending: dict[str, np.ndarray] = {}
    written: list[tuple[Path, list[str]]] = []
    total = 0

    def flush() -> None:
        path = folder / f"part-{len(written):05d}.safetensors"
        save_file(pending, path, metadata={"format": "pt"})
        written.append((path, list(pending)))
        pending.clear()

    for name, tensor in tensors:
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > SHARD:
            flush()
        pending[name] = np.ascontiguousarray(tensor)
        total += tensor.nbytes
    flush()
    return _named(folder, written, total)


def _named(folder: Path, written: list[tuple[Path, list[str]]], total: int) -> list[Path]:
    """Rename weight files as `transformers` expects; several get an index. `total`: bytes of all tensors."""
    if len(written) == 1:
        target = folder / "model.safetensors"
        written[0][0].replace(target)
        return [target]
    weight_map: dict[str, str] = {}
    files = []
    for number, (file, names) in enumerate(written, start=1):
        target = folder / f"model-{number:05d}-of-{len(written):05d}.safetensors"
        file.replace(target)
        files.append(target)
        weight_map |= dict.fromkeys(names, target.name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return files


def parameter_count(config: PolicyConfig) -> int:
    """The number of parameters of a policy of this shape."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes(config)))
