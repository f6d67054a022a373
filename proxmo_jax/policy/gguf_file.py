"""GGUF files (llama.cpp) of Llama, Qwen2 and Qwen3: their shape and weights, as a Hugging Face folder has them.

The `gguf` package reads the file and dequantises. Written after the specification (github.com/ggml-org/ggml,
docs/gguf.md) and llama.cpp's convert_hf_to_gguf.py, whose changes to the weights are undone here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from proxmo_jax.errors import UserError
from proxmo_jax.policy.decoder import PolicyConfig, Rope
from proxmo_jax.policy.model_config import config_of
from proxmo_jax.policy.weights import checkpoint_shapes, report_wrong

ARCHITECTURES = ("llama", "qwen2", "qwen3")
MAGIC = b"GGUF"
# `config.json` calls these names of the metadata, after the architecture and a dot, differently.
NAMES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
}
READ = ("vocab_size", "attention.value_length", "rope.dimension_count")
SCALING = {
    "type": "rope_type",
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
# Llama 3.1's extension of the context is stored as the divisors of its frequencies. All of its models have these.
DIVISORS = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class GgufFile(NamedTuple):
    """An opened file.

    Attributes:
        path: of the file.
        metadata: its key-value pairs.
        tensors: by name, as `gguf.GGUFReader` has them; their data stay on disk until read.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Any]

    @property
    def architecture(self) -> str:
        """The family, by its name in llama.cpp, which is transformers' model_type."""
        return self.metadata["general.architecture"]


