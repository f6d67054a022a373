"""The tokens of SmolLM2 in some texts, by byte-level BPE written out slowly after llama.cpp's rules: recorded with the
part of the vocabulary that these texts can reach, so that the tests need no model.

python tests/smollm2_record.py FILE.gguf      # needs gguf and regex; writes tests/golden/smollm2_tokens.json
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

FILE = Path(__file__).parent / "golden" / "smollm2_tokens.json"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTROL = 3
TEXTS = [
    "The capital of France is Paris.",
    "Hello world",
    " leading and trailing  ",
    "two  spaces, three   spaces\tand\ta tab",
    "lines\n\nand\n \n  indentation\r\n",
    "1234567890",
    "In 2024, 17 + 25 = 42; 3.14159 and 1,000,000",
    "desk 12, drawer 3 and cabinet10",
    "a1b22c333",
    "½ ² Ⅷ ٣٤ ０１",
    "I'm sure it's what they've said we'd do, isn't it? You'LL see",
    "don’t “quote” — dash…",
    "🙂🚀👩‍👩‍👧 ok 🇫🇷",
    "你好，世界。我有3只猫",
    "日本語のテキスト と カナ",
    "Привет, мир! Ёлка",
    "مرحبا بالعالم",
    "naïve café cafe\u0301 Ångström",
    "<|im_start|>user\nWhat now?<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>",
    "a<|im_end|>b <|im_end|> c",
    "<|im_end><im_start|> no marker",
    "<repo_name>x<file_sep>y",
    "<think>I look for a mug.</think><action>go to desk 1</action>",
    "<think></think>\n<action>open drawer 12</action>",
    "def f(x):\n    return x ** 2  # square\n",
    "{\"key\": [1, 2, 3], 'other': null}",
    "https://example.com/path?x=1&y=%20",
    "ANTIDISESTABLISHMENTARIANISM pneumonoultramicroscopic",
    "\u200b\u00a0\ufeff zero width",
    "!!!???...---===",
    "",
]


def byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def words(text: str) -> list[str]:
    """What no merge crosses: every numeral alone, and between them the words of GPT-2."""
    import regex

    letters = byte_letters()
    found = []
    for part in regex.split(r"(\p{N})", text):
        found += [match[0] for match in regex.finditer(GPT2, part)]
    return ["".join(letters[byte] for byte in word.encode()) for word in found]


def merged(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """The word's tokens: of all neighbours the pair that was learned first is joined, the leftmost first."""
    parts = list(word)
    while len(parts) > 1:
        rank, at = min((ranks.get((a, b), 1 << 30), i) for i, (a, b) in enumerate(pairwise(parts)))
        if rank == 1 << 30:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def tokens_of(text: str, ranks: dict[tuple[str, str], int], control: list[str]) -> list[str]:
    import regex

    found = []
    for part in regex.split("(" + "|".join(map(regex.escape, control)) + ")", text):
        found += [part] if part in control else [token for word in words(part) for token in merged(word, ranks)]
    return found


def main(path: str) -> None:
    import gguf

    fields = gguf.GGUFReader(path).fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{n}"].contents() for n in ("tokens", "token_type", "merges"))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    texts = [[text, tokens_of(text, ranks, control)] for text in TEXTS]
    letters = byte_letters()
    # A merge whose outcome is nowhere in the texts is never made.
    every = "\n".join("".join(letters[byte] for byte in text.encode()) for text in TEXTS)
    pairs = [pair for pair in pairs if "".join(pair) in every]
    kept = {*letters.values(), *map("".join, pairs)} & set(tokens)
    kept |= {half for pair in pairs for half in pair}
    parts = [[token, kind] for token, kind in zip(tokens, types, strict=True) if kind == CONTROL or token in kept]
    lines = [f"{json.dumps(text)}: {json.dumps(found)}" for text, found in texts]
    names = json.dumps([token for token, _ in parts]), json.dumps([kind for _, kind in parts])
    FILE.write_text(
        f'{{"tokens": {names[0]},\n"types": {names[1]},\n"merges": {json.dumps([" ".join(pair) for pair in pairs])},\n'
        '"texts": {\n' + ",\n".join(lines) + "\n}}\n"
    )
    print(len(parts), "tokens,", len(pairs), "merges")


if __name__ == "__main__":
    main(sys.argv[1])
