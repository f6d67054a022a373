"""From steps and their estimates to one HTML file, as text. Data are compressed JSON, read by `page.js`.

An overview (every joint advantage) is read at once; a group's texts and numbers when one of its turns is opened. No
data stand in the HTML as they are, so that no text of a model can become markup or a script.
"""

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from proxmo_jax.errors import UserError
from proxmo_jax.estimator.packing import column, flags, strings
from proxmo_jax.estimator.types import Settings
from proxmo_jax.page.estimates import Estimates

LONGEST_TEXT = 20_000  # characters of a text that are shown
TEXTS = {"prompt": "prompt", "response": "response", "command": "command", "texts": "observation", "next_texts": "next"}


class Parts:
    """The parts of a page: an overview of every iteration, and the blocks of groups that are read on demand.

    Attributes:
        iterations: what the overview says of each.
        blocks: compressed JSON, base64.
    """

    def __init__(self) -> None:
        self.iterations: list[dict[str, Any]] = []
        self.blocks: list[str] = []

    def add(self, name: str, steps: Mapping[str, Any], found: Estimates, main: str, note: str = "") -> None:
        """Add one batch of steps.

        Args:
            name: of the iteration; "" for a file of steps.
            steps: [N] values by name; the optional task, prompt, response, command, texts and next_texts are strings.
            found: what the estimators give them.
            main: the method that the page begins with.
            note: what the reader has to know of it.

        Raises:
            UserError: for texts that are no strings, or of another number.
        """
        order = np.lexsort(found.place[::-1])
        group, member, _ = (index[order] for index in found.place)
        texts = {name: _texts(steps, name, len(order)) for name in (*TEXTS, "task") if name in steps}
        success, valid = flags(steps["success"], "success")[order], flags(steps["action_valid"], "action_valid")[order]
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        ends = np.append(starts[1:], len(order))
        names = column(steps["trajectory"])
        groups: list[dict[str, Any]] = []
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            rows = order[start:end]
            firsts = start + np.flatnonzero(np.diff(member[start:end], prepend=-1))
            members = [
                {"name": _plain(names[order[at]]), "won": bool(success[at]), "turns": int(n)}
                for at, n in zip(firsts, np.diff(np.append(firsts, end)), strict=True)
            ]
            groups.append(
                {
                    "task": texts["task"][rows[0]] if "task" in texts else "",
                    "rate": _short(found.success_rate[group[start]]),
                    "weight": {
                        method: _weights(own, order[firsts], success[firsts]) for method, own in found.results.items()
                    },
                    "members": members,
                    "block": len(self.blocks),
                }
            )  # fmt: skip
            self.blocks.append(_packed(_block(rows, found, texts, steps)))
        reward = np.asarray(steps["reward"], np.float64)[order]
        self.iterations.append(
            {
                "name": name,
                "note": note,
                "groups": groups,
                "joint": {method: _list(own["joint"][order]) for method, own in found.results.items()},
                "rewarded": np.flatnonzero(reward > 0).tolist(),
                "invalid": np.flatnonzero(~valid).tolist(),
                "main": main if main in found.results else next(iter(found.results)),
                "left_out": found.left_out,
                "near_by": found.near_by,
            }
        )


def page(parts: Parts, title: str, facts: Sequence[str], notes: Sequence[str], curves: Mapping[str, Any] | None,
         methods: Mapping[str, Settings]) -> str:  # fmt: skip
    """The HTML of a page.

    Args:
        parts: what it shows turn by turn.
        title: of the page, such as the run's name.
        facts: short ones under the title.
        notes: sentences on what is not shown.
        curves: learning curves (`agent.curves.curves`); None: there are none.
        methods: settings by name.

    Returns:
        A whole document that loads nothing from elsewhere.
    """
    overview = {
        "title": title,
        "facts": list(facts),
        "notes": list(notes),
        "curves": curves,
        "methods": {name: _settings(settings) for name, settings in methods.items()},
        "iterations": parts.iterations,
    }
    here = files("proxmo_jax.page")
    template, style, *scripts = (
        here.joinpath(name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "charts.js", "panel.js", "page.js")
    )
    script = "(() => {\n" + "".join(scripts) + "})();\n"
    blocks = "\n".join(f'<script type="text/plain" id="b{i}">{text}</script>' for i, text in enumerate(parts.blocks))
    for mark, text in {
        "@style@": style, "@style-hash@": _hash(style), "@script@": script, "@script-hash@": _hash(script),
        "@overview@": _packed(overview), "@blocks@": blocks,
    }.items():  # fmt: skip
        template = template.replace(mark, text)
    return template


def _block(
    rows: np.ndarray, found: Estimates, texts: Mapping[str, list[str]], steps: Mapping[str, Any]
) -> dict[str, Any]:
    """What a turn of a group opens to: texts as numbers of distinct lines, numbers by method, nearest turns."""
    place = {int(row): at for at, row in enumerate(rows)}
    lines: dict[str, int] = {}
    shown = {
        ours: [[lines.setdefault(line, len(lines)) for line in texts[name][row].split("\n")] for row in rows]
        for name, ours in TEXTS.items()
        if name in texts
    }
    near = [
        [[place[int(other)], _short(weight)] for other, weight in zip(others, weights, strict=True) if other >= 0]
        for others, weights in zip(found.near[rows], found.near_weight[rows], strict=True)
    ]
    return {
        "lines": list(lines),
        "texts": shown,
        "reward": _list(np.asarray(steps["reward"], np.float64)[rows]),
        "numbers": {
            method: {name: _list(values[rows]) for name, values in own.items() if name != "joint"}
            for method, own in found.results.items()
        },
        "near": near,
    }


def _texts(steps: Mapping[str, Any], name: str, count: int) -> list[str]:
    """The strings of a column, long ones cut."""
    values = strings(steps[name], name)
    if len(values) != count:
        raise UserError(f"{name}: got {len(values)} rows, need {count}, one per step")
    return [
        text if len(text) <= LONGEST_TEXT
        else f"{text[:LONGEST_TEXT]}\n[{len(text) - LONGEST_TEXT:,} characters are left out here]"
        for text in values
    ]  # fmt: skip


def _weights(own: Mapping[str, np.ndarray], rows: np.ndarray, won: np.ndarray) -> list[float | None]:
    """Modulation weight of a group's successes and of its failures; None where there are none."""
    weight = own["modulation"][rows]
    return [_short(weight[chosen][0]) if chosen.any() else None for chosen in (won, ~won)]


def _settings(settings: Settings) -> dict[str, Any]:
    """Settings as JSON takes them."""
    return {name: value if isinstance(value, (bool, int, str)) else float(value)
            for name, value in vars(settings).items()}  # fmt: skip


def _short(value: Any) -> float | None:
    """A number with six significant digits, nearly all of float32; None where it is none."""
    value = float(value)
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _list(values: np.ndarray) -> list[float | None]:
    return [_short(value) for value in values.tolist()]


def _plain(value: Any) -> str:
    """An id in words."""
    return str(value.item() if isinstance(value, np.generic) else value)


def _packed(value: Any) -> str:
    """Compressed JSON as base64. JSON escapes what is not ASCII, also half of a surrogate pair."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("ascii"), 6, mtime=0)).decode("ascii")


def _hash(text: str) -> str:
    """The source that a content security policy names an inline script or style by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
