"""A tiny random Qwen2.5 as a user would have it: a Hugging Face folder with weights, tokenizer and chat template."""

import json
from pathlib import Path

from fresh import fresh
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from proxmo_jax.policy.decoder import PolicyConfig
from proxmo_jax.policy.weights import save_weights

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_model(folder: Path, **shape) -> PolicyConfig:
    """One token per byte, and the chat's special ones."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    config = PolicyConfig(
        **{
            "vocab_size": 288,
            "hidden_size": 32,
            "intermediate_size": 64,
            "head_dim": 8,
            "initializer_range": 0.1,
            **shape,
        }
    )
    save_weights(folder, fresh(config), config)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 258]}))
    return config