def gguf_package() -> Any:
    """The gguf package. Raises UserError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF files are read with the gguf package: pip install 'proxmo-jax[gguf]'") from error
    return gguf


def open_gguf(path: Path) -> GgufFile:
    """Open a GGUF file.

    Args:
        path: the file.

    Returns:
        The file, of a supported architecture.

    Raises:
        UserError: if the gguf package is missing, the file is none, is truncated, is one part of several, or is of
            another architecture.
    """
    gguf = gguf_package()
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    with path.open("rb") as file:
        if (start := file.read(4)) != MAGIC:
            raise UserError(f"{path}: is no GGUF file, it begins with {start!r} instead of {MAGIC!r}")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError) as error:
        # The package does not check what it reads, so that a file that ends too soon shows in one of these.
        unknown = "GGMLQuantizationType" in str(error)
        what = "has a quantisation that the gguf package does not know" if unknown else "is truncated or damaged"
        raise UserError(f"{path}: {what} ({error})") from error
    if reader.endianess != gguf.GGUFEndian.LITTLE:
        raise UserError(f"{path}: has its numbers in big-endian order, need little-endian")
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path}: architecture {architecture!r} is not supported, need {', '.join(ARCHITECTURES)}")
    if (parts := metadata.get("split.count", 1)) not in (0, 1):
        raise UserError(f"{path}: is one of {parts} parts; join them with llama.cpp's gguf-split --merge first")
    return GgufFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


def gguf_config(file: GgufFile, **choices: Any) -> PolicyConfig:
    """The shape of the policy.

    Args:
        file: the opened file.
        choices: fields of `PolicyConfig`, as for `read_config`.

    Returns:
        The shape.

    Raises:
        UserError: as `read_config`, with the names of `config.json`.
    """
    prefix = f"{file.architecture}."
    found = {key.removeprefix(prefix): _plain(value) for key, value in file.metadata.items() if key.startswith(prefix)}
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise UserError(f"{file.path}: holds no token_embd.weight, the table of embeddings")
    scaling = {key.removeprefix("rope.scaling."): found.pop(key) for key in list(found) if "rope.scaling." in key}
    data = {NAMES.get(key, key): value for key, value in found.items() if key not in READ}
    data |= {
        "model_type": file.architecture,
        "vocab_size": int(table.shape[1]),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "head_dim": found.get("attention.key_length", found.get("rope.dimension_count")),
        "num_key_value_heads": found.get("attention.head_count_kv"),  # None: as many as heads
        "rope_parameters": _rope_parameters(file, scaling),
    }
    if data["head_dim"] is None:
        data["head_dim"] = _head_dim(data)
    config = config_of(data, file.path, **choices)
    for key in ("attention.value_length", "rope.dimension_count"):
        if found.get(key, config.head_dim) != config.head_dim:
            raise UserError(f"{file.path}: has {prefix}{key} {found[key]}, need the {config.head_dim} of a head")
    if DIVISORS in file.tensors:
        _check_divisors(file, config)
    return config


def _plain(value: Any) -> Any:
    """A value of the metadata; float32 numbers as they were meant, 1e-5 instead of 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _head_dim(data: dict) -> int | None:
    """Dimensions of a head where the file does not say."""
    hidden, heads = data.get("hidden_size"), data.get("num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def _rope_parameters(file: GgufFile, scaling: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters as `config.json` has them."""
    scaling.pop("finetuned", None)
    kind = scaling.get("type", "none")
    if DIVISORS in file.tensors:
        if kind != "none":
            raise UserError(f"{file.path}: has both {DIVISORS} and rope.scaling.type {kind!r}, need one of them")
        return {"rope_type": "llama3", "factor": float(_dequantised(file, DIVISORS).max(initial=1.0)), **LLAMA3}
    if kind == "none":
        return {"rope_type": "default"}
    return {SCALING.get(key, key): value for key, value in scaling.items()}


def _check_divisors(file: GgufFile, config: PolicyConfig) -> None:
    """Raise UserError if the file's frequencies are not those of the config."""
    divisors = _dequantised(file, DIVISORS).reshape(-1)
    plain, _ = Rope(config.rope.theta).frequencies(config.head_dim)
    ours, _ = config.rope.frequencies(config.head_dim)
    if divisors.shape != plain.shape or not np.allclose(plain / divisors, ours, rtol=1e-4, atol=0):
        raise UserError(f"{file.path}: its {DIVISORS} are not those of Llama 3.1, need its scaling or none")


def gguf_tensors(file: GgufFile, config: PolicyConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Dequantised weights with the names and layouts of a Hugging Face checkpoint, one at a time.

    Args:
        file: the opened file.
        config: its shape; the tensors get `config.param_dtype`.

    Returns:
        Names and tensors.

    Raises:
        UserError: at once, for everything that is wrong: missing or unexpected tensors, shapes that differ from those
            of the config, quantisations that cannot be read.
    """
    names = _stored_names(file, config)
    return _read_tensors(file, config, names)


def _stored_names(file: GgufFile, config: PolicyConfig) -> dict[str, str]:
    """For each tensor of the checkpoint, its name in the file. Raises UserError as `gguf_tensors`."""
    import gguf

    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture)
    known = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    names: dict[str, str] = {}
    wrong = []
    for name, shape in checkpoint_shapes(config).items():
        stem, _, ending = name.rpartition(".")
        stored = names[name] = f"{known.get_name(stem)}.{ending}"
        tensor = file.tensors.get(stored)
        if tensor is None:
            wrong.append(f"{stored} is missing")
        elif (found := [int(size) for size in reversed(tensor.shape)]) != shape:
            wrong.append(f"{stored} has shape {found}, need {shape}")
        elif not _readable(tensor):
            wrong.append(f"{stored} {_unreadable(tensor)}")
    left = sorted(set(file.tensors) - set(names.values()) - {DIVISORS})
    report_wrong(file.path, [*wrong, *(f"{name} is left over" for name in left)], "cannot be converted")
    return names


def _readable(tensor: Any) -> bool:
    """Whether the gguf package dequantises a tensor: tried on its first row."""
    from gguf.quants import dequantize

    try:
        dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
    except NotImplementedError:
        return False
    return True


def _unreadable(tensor: Any) -> str:
    return f"is quantised as {tensor.tensor_type.name}, which the gguf package cannot read"


def _dequantised(file: GgufFile, name: str) -> np.ndarray:
    """A tensor of the file, float32. Raises UserError for a quantisation that cannot be read."""
    from gguf.quants import dequantize

    tensor = file.tensors[name]
    if not _readable(tensor):
        raise UserError(f"{file.path}: {name} {_unreadable(tensor)}")
    return dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)


def _read_tensors(file: GgufFile, config: PolicyConfig, names: dict[str, str]) -> Iterator[tuple[str, np.ndarray]]:
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    for name, stored in names.items():
        tensor = _dequantised(file, stored)
        kind = ".".join(name.split(".")[-2:])
        if file.architecture == "llama" and kind in heads:
            tensor = half_split(tensor, heads[kind])
        yield name, tensor.astype(config.param_dtype)


def half_split(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a llama's query or key from llama.cpp's order to that of Hugging Face.

    llama.cpp rotates neighbouring dimensions of a head, Hugging Face those of its two halves.

    Args:
        matrix: float [heads * head_dim, in].
        heads: their number.

    Returns:
        float [heads * head_dim, in].
    """
    return matrix.reshape(heads, -1, 2, matrix.shape[-1]).swapaxes(1, 2).reshape(matrix.shape)
