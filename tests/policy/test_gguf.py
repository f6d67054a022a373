"""GGUF files: their weights, shapes and tokens in a Hugging Face folder, and files that are wrong."""

import json
import sys

import gguf_files
import jax
import numpy as np
import pytest
import qwen_record
import smollm2_record
from close import EPS, roundings
from gguf_files import TINY_TOKENS, write_gguf
from safetensors.numpy import load_file
from test_weights import LENGTHS, batch_logits

from proxmo_jax.agent.chat import chat
from proxmo_jax.agent.make_player import stop_ids
from proxmo_jax.cli import main
from proxmo_jax.policy import gguf_tokenizer
from proxmo_jax.policy.decoder import Rope
from proxmo_jax.policy.gguf_file import gguf_config, open_gguf
from proxmo_jax.policy.model_config import read_config
from proxmo_jax.policy.tokenizer import load_model_tokenizer
from proxmo_jax.policy.weights import load_weights

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
CASES = {"llama_untied": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # recorded checkpoints, and their architectures


def write(path, name="llama_untied", **options):
    """The file of a recorded checkpoint; returns the checkpoint."""
    folder = qwen_record.FOLDER / name
    write_gguf(path, folder, read_config(folder), arch=CASES[name], **options)
    return folder


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_that_were_stored(tmp_path, name, kind):
    from gguf.quants import dequantize, quantize

    folder = write(tmp_path / "m.gguf", name, kind=kind)
    assert main(["convert-gguf", str(tmp_path / "m.gguf"), str(tmp_path / "m")]) == 0
    ours, theirs = (load_file(place / "model.safetensors") for place in (tmp_path / "m", folder))
    assert set(ours) == set(theirs) - ({"lm_head.weight"} if name == "qwen2" else set())
    for key, found in ours.items():
        stored = gguf_files.stored_as(theirs[key], kind)
        np.testing.assert_array_equal(found, dequantize(quantize(theirs[key], stored), stored))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == CASES[name]


@pytest.mark.parametrize("name", CASES)
def test_an_unquantised_file_answers_as_its_checkpoint(tmp_path, name):
    folder = write(tmp_path / "m.gguf", name)
    assert main(["convert-gguf", str(tmp_path / "m.gguf"), str(tmp_path / "m")]) == 0
    config = read_config(tmp_path / "m")
    ours = batch_logits(load_weights(tmp_path / "m", config), config)
    theirs = np.load(folder / "answers.npz")["logits"]
    for row, length in enumerate(LENGTHS):
        atol = 2 * roundings(config, 17) * EPS
        np.testing.assert_allclose(ours[row, -length:], theirs[row, -length:], rtol=0, atol=atol)


def test_bfloat16_weights_are_the_same_rounded(tmp_path):
    write(tmp_path / "m.gguf", kind="Q8_0")
    for dtype in ("float32", "bfloat16"):
        assert main(["convert-gguf", str(tmp_path / "m.gguf"), str(tmp_path / dtype), "--dtype", dtype]) == 0
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text())["dtype"] == "bfloat16"
    config = read_config(tmp_path / "float32", param_dtype="bfloat16")
    both = [load_weights(tmp_path / dtype, config) for dtype in ("float32", "bfloat16")]
    jax.tree.map(np.testing.assert_array_equal, *both)


# --- the shape


def llama3_divisors(theta, head_dim, factor, low=1.0, high=4.0, original=8192):
    """As convert_hf_to_gguf.py computes rope_freqs.weight."""
    divisors = []
    for frequency in 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim):
        length = 2 * np.pi / frequency
        if length < original / high:
            divisors.append(1.0)
        elif length > original / low:
            divisors.append(factor)
        else:
            smooth = (original / length - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def with_divisors(divisors, theta=500_000.0):
    def change(writer, tensors):
        writer.kv_data[0]["llama.rope.freq_base"].value = theta
        tensors["rope_freqs.weight"] = divisors

    return change


def test_llama_3_s_frequencies_are_recognised(tmp_path):
    divisors = llama3_divisors(500_000.0, 16, 32.0)
    assert len({*divisors.tolist()}) == 3  # kept, on the ramp, divided
    write(tmp_path / "m.gguf", change=with_divisors(divisors))
    rope = gguf_config(open_gguf(tmp_path / "m.gguf")).rope
    assert rope == Rope(500_000.0, "llama3", 32.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)


def entry(name, value):
    def change(writer, tensors):
        write = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        writer.kv_data[0].pop(f"{writer.arch}.{name}", None)
        write[type(value)](f"{writer.arch}.{name}", value)

    return change


def test_other_extensions_of_the_context_are_read(tmp_path):
    def yarn(writer, tensors):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)
        writer.add_rope_scaling_finetuned(True)

    write(tmp_path / "m.gguf", "qwen2", change=yarn)
    assert gguf_config(open_gguf(tmp_path / "m.gguf")).rope == Rope(10_000.0, "yarn", 4.0, 32)


# --- the tokenizer


