"""Settings of a run with a few changed, and messages without their box, for tests."""

import dataclasses
import re
from typing import Any

from proxmo_jax.agent.settings import Config


def config_with(**changes: Any) -> Config:
    """The default settings with changes named `part__name`, or `name` at the top."""
    parts: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for name, value in changes.items():
        part, found, inner = name.partition("__")
        if found:
            parts.setdefault(part, {})[inner] = value
        else:
            top[name] = value
    default = Config()
    changed = {part: dataclasses.replace(getattr(default, part), **values) for part, values in parts.items()}
    return dataclasses.replace(default, **changed, **top)


def plain(text: str) -> str:
    """A message without the box that tyro draws around it, on one line."""
    return " ".join(re.sub("[╭╮╰╯─│]", " ", text).split())
