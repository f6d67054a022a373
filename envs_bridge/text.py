"""Read JSON from other programs without lone surrogates, which files, pipes and tokenizers reject; hash JSON values."""

import hashlib
import json
from typing import Any


def load_json(text: str) -> Any:
    """Parse a JSON text, with `whole_characters`. Raises ValueError for invalid JSON."""
    found = json.loads(text)
    return whole_characters(found) if escapes_halves(text) else found


def escapes_halves(text: str) -> bool:
    """Whether a JSON text may contain escaped surrogates."""
    return "\\ud" in text.lower()


def whole_characters(value: Any) -> Any:
    """A JSON value with `?` for every lone surrogate, which UTF-8 cannot encode."""
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def digest(value: Any) -> str:
    """The SHA-256 of a JSON value, whatever the order of its keys: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode("ascii")).hexdigest()