def smollm2(tmp_path, **changes):
    """A converted folder with the recorded part of SmolLM2's tokenizer, and what was recorded."""
    recorded = json.loads(smollm2_record.FILE.read_text())
    tokens = {
        **TINY_TOKENS,
        **{f"ggml.{name}": recorded[key] for name, key in [("tokens", "tokens"), ("merges", "merges")]},
        "ggml.token_type": recorded["types"],
        **changes,
    }

    def widen(writer, tensors):
        for name in ("token_embd.weight", "output.weight"):
            tensors[name] = np.resize(tensors[name], (len(tokens["ggml.tokens"]), 32))

    write(tmp_path / "m.gguf", tokens=tokens, change=widen)
    assert main(["convert-gguf", str(tmp_path / "m.gguf"), str(tmp_path / "m")]) == 0
    return load_model_tokenizer(tmp_path / "m", len(recorded["tokens"])), recorded


def test_smollm2_s_tokens_are_those_of_llama_cpp_s_rules(tmp_path):
    tokenizer, recorded = smollm2(tmp_path)
    backend = tokenizer.backend_tokenizer
    assert len(recorded["texts"]) > 30
    for text, pieces in recorded["texts"].items():
        found = backend.encode(text, add_special_tokens=True)
        assert found.tokens == pieces, text
        assert found.ids == [recorded["tokens"].index(piece) for piece in pieces]
        assert backend.decode(found.ids, skip_special_tokens=False) == text
    kinds = backend.get_added_tokens_decoder()
    assert {token.content for token in kinds.values() if token.special} == set(recorded["tokens"][:17])
    assert stop_ids(tmp_path / "m", tokenizer) == (2,)
    assert chat(tokenizer, "go") == "<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


def test_every_family_splits_text_in_its_own_way(tmp_path):
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert gguf_tokenizer.QWEN2 == PRETOKENIZE_REGEX
    words = {}
    for split in ("smollm", "gpt-2", "qwen2", "llama-bpe"):
        (tmp_path / split).mkdir()
        tokenizer, _ = smollm2(tmp_path / split, **{"ggml.pre": split})
        found = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("I'M x 12345")
        words[split] = [word for word, _ in found]
    assert words == {
        "smollm": ["I", "'", "M", "Ġx", "Ġ", "1", "2", "3", "4", "5"],
        "gpt-2": ["I", "'", "M", "Ġx", "Ġ12345"],
        "qwen2": ["I", "'M", "Ġx", "Ġ", "1", "2", "3", "4", "5"],
        "llama-bpe": ["I", "'M", "Ġx", "Ġ", "123", "45"],
    }


def test_a_text_begins_as_the_file_says(tmp_path):
    for name, changes, first in [
        ("llama3", {"ggml.pre": "llama-bpe"}, [1]),
        ("told not to", {"ggml.pre": "llama-bpe", "ggml.add_bos_token": False}, []),
        ("told to", {"ggml.add_bos_token": True}, [1]),
    ]:
        (tmp_path / name).mkdir()
        tokenizer, _ = smollm2(tmp_path / name, **changes)
        backend = tokenizer.backend_tokenizer
        plain = backend.encode("go", add_special_tokens=False).ids
        assert backend.encode("go").ids == first + plain


def test_user_defined_tokens_stay_whole_and_padding_is_no_token(tmp_path):
    tokens = [*TINY_TOKENS["ggml.tokens"], "<think>", "[PAD30]"]
    kinds = [*TINY_TOKENS["ggml.token_type"], 4, 5]
    write(tmp_path / "m.gguf", tokens={**TINY_TOKENS, "ggml.tokens": tokens, "ggml.token_type": kinds})
    assert main(["convert-gguf", str(tmp_path / "m.gguf"), str(tmp_path / "m")]) == 0
    backend = load_model_tokenizer(tmp_path / "m", 64).backend_tokenizer
    assert backend.encode("ABC<think>D").tokens == ["AB", "C", "<think>", "D"]
    assert not backend.get_added_tokens_decoder()[29].special
    assert backend.token_to_id("[PAD30]") is None


# --- what is wrong


def drop(name):
    return lambda writer, tensors: tensors.pop(name)


def widened(writer, tensors):
    tensors["blk.0.ffn_up.weight"] = np.zeros((40, 32), np.float32)


def more(writer, tensors):
    tensors["blk.1.attn_q.bias"] = np.zeros(64, np.float32)


def tokens_with(**changes):
    """`pre="x"` for tokenizer.ggml.pre; `...` leaves an entry out."""
    named = {**TINY_TOKENS, **{f"ggml.{name}": value for name, value in changes.items()}}
    return {"tokens": {name: value for name, value in named.items() if value is not ...}}


def both_ways(writer, tensors):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    with_divisors(llama3_divisors(500_000.0, 16, 8.0))(writer, tensors)


