"""What `transformers` and torch answer for tiny random checkpoints of the Qwen and Llama families, and how they read
odd configs: recorded, so that the tests need neither.

python tests/qwen_record.py           # needs torch; writes tests/golden/qwen/
"""

import json
import shutil
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "golden" / "qwen"
SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "eos_token_id": 5,
    "pad_token_id": 0,
}  # fmt: skip
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
CASES = {
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_untied_yarn": ("qwen2", {"tie_word_embeddings": False, "rope_parameters": YARN}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False, "head_dim": 16}),
    "qwen3_linear": (
        "qwen3",
        {
            "tie_word_embeddings": True,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
        },
    ),
    # One of the four frequencies is kept, one lies on the ramp, two are divided.
    "llama3": (
        "llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {**LLAMA_3, "rope_theta": 10_000.0, "original_max_position_embeddings": 100},
        },
    ),
    "llama_untied": ("llama", {"tie_word_embeddings": False, "head_dim": 16}),
    "mistral": ("mistral", {"tie_word_embeddings": False, "head_dim": 16, "sliding_window": None}),
}

YARN_4 = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
PLAIN = {"rope_type": "default"}
# Changes to `config.json`; rotary settings in the three generations of their names.
POSITIONS = {
    "nothing is said": {},
    "theta beside": {"rope_theta": 1e6},
    "theta beside parameters without one": {"rope_parameters": PLAIN, "rope_theta": 1e6},
    "theta inside and another beside": {"rope_parameters": {**PLAIN, "rope_theta": 5e5}, "rope_theta": 1e6},
    "empty parameters": {"rope_parameters": {}, "rope_theta": 1e6},
    "parameters that are null": {"rope_parameters": None, "rope_scaling": None, "rope_theta": 1e6},
    "scaling beside parameters": {
        "rope_scaling": YARN_4, "rope_parameters": {**PLAIN, "rope_theta": 5e5}, "rope_theta": 1e6,
    },
    "scaling beside parameters, no theta beside": {
        "rope_scaling": YARN_4, "rope_parameters": {**PLAIN, "rope_theta": 5e5},
    },
    "plain scaling beside stretched parameters": {
        "rope_scaling": PLAIN, "rope_parameters": {**YARN_4, "rope_theta": 5e5},
    },
    "empty scaling beside parameters": {"rope_scaling": {}, "rope_parameters": {**YARN_4, "rope_theta": 5e5}},
    "two names of the kind": {"rope_scaling": {**YARN_4, "rope_type": "linear"}, "rope_theta": 1e6},
    "theta inside the scaling": {"rope_scaling": {**YARN_4, "rope_theta": 2e5}, "rope_theta": 1e6},
    "theta is null": {"rope_theta": None},
    "theta inside is null": {"rope_parameters": {**PLAIN, "rope_theta": None}, "rope_theta": 1e6},
    "theta is text": {"rope_theta": "1e6"},
    "kind is null": {"rope_parameters": {"rope_type": None}},
    "by layer, none": {"rope_parameters": {"full_attention": None}},
    "yarn, factor null": {"rope_scaling": {**YARN_4, "factor": None}},
    "yarn, no length": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "yarn, length null": {"rope_scaling": {**YARN_4, "original_max_position_embeddings": None}},
    "yarn, length beside": {
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 48,
    },
    "yarn, length inside and beside": {"rope_scaling": YARN_4, "original_max_position_embeddings": 16},
    "yarn, no lengths at all": {"max_position_embeddings": ..., "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "yarn, attention factor": {"rope_scaling": {**YARN_4, "attention_factor": 1.5}},
    "yarn, betas": {"rope_scaling": {**YARN_4, "beta_fast": 2, "beta_slow": 0.5}},
    "yarn, betas of 0": {"rope_scaling": {**YARN_4, "beta_fast": 0, "beta_slow": 0}},
    "yarn, betas the wrong way round": {"rope_scaling": {**YARN_4, "beta_fast": 0.25, "beta_slow": 4}},
    "yarn, equal betas": {"rope_scaling": {**YARN_4, "beta_fast": 1, "beta_slow": 1, "truncate": False}},
    "yarn, both mscales": {"rope_scaling": {**YARN_4, "mscale": 0.7, "mscale_all_dim": 1.3}},
    "yarn, one mscale": {"rope_scaling": {**YARN_4, "mscale": 0.7}},
    "yarn, not truncated": {"rope_scaling": {**YARN_4, "beta_fast": 2, "truncate": False}},
    "yarn, truncate null": {"rope_scaling": {**YARN_4, "beta_fast": 2, "truncate": None}},
    "yarn, shorter": {"rope_scaling": {**YARN_4, "factor": 0.5}},
    "llama3": {"rope_scaling": {**LLAMA_3, "original_max_position_embeddings": 32}, "rope_theta": 5e3},
    "llama3, length beside": {"rope_scaling": LLAMA_3, "original_max_position_embeddings": 48},
    "llama3, no length": {"rope_scaling": LLAMA_3},
    "llama3, no lengths at all": {"max_position_embeddings": ..., "rope_scaling": LLAMA_3},
    "llama3, another ramp": {
        "rope_scaling": {**LLAMA_3, "low_freq_factor": 0.5, "high_freq_factor": 2},
        "original_max_position_embeddings": 99,
    },
    "llama3, no factor": {"rope_scaling": {**LLAMA_3, "factor": None}},
    "llama3, no ramp": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "linear, no factor": {"rope_scaling": {"type": "linear"}},
    "linear, factor null": {"rope_scaling": {"type": "linear", "factor": None}},
    "default with a factor": {"rope_scaling": {"type": "default", "factor": 2.0}},
    "head_dim": {"head_dim": 32},
    "heads of keys null": {"num_key_value_heads": None},
    "hidden size as text": {"hidden_size": "64"},
    "tied null": {"tie_word_embeddings": None},
    "epsilon null": {"rms_norm_eps": None},
}  # fmt: skip


def config_with(kind: str, changes: dict) -> dict:
    """A `config.json` with one thing about it; `...` leaves a name out."""
    plain = {
        "model_type": kind, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    return {key: value for key, value in {**plain, **changes}.items() if value is not ...}


def record_positions() -> None:
    """Eight frequencies, the factor of sines, head_dim and heads of keys of each of POSITIONS; null: refused."""
    import tempfile

    from transformers import AutoConfig, AutoModelForCausalLM

    found: dict[str, dict[str, dict | None]] = {"qwen2": {}, "qwen3": {}, "llama": {}}
    for kind, answers in found.items():
        for name, changes in POSITIONS.items():
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "config.json").write_text(json.dumps(config_with(kind, changes)))
                try:
                    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).model
                except Exception:
                    answers[name] = None
                    continue
            frequencies = model.rotary_emb.inv_freq
            answers[name] = {
                "frequencies": [float(f"{x:.8g}") for x in frequencies[:: len(frequencies) // 8].tolist()],
                "scale": float(model.rotary_emb.attention_scaling),
                "head_dim": model.layers[0].self_attn.head_dim,
                "kv_heads": model.config.num_key_value_heads,
            }
    kinds = []
    for kind, answers in found.items():
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(answer)}" for name, answer in answers.items())
        kinds.append(f'"{kind}": {{\n{lines}\n}}')
    (FOLDER / "positions.json").write_text("{" + ",\n".join(kinds) + "}\n")


def prompts() -> tuple[np.ndarray, np.ndarray]:
    """A left-padded batch: tokens and lengths."""
    rng = np.random.default_rng(0)
    lengths = np.array([17, 5, 11, 1])
    tokens = np.zeros((4, 17), np.int64)
    for row, length in zip(tokens, lengths, strict=True):
        row[17 - length :] = rng.integers(6, 64, length)
    return tokens, lengths


def main() -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.rmtree(FOLDER, ignore_errors=True)
    tokens, lengths = prompts()
    ids = torch.tensor(tokens)
    mask = torch.arange(17)[None] >= torch.tensor(17 - lengths)[:, None]
    for name, (kind, options) in CASES.items():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, **options)).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases, too, so that none can be forgotten unnoticed
                parameter.add_(0.1 * torch.randn_like(parameter))
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(ids, attention_mask=mask, position_ids=positions).logits
            greedy = model.generate(ids, attention_mask=mask.long(), max_new_tokens=12, do_sample=False)
        model.save_pretrained(FOLDER / name)
        np.savez(FOLDER / name / "answers.npz", logits=logits.numpy(), greedy=greedy.numpy()[:, 17:])
        print(name, sorted(json.loads((FOLDER / name / "config.json").read_text(encoding="utf-8")))[:4])
    record_positions()


if __name__ == "__main__":
    main()
