"""Conversion between Hugging Face checkpoints of Llama, Qwen2, Qwen2.5 and Qwen3 and our parameters: names and layouts.

Parameters are read one tensor at a time, directly into sharded arrays; there is never a second copy of the model.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from proxmo_jax.errors import UserError
from proxmo_jax.policy.decoder import PolicyConfig, parameter_shapes
from proxmo_jax.policy.model_config import hugging_face_config, read_json

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