WRONG = {
    "architecture 'gemma3' is not supported, need llama, qwen2, qwen3": {"arch": "gemma3"},
    "is one of 3 parts; join them": {"change": lambda writer, tensors: writer.add_uint16("split.count", 3)},
    "holds no token_embd.weight": {"change": drop("token_embd.weight")},
    "blk.2.ffn_down.weight is missing": {"change": drop("blk.2.ffn_down.weight")},
    "blk.0.ffn_up.weight has shape [40, 32], need [48, 32]": {"change": widened},
    "blk.1.attn_q.bias is left over": {"change": more},
    "has no 'num_hidden_layers'": {
        "change": lambda writer, tensors: writer.kv_data[0].pop("llama.block_count"),
    },
    "has num_attention_heads 0, need a whole number": {"change": entry("attention.head_count", 0)},
    "attention.scale, which may change what is computed": {"change": entry("attention.scale", 0.5)},
    "expert_count, which may change what is computed": {"change": entry("expert_count", 8)},
    "has llama.rope.dimension_count 8, need the 16 of a head": {"change": entry("rope.dimension_count", 8)},
    "rope_type 'longrope' is not supported": {"change": entry("rope.scaling.type", "longrope")},
    "its rope_freqs.weight are not those of Llama 3.1": {
        "change": with_divisors(llama3_divisors(500_000.0, 16, 8.0, original=4000)),
    },
    "has both rope_freqs.weight and rope.scaling.type 'linear'": {"change": both_ways},
    "its tokenizer is of the kind 'llama', need gpt2": tokens_with(model="llama"),
    "splits text as 'viking', need one of gpt-2, smollm, qwen2": tokens_with(pre="viking"),
    "tokenizer.ggml.pre is missing": tokens_with(pre=...),
    "tokenizer.ggml.merges is [1, 2], need": tokens_with(merges=[1, 2]),
    "tokenizer.ggml.tokens is missing": tokens_with(tokens=...),
    "tokenizer.ggml.merges is missing": tokens_with(merges=...),
    "has 2 token types for 29 tokens": tokens_with(token_type=[1, 1]),
    "has eos_token_id 29, need the id of one of its 29 tokens": tokens_with(eos_token_id=29),
    "its merges do not fit its tokens": tokens_with(merges=["A Q9"]),
    "has 70 tokens, need at most the 64 rows of its embedding": tokens_with(
        tokens=[*TINY_TOKENS["ggml.tokens"], *(f"x{i}" for i in range(41))], token_type=[1] * 70
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_said_before_anything_is_written(message, tmp_path, capsys):
    options = WRONG[message]
    folder = qwen_record.FOLDER / "llama_untied"
    write_gguf(tmp_path / "m.gguf", folder, read_config(folder), **{"arch": "llama", **options})
    assert main(["convert-gguf", str(tmp_path / "m.gguf"), str(tmp_path / "m")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert str(tmp_path / "m.gguf") in said
    assert not (tmp_path / "m").exists()


def test_a_quantisation_that_cannot_be_read_is_named(tmp_path, capsys):
    def integers(writer, tensors):
        tensors.pop("blk.0.ffn_up.weight")
        writer.add_tensor("blk.0.ffn_up.weight", np.zeros((48, 32), np.int8))

    write(tmp_path / "m.gguf", change=integers)
    assert main(["convert-gguf", str(tmp_path / "m.gguf"), str(tmp_path / "m")]) == 2
    assert "blk.0.ffn_up.weight is quantised as I8, which the gguf package cannot read" in capsys.readouterr().err
    data = (tmp_path / "m.gguf").read_bytes()
    name = b"blk.0.ffn_down.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # after the number of dimensions and two of them
    (tmp_path / "m.gguf").write_bytes(data[:at] + b"\xe7\x03\0\0" + data[at + 4 :])
    assert main(["convert-gguf", str(tmp_path / "m.gguf"), str(tmp_path / "m")]) == 2
    assert "has a quantisation that the gguf package does not know (" in capsys.readouterr().err


def test_a_file_that_ends_anywhere_is_truncated(tmp_path):
    write(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    short = tmp_path / "short.gguf"
    for end in {*range(4, len(data), 977), *range(4, 400, 13), len(data) - 1}:
        short.write_bytes(data[:end])
        with pytest.raises(ValueError, match="truncated or damaged"):
            open_gguf(short)
    for start in (b"", b"GGU", b"PK\3\4"):
        short.write_bytes(start)
        with pytest.raises(ValueError, match="is no GGUF file"):
            open_gguf(short)


def test_folders_in_use_and_missing_things_are_said(tmp_path, capsys, monkeypatch):
    write(tmp_path / "m.gguf")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    assert main(["convert-gguf", str(tmp_path / "m.gguf"), str(tmp_path / "used")]) == 2
    assert "used is in use; name a new folder" in capsys.readouterr().err
    assert main(["convert-gguf", str(tmp_path / "none.gguf"), str(tmp_path / "m")]) == 2
    assert "none.gguf: there is no such file" in capsys.readouterr().err
    assert main(["check-model", str(tmp_path / "m.gguf")]) == 2
    assert "is not a folder; `proxmo convert-gguf` makes one of it" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gguf", None)
    for command in (["convert-gguf", str(tmp_path / "m.gguf")], ["fetch-model", "smollm2-135m"]):
        assert main([*command, str(tmp_path / "m")]) == 2
        assert "pip install 'proxmo-jax[gguf]'" in capsys.readouterr().err
