"""What `transformers` and torch answer for tiny random Qwen checkpoints, recorded so that the tests need neither.

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
}


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
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    classes = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    shutil.rmtree(FOLDER, ignore_errors=True)
    tokens, lengths = prompts()
    ids = torch.tensor(tokens)
    mask = torch.arange(17)[None] >= torch.tensor(17 - lengths)[:, None]
    for name, (kind, options) in CASES.items():
        config_class, model_class = classes[kind]
        torch.manual_seed(1)
        model = model_class(config_class(**SHAPE, **options)).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases, too, so that none can be forgotten unnoticed
                parameter.add_(0.1 * torch.randn_like(parameter))
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(ids, attention_mask=mask, position_ids=positions).logits
            greedy = model.generate(ids, attention_mask=mask.long(), max_new_tokens=12, do_sample=False)
        model.save_pretrained(FOLDER / name)
        np.savez(FOLDER / name / "answers.npz", logits=logits.numpy(), greedy=greedy.numpy()[:, 17:])
        print(name, sorted(json.loads((FOLDER / name / "config.json").read_text()))[:4])


if __name__ == "__main__":
    main()
