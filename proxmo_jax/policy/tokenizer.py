"""Tokenizers: a word-level one for small policies, stored as a Hugging Face folder, and those of language models."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from proxmo_jax.errors import UserError
from proxmo_jax.paths import plain_path

PAD, UNKNOWN, STOP = "<pad>", "<unk>", "</action>"
# An object and its number are two tokens: all desks share one, and numbers are tokens of their own.
# Longer numbers, as in a product's ASIN, are pairs of digits, so that unseen ones can be copied.
WORD = r"[^\W\d]+|\d{1,2}|[^\w\s]"
SPECIAL = (PAD, UNKNOWN, "<think>", "</think>", "<action>", STOP)


def build_word_tokenizer(texts: Iterable[str], folder: Path) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token for each word, number or punctuation mark, lower-cased.

    Args:
        texts: training texts.
        folder: where it is written.

    Returns:
        The tokenizer; it pads on the left.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    trainer = trainers.WordLevelTrainer(special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=STOP,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    save_tokenizer(fast, folder)
    return fast


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write a Hugging Face tokenizer to a folder of any name; its `tokenizer.json` is there when all of it is."""
    temporary = Path(folder).with_name(Path(folder).name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with plain_path(temporary) as plain:
        tokenizer.save_pretrained(plain)
    Path(folder).mkdir(exist_ok=True)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == "tokenizer.json"):
        path.replace(Path(folder) / path.name)
    temporary.rmdir()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a folder.

    Args:
        folder: with `tokenizer.json`.

    Returns:
        The tokenizer.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        raise UserError(f"{folder}: holds no tokenizer.json")
    with plain_path(folder) as plain:
        try:
            Tokenizer.from_file(str(plain / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{folder}/tokenizer.json: is damaged ({error})") from error
        return _reads_all(PreTrainedTokenizerFast.from_pretrained(plain))


def load_model_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a language model; truncation and padding saved in its files are disabled.

    Args:
        folder: of the model.
        vocab_size: of the model.

    Returns:
        The tokenizer.

    Raises:
        UserError: if there is none that can be used, or it has more tokens than `vocab_size`.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise UserError(f"--model: {folder} holds no tokenizer (tokenizer.json)")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing narrower
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--model: {folder} holds no tokenizer that can be read ({reason})") from error
    if not tokenizer.is_fast:
        raise UserError(f"--model: {folder} holds no tokenizer.json, and its {type(tokenizer).__name__} makes none")
    if (size := token_count(tokenizer)) > vocab_size:
        raise UserError(
            f"--model: {folder}: its tokenizer has {size} tokens, need at most the {vocab_size} of its vocab_size"
        )
    return _reads_all(tokenizer)


def token_count(tokenizer: PreTrainedTokenizerFast) -> int:
    """The largest token id + 1."""
    return max(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _reads_all(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer without truncation and padding, and with special tokens in texts parsed as such."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.split_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens = False
    return tokenizer
