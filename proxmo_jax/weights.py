"""Hugging Face checkpoints of Qwen2, Qwen2.5 and Qwen3 <-> our parameters.

Knows names and layouts, not mathematics. Parameters are read shard by shard, one tensor at a time, into arrays that lie
where they are to lie; nothing holds a second copy of the model.
"""

import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from proxmo_jax.errors import UserError
from proxmo_jax.policy import PolicyConfig, Rope, parameter_shapes

SHARD = 4 << 30  # bytes in one file of a saved checkpoint


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


def read_config(folder: Path, **choices: Any) -> PolicyConfig:
    """The policy's shape from `config.json`; `choices` set dtype, param_dtype and remat.

    Raises UserError for a folder without one, and for an architecture or a setting that the policy does not have.
    """
    path = Path(folder) / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder}: holds no config.json") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    kind = data.get("model_type")
    if kind not in ("qwen2", "qwen3"):
        raise UserError(f"{path}: architecture {kind!r} is not supported, need qwen2 or qwen3")
    layers = data.get("layer_types") or []
    for wrong, what in (
        (data.get("hidden_act", "silu") != "silu", f"hidden_act {data.get('hidden_act')!r}, need silu"),
        (data.get("use_sliding_window", False), "use_sliding_window, need full attention"),
        (any(layer != "full_attention" for layer in layers), "layer_types other than full_attention"),
        (kind == "qwen3" and data.get("attention_bias", False), "attention_bias in a qwen3"),
        (bool(data.get("quantization_config")), "quantised weights, need float32, float16 or bfloat16"),
    ):
        if wrong:
            raise UserError(f"{path}: has {what}")
    try:
        heads = data["num_attention_heads"]
        return PolicyConfig(
            vocab_size=data["vocab_size"],
            hidden_size=data["hidden_size"],
            intermediate_size=data["intermediate_size"],
            num_hidden_layers=data["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=data.get("num_key_value_heads") or heads,
            head_dim=data.get("head_dim") or data["hidden_size"] // heads,
            rope=_read_rope(data, path),
            rms_norm_eps=data.get("rms_norm_eps", 1e-6),
            initializer_range=data.get("initializer_range", 0.02),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            tie_word_embeddings=data.get("tie_word_embeddings", False),
            max_position_embeddings=data.get("max_position_embeddings", 32_768),
            **choices,
        )
    except KeyError as error:
        raise UserError(f"{path}: has no {error.args[0]!r}") from error


def _read_rope(data: dict, path: Path) -> Rope:
    """Positions as transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`) writes them."""
    found = data.get("rope_parameters") or {**(data.get("rope_scaling") or {}), "rope_theta": data.get("rope_theta")}
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind not in ("default", "linear", "yarn"):
        raise UserError(f"{path}: rope_type {kind!r} is not supported, need default, linear or yarn")
    original = found.get("original_max_position_embeddings") or data.get("max_position_embeddings") or 32_768
    return Rope(
        theta=float(found.get("rope_theta") or 10_000.0),
        kind=kind,
        factor=float(found.get("factor") or 1.0),
        original_length=int(original),
        beta_fast=float(found.get("beta_fast") or 32.0),
        beta_slow=float(found.get("beta_slow") or 1.0),
        attention_factor=found.get("attention_factor"),
    )


def hugging_face_config(config: PolicyConfig) -> dict:
    """`config.json` of the policy. Raises UserError for a policy that is neither a Qwen2 nor a Qwen3."""
    if config.qkv_bias == config.qk_norm:
        raise UserError("a policy with both biases and normalised heads, or with neither, is no Qwen2 and no Qwen3")
    rope = {"rope_type": config.rope.kind, "rope_theta": config.rope.theta}
    if config.rope.kind != "default":
        rope["factor"] = config.rope.factor
    if config.rope.kind == "yarn":
        rope |= {"original_max_position_embeddings": config.rope.original_length}
        rope |= {"beta_fast": config.rope.beta_fast, "beta_slow": config.rope.beta_slow}
        if config.rope.attention_factor is not None:
            rope["attention_factor"] = config.rope.attention_factor
    kind, name = ("qwen3", "Qwen3ForCausalLM") if config.qk_norm else ("qwen2", "Qwen2ForCausalLM")
    same = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    same += " rms_norm_eps initializer_range tie_word_embeddings max_position_embeddings"
    return {
        "architectures": [name],
        "model_type": kind,
        "hidden_act": "silu",
        "dtype": config.param_dtype,
        "rope_parameters": rope,
        **{key: getattr(config, key) for key in same.split()},
    }


def load_weights(folder: Path, config: PolicyConfig, shardings: Any = None) -> Any:
    """The parameters of a checkpoint, in `config.param_dtype`, laid out as `shardings` (a tree; default: one device).

    Raises UserError once for everything that is wrong: no weights, a truncated file, names missing or left over,
    shapes that are not the config's.
    """
    files = weight_files(Path(folder))
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in files:
            try:
                opened = stack.enter_context(safe_open(file, framework="np"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: is truncated or no safetensors file ({error})") from error
            where |= dict.fromkeys(opened.keys(), opened)
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


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises UserError if there are none, or one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = [folder / name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index}: is no index of weights ({error})") from error
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: holds no weights (*.safetensors)")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder}: lacks {', '.join(missing)}, which its index names")
    return files


def _check_names(folder: Path, config: PolicyConfig, shapes: dict[str, tuple[int, ...]], where: dict[str, Any]) -> None:
    """Raise ValueError naming every tensor that is missing, left over or of another shape."""
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
            elif (found := where[name].get_slice(name).get_shape()) != expected:
                wrong.append(f"{name} has shape {found}, need {expected}")
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
