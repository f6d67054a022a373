"""GGUF files as llama.cpp's convert_hf_to_gguf.py writes them, of tiny checkpoints."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from proxmo_jax.policy.decoder import PolicyConfig

STORED = {
    "model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TINY_TOKENS = {
    "ggml.model": "gpt2", "ggml.pre": "smollm", "ggml.tokens": [*SPECIAL, *map(chr, range(65, 91))],
    "ggml.token_type": [3, 3, 3] + [1] * 26, "ggml.merges": ["A B"], "ggml.eos_token_id": 2, "ggml.bos_token_id": 1,
    "chat_template": TEMPLATE,
}  # fmt: skip
TINY_TOKENS["ggml.tokens"][-1] = "AB"


def stored_name(name: str) -> str:
    """llama.cpp's name for a tensor."""
    stem, _, ending = name.rpartition(".")
    if stem.startswith("model.layers."):
        layer, _, stem = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{STORED[stem]}.{ending}"
    return f"{STORED[stem]}.{ending}"


def neighbours(matrix: np.ndarray, heads: int) -> np.ndarray:
    """`permute` of convert_hf_to_gguf.py: the two halves of every head, interleaved."""
    return matrix.reshape(heads, 2, matrix.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(matrix.shape)


def stored_as(matrix: np.ndarray, kind: str):
    """The type of a tensor: vectors stay float32, and rows that the blocks do not divide float16."""
    from gguf import GGMLQuantizationType as Types

    if matrix.ndim == 1:
        return Types.F32
    return Types.F16 if kind.startswith("Q") and matrix.shape[-1] % 32 else Types[kind]


def write_gguf(path: Path, checkpoint: Path, config: PolicyConfig, *, kind="F32", arch="", tokens=None, change=None):
    """Write the file; `arch`: llama, qwen2 or qwen3; `tokens`: entries of the tokenizer; `change(writer, tensors)`
    may add entries and alter the tensors."""
    import gguf
    from gguf.quants import quantize

    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name, value in (TINY_TOKENS if tokens is None else tokens).items():
        write = {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool, list: writer.add_array}
        write[type(value)](f"tokenizer.{name}", value)
    tensors = {stored_name(name): tensor for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
    for name, tensor in tensors.items():
        if arch == "llama" and (count := heads.get(".".join(name.split(".")[-2:]))):
            tensors[name] = neighbours(tensor, count)
    if change is not None:
        change(writer, tensors)
    for name, tensor in tensors.items():
        stored = stored_as(tensor, kind)
        writer.add_tensor(name, quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
