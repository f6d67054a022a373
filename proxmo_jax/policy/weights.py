"""Hugging Face checkpoints of Qwen2, Qwen2.5 and Qwen3 <-> our parameters.

Knows names and layouts, not mathematics. Parameters are read shard by shard, one tensor at a time, into arrays that lie
where they are to lie; nothing holds a second copy of the model.
"""

import json
import math
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from proxmo_jax.errors import UserError
from proxmo_jax.policy.decoder import PolicyConfig, Rope, parameter_shapes

SHARD = 4 << 30  # bytes in one file of a saved checkpoint
FLOATS = ("BF16", "F16", "F32", "F64")  # as safetensors names them


class Entry(NamedTuple):
    """One of our parameters in a checkpoint: the name there (`{}` is the layer), and the way there and back.

    `ours` takes their tensor and our shape (of one layer), `theirs` takes ours.
    """

    name: str
    ours: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


def _same(name: str) -> Entry:
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
    """A model's folder: the folder named, or a fetched copy of a hub id. Raises UserError if it is neither."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists() or model.startswith((".", "/", "~")):
        raise UserError(f"--model: {model} is not a folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--model: {model} is neither a folder here nor can it be fetched ({reason})") from error


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises UserError naming the file if it holds anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds {_short(data)}, need an object with names")
    return data


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_config(folder: Path, **choices: Any) -> PolicyConfig:
    """The policy's shape from `config.json`, with the defaults of `transformers`.

    Args:
        folder: a Hugging Face folder.
        choices: dtype, param_dtype, remat and what else the file does not say.

    Raises:
        UserError: for a folder without one, and for an architecture or a setting that the policy does not have.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: holds no config.json")
    data = read_json(path)
    kind = data.get("model_type")
    if kind not in ("qwen2", "qwen3"):
        raise UserError(f"{path}: architecture {kind!r} is not supported, need qwen2 or qwen3")
    hidden, heads = (_whole(data, key, path) for key in ("hidden_size", "num_attention_heads"))
    kv_heads = heads
    if data.get("num_key_value_heads", 32) is not None:
        kv_heads = _whole(data, "num_key_value_heads", path, 32)
    head_dim = hidden // heads
    if kind == "qwen3" or data.get("head_dim") is not None:
        head_dim = _whole(data, "head_dim", path, 128)
    tied = data.get("tie_word_embeddings", False)
    _refuse(
        path,
        {
            f"tie_word_embeddings {tied!r}, need true or false": not isinstance(tied, bool),
            f"{heads} num_attention_heads, need a multiple of its {kv_heads} num_key_value_heads": heads % kv_heads,
            f"head_dim {head_dim}, need an even number": head_dim % 2,
            **_other_computations(data, kind),
        },
    )
    longest = _whole(data, "max_position_embeddings", path, 32_768)
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
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        tie_word_embeddings=tied,
        max_position_embeddings=longest,
        **choices,
    )


def _refuse(path: Path, wrong: dict[str, Any]) -> None:
    """Raise UserError for the first description that holds."""
    for what, holds in wrong.items():
        if holds:
            raise UserError(f"{path}: has {what}")


# Names of settings that could change what a decoder computes, and those of them that do not, or that are read here.
# `transformers` reads no other than its own either, but a file that names one describes another model.
COMPUTES = re.compile(r"rope|rotary|attention|attn|norm|bias|scal|multiplier|softcap|window|expert|quant|per_layer")
HARMLESS = re.compile(r"^_|dropout|flash|implementation|^output_")
READ = (
    "num_attention_heads rope_parameters rope_scaling rope_theta rms_norm_eps use_sliding_window sliding_window"
    " max_window_layers attention_bias partial_rotary_factor quantization_config"
).split()


def _other_computations(data: dict, kind: str) -> dict[str, Any]:
    """What would make the model another one than the policy, each with whether it holds."""
    types = data.get("layer_types")
    full = types is None or (isinstance(types, list) and all(t in ("full_attention", "attention") for t in types))
    unknown = [key for key, value in data.items() if value not in (None, False, [], {})]
    unknown = [key for key in unknown if COMPUTES.search(key) and not HARMLESS.search(key) and key not in READ]
    return {
        f"hidden_act {data.get('hidden_act')!r}, need silu": data.get("hidden_act", "silu") not in ("silu", "swish"),
        "use_sliding_window, need full attention": data.get("use_sliding_window", False),
        "layer_types other than full_attention": not full,
        "attention_bias in a qwen3": kind == "qwen3" and data.get("attention_bias"),
        "quantised weights, need float32, float16 or bfloat16": data.get("quantization_config"),
        "transformers_weights, need model.safetensors or its index": data.get("transformers_weights"),
        f"{', '.join(unknown)}, which may change what is computed and is not known here": unknown,
    }


def _whole(data: dict, key: str, path: Path, default: int | None = None) -> int:
    """A number of things; `default`, if there is one, where the file does not name it. Raises UserError."""
    if key not in data and default is None:
        raise UserError(f"{path}: has no {key!r}")
    value = data.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise UserError(f"{path}: has {key} {_short(value)}, need a whole number of at least 1")
    return value


def _number(data: dict, key: str, path: Path, default: float | None = None, *, above: float | None = None) -> float:
    """A finite number of at least 0, or greater than `above`; `default` where the file does not name it.

    Raises UserError.
    """
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
    " beta_slow mscale mscale_all_dim truncate".split()
)


