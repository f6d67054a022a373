"""A word-level tokenizer for small policies, saved as an ordinary Hugging Face tokenizer folder."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from proxmo_jax.errors import UserError
from proxmo_jax.paths import plain_path

PAD, UNKNOWN, STOP = "<pad>", "<unk>", "</action>"
# A thing and its number are two words: all desks share one, and the numbers are read and copied alike for all things.
# Longer numbers, as in a product's ASIN, are pairs of digits, so that one never seen can be copied, too.
WORD = r"[^\W\d]+|\d{1,2}|[^\w\s]"
SPECIAL = (PAD, UNKNOWN, "<think>", "</think>", "<action>", STOP)


def build_word_tokenizer(texts: Iterable[str], folder: Path) -> PreTrainedTokenizerFast:
    """One token per word, number or punctuation mark of `texts`, lower-cased; written to `folder`."""
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
    """Write a Hugging Face tokenizer to a folder of any name."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with plain_path(folder) as plain:
        tokenizer.save_pretrained(plain)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder. Raises UserError if there is none."""
    if not (Path(folder) / "tokenizer.json").is_file():
        raise UserError(f"{folder}: holds no tokenizer.json")
    with plain_path(folder) as plain:
        try:
            Tokenizer.from_file(str(plain / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{folder}/tokenizer.json: is damaged ({error})") from error
        return PreTrainedTokenizerFast.from_pretrained(plain)
