"""The tokenizer and the chat template of a GGUF file, for a Hugging Face folder.

Byte-level BPE alone, as Llama 3, SmolLM2 and Qwen have it. A file names how text is split before the merges; the splits
are those of the models' own tokenizer.json.
"""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from proxmo_jax.errors import UserError
from proxmo_jax.policy.gguf_file import GgufFile

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types of llama.cpp
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# How text is split, by tokenizer.ggml.pre: a regular expression; None: that of GPT-2.
SPLITS = {"gpt-2": None, "smollm": None, **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), QWEN2)}
OF_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
SPLITS |= dict.fromkeys(OF_LLAMA3, LLAMA3)
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer with its chat template.

    Args:
        file: the opened file.

    Returns:
        The tokenizer; it pads on the left.

    Raises:
        UserError: for a file without one, one of another kind, or one whose parts do not fit together.
    """
    kind = _entry(file, "ggml.model", str)
    if kind != "gpt2":
        raise UserError(
            f"{file.path}: its tokenizer is of the kind {kind!r}, need gpt2 (byte-level BPE); take the model's Hugging"
            " Face folder instead"
        )
    split = _entry(file, "ggml.pre", str)  # without it llama.cpp guesses, and warns
    if split not in SPLITS:
        raise UserError(f"{file.path}: its tokenizer splits text as {split!r}, need one of {', '.join(SPLITS)}")
    tokens, merges = _entry(file, "ggml.tokens", list), _entry(file, "ggml.merges", list)
    types = file.metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise UserError(f"{file.path}: has {len(types)} token types for {len(tokens)} tokens, need one for each")
    backend = _byte_level(file, split, {t: i for i, t in enumerate(tokens) if types[i] != UNUSED}, merges)
    whole = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    backend.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL) for token, kind in whole])
    found = {name: _named(file, key, tokens) for name, key in SPECIAL.items()}
    named = {name: token for name, token in found.items() if token is not None}
    if "bos_token" in named and file.metadata.get("tokenizer.ggml.add_bos_token", split in OF_LLAMA3):
        first = named["bos_token"]
        template = f"{first} $A", f"{first} $A {first}:1 $B:1", [(first, tokens.index(first))]
        backend.post_processor = processors.TemplateProcessing(*template)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        model_max_length=int(file.metadata.get(f"{file.architecture}.context_length", 2048)),
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **named,
    )
    fast.chat_template = file.metadata.get("tokenizer.chat_template")
    return fast


def _entry(file: GgufFile, name: str, kind: type) -> Any:
    """A text or a list of texts of the tokenizer. Raises UserError if it is missing or anything else."""
    value = file.metadata.get(f"tokenizer.{name}")
    texts = value if isinstance(value, list) else [value]
    if not isinstance(value, kind) or not all(isinstance(text, str) for text in texts):
        found = "is missing" if value is None else f"is {value!r:.60}"
        raise UserError(f"{file.path}: tokenizer.{name} {found}, need a tokenizer in the file")
    return value


def _named(file: GgufFile, key: str, tokens: list[str]) -> str | None:
    """The token that an entry names. Raises UserError for an id that is none."""
    value = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < len(tokens):
        raise UserError(f"{file.path}: has {key}_token_id {value!r}, need the id of one of its {len(tokens)} tokens")
    return tokens[value]


def _byte_level(file: GgufFile, split: str, vocabulary: dict[str, int], merges: list[str]) -> Tokenizer:
    """Byte-level BPE. Raises UserError for merges that do not fit the vocabulary."""
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        model = models.BPE(vocabulary, pairs, ignore_merges=split in OF_LLAMA3)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{file.path}: its merges do not fit its tokens ({error})") from error
    tokenizer = Tokenizer(model)
    expression = SPLITS[split]
    first: list[Any] = []
    if split == "smollm":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    elif expression:
        first = [pre_tokenizers.Split(Regex(expression), behavior="isolated")]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, level])
    if expression is QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def stop_tokens(file: GgufFile) -> list[int]:
    """The ids that end a text or a turn, the end of a text first; none if the file names none.

    Raises UserError for an id that is none.
    """
    tokens = file.metadata["tokenizer.ggml.tokens"]
    named = [key for key in ("eos", "eot", "eom") if _named(file, key, tokens) is not None]
    return list(dict.fromkeys(file.metadata[f"tokenizer.ggml.{key}_token_id"] for key in named))