def _read_rope(data: dict, longest: int, path: Path) -> Rope:
    """Positions as `transformers` 5 reads all three generations of names.

    `rope_scaling`, if it says anything, comes before `rope_parameters`; either may have one entry for each type of
    layer. A theta in there comes before `rope_theta` beside it, and that before 10,000.
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
    if kind not in ("default", "linear", "yarn"):
        raise UserError(f"{path}: rope_type {kind!r} is not supported, need default, linear or yarn")
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
    # A length beside the rotary parameters comes first, unless they are written for each type of layer.
    if "original_max_position_embeddings" in data and not nested:
        found["original_max_position_embeddings"] = data["original_max_position_embeddings"]
    original = _whole({"original_max_position_embeddings": longest, **found}, "original_max_position_embeddings", path)
    if found.get("factor") is None:
        found["factor"] = longest / original
    factor = _number(found, "factor", path, above=0)
    return Rope(
        theta,
        kind,
        factor,
        original,
        beta_fast=_number(found, "beta_fast", path) if found.get("beta_fast") else 32.0,
        beta_slow=_number(found, "beta_slow", path) if found.get("beta_slow") else 1.0,
        attention_factor=_attention_factor(found, factor, path),
        truncate=bool(found.get("truncate", True)),
    )


def _attention_factor(found: dict, factor: float, path: Path) -> float | None:
    """What sines and cosines are multiplied by, where YaRN's parameters set it; None: what its paper says."""
    if found.get("attention_factor") is not None:
        return _number(found, "attention_factor", path)
    if not (found.get("mscale") and found.get("mscale_all_dim")):
        return None
    stretch = 0.1 * math.log(max(factor, 1.0))
    above, below = (stretch * _number(found, key, path) + 1.0 for key in ("mscale", "mscale_all_dim"))
    return above / below


def hugging_face_config(config: PolicyConfig) -> dict:
    """`config.json` of the policy, for `transformers` 5 and under the names that 4 reads.

    Raises UserError for a policy that is neither a Qwen2 nor a Qwen3.
    """
    if config.qkv_bias == config.qk_norm:
        raise UserError("a policy with both biases and normalised heads, or with neither, is no Qwen2 and no Qwen3")
    rope: dict[str, Any] = {"rope_type": config.rope.kind}
    if config.rope.kind != "default":
        rope["factor"] = config.rope.factor
    if config.rope.kind == "yarn":
        rope |= {"original_max_position_embeddings": config.rope.original_length}
        rope |= {"beta_fast": config.rope.beta_fast, "beta_slow": config.rope.beta_slow}
        if config.rope.attention_factor is not None:
            rope["attention_factor"] = config.rope.attention_factor
        if not config.rope.truncate:
            rope["truncate"] = False
    kind, name = ("qwen3", "Qwen3ForCausalLM") if config.qk_norm else ("qwen2", "Qwen2ForCausalLM")
    same = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    same += " rms_norm_eps initializer_range tie_word_embeddings max_position_embeddings"
    return {
        "architectures": [name],
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
    """The parameters of a checkpoint, in `config.param_dtype`, laid out as `shardings` (a tree; default: one device).

    Raises UserError once for everything that is wrong: no weights, a truncated file, names missing or left over,
    shapes that are not the config's.
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
        _check_names(folder, config, {_key(path): leaf.shape for path, leaf in paths}, where)
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
    return "/".join(part.key for part in path)


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The safetensors files of a checkpoint, each with the tensors to take from it; None: all that it holds.

    As in `transformers`: `model.safetensors`; without it what `model.safetensors.index.json` names, tensor by tensor;
    nothing else. Raises UserError if there is neither, or a file is missing.
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


def _check_names(folder: Path, config: PolicyConfig, shapes: dict[str, tuple[int, ...]], where: dict[str, Any]) -> None:
    """Raise UserError naming every tensor that is missing, left over, of another shape or of no float type."""
    wrong, used = [], set()
    for key, shape in shapes.items():
        entry = ENTRIES[key]
        stacked = key.startswith("layers/")
        names = [entry.name.format(i) for i in range(config.num_hidden_layers)] if stacked else [entry.name]
        expected = list(entry.theirs(np.empty(shape[1:] if stacked else shape, np.bool_)).shape)
        for name in names:
            used.add(name)
            if name not in where:
                wrong.append(f"{name} is missing")
                continue
            tensor = where[name].get_slice(name)
            if (found := tensor.get_shape()) != expected:
                wrong.append(f"{name} has shape {found}, need {expected}")
            elif (dtype := tensor.get_dtype()) not in FLOATS:
                wrong.append(f"{name} has type {dtype}, need one of {', '.join(FLOATS)}")
    harmless = {"lm_head.weight"} if config.tie_word_embeddings else set()
    left = sorted(name for name in set(where) - used - harmless if not name.endswith("rotary_emb.inv_freq"))
    wrong += [f"{name} is left over" for name in left]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{folder}: the weights are not those of its config.json: {'; '.join(wrong[:5])}{more}")


def _load(key: str, like: jax.ShapeDtypeStruct, sharding, where: dict[str, Any]) -> jax.Array:
    """One parameter, each device's part of it read on its own."""
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
    """Write `config.json` and safetensors that `transformers` loads; returns the weight files.

    A layer at a time is brought to the host, and a file is written when it holds `SHARD` bytes.
    """
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

    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        key = _key(path)
        entry = ENTRIES[key]
        stacked = key.startswith("layers/")
        for layer in range(leaf.shape[0] if stacked else 1):
            tensor = np.ascontiguousarray(entry.theirs(np.asarray(leaf[layer] if stacked else leaf)))
            if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > SHARD:
                flush()
            pending[entry.name.format(layer)] = tensor
            total += tensor.nbytes
    flush()
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
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes(config)))
