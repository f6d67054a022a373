"""JSON as others wrote it, with characters that every file, pipe and tokenizer takes."""

import json
from typing import Any


def load_json(text: str) -> Any:
    """What a JSON text says, as `whole_characters`. Raises ValueError for what is no JSON."""
    found = json.loads(text)
    return whole_characters(found) if escapes_halves(text) else found


def escapes_halves(text: str) -> bool:
    """Whether a JSON text may name halves of characters (surrogates)."""
    return "\\ud" in text.lower()


def whole_characters(value: Any) -> Any:
    """A JSON value with a question mark for every lone half of a surrogate pair, which UTF-8 cannot hold."""
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
