"""Advantages for another trainer's steps: a file of steps in, a file of advantages out (`proxmo advantages`)."""

import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from proxmo_jax.batch import batch_advantages
from proxmo_jax.errors import UserError
from proxmo_jax.proximity import similar_anchors
from proxmo_jax.types import Group, Settings

NEEDED = ("group", "trajectory", "step", "reward", "success", "action_valid")
ANSWERS = {
    "discounted_return": "returns",
    "episode_advantage": "episode",
    "step_advantage": "step",
    "advantage": "joint",
}


def advantages_of_file(source: Path, target: Path, settings: Settings, *, chunk: int = 64) -> int:
    """Read steps, compute their advantages, write them in the same order; returns the number of steps.

    source, `.npz` or `.jsonl`: per step `group, trajectory, step, reward, success, action_valid`, and `texts` (the
    anchor observations) if the settings compare steps; `response_mask` [N, L] or a list a line is optional. target:
    `discounted_return, episode_advantage, step_advantage, advantage`, [N] float32, or [N, L] under the response mask
    (all but the return). The file appears whole or not at all. `chunk` groups are computed at a time.
    Raises UserError naming the file and the array.
    """
    steps = read_steps(source)
    try:
        answer = steps_advantages(steps, settings, chunk=chunk)
        if "response_mask" in steps:
            answer = _per_token(answer, steps["response_mask"])
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    write_steps(target, answer)
    return len(answer["advantage"])


def steps_advantages(
    steps: Mapping[str, Any], settings: Settings, *, chunk: int | None = None
) -> dict[str, np.ndarray]:
    """The four answers [N] float32 of steps given as arrays, in their order."""
    fields = needed(steps, texts=settings.aggregation != "none")
    if "texts" in fields and settings.similarity_threshold is not None:
        texts = fields.pop("texts")
        if len(texts) != len(steps["group"]):
            raise UserError(f"texts: got {len(texts)} rows, need {len(steps['group'])}, one per step")
        fields["anchor"] = similar_anchors(texts, steps["group"], settings.similarity_threshold)
    batch, packing = Group.from_steps(**fields)
    chunk = None if chunk is None or len(batch.reward) <= chunk else chunk
    answer = _compiled(batch, settings, chunk=chunk)
    return {name: packing.unpack(getattr(answer, ours)) for name, ours in ANSWERS.items()}


def needed(steps: Mapping[str, Any], *, texts: bool) -> dict[str, Any]:
    """What `Group.from_steps` takes of steps, with their texts or without. Raises UserError for what is missing and
    for texts that are none."""
    names = (*NEEDED, "texts") if texts else NEEDED
    for name in names:
        if name not in steps:
            raise UserError(f"{name} is missing; need {', '.join(NEEDED)} and, to compare steps, texts")
    fields = {name: steps[name] for name in names}
    if texts:
        if isinstance(fields["texts"], np.ndarray):
            fields["texts"] = fields["texts"].tolist()
        odd = next((text for text in fields["texts"] if not isinstance(text, str)), None)
        if odd is not None:
            raise UserError(f"texts: need strings, got {odd!r}")
    return fields


_compiled = jax.jit(batch_advantages, static_argnames="chunk")


def _per_token(answer: dict[str, np.ndarray], response_mask: Any) -> dict[str, np.ndarray]:
    mask = np.asarray(response_mask)
    count = len(answer["advantage"])
    if mask.dtype.kind not in "fiub" or mask.ndim != 2 or len(mask) != count:
        raise UserError(f"response_mask: got shape {mask.shape}, need ({count}, L), one row per step")
    return {
        name: value if name == "discounted_return" else value[:, None] * mask.astype(np.float32)
        for name, value in answer.items()
    }


def read_steps(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file or the fields of a .jsonl one. Raises UserError naming the file and the line."""
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as data:
                return {name: data[name] for name in data.files}
        except (zipfile.BadZipFile, ValueError, EOFError) as error:
            hint = (
                "it holds Python objects; store strings as np.array(list of str)" if "pickle" in str(error) else error
            )
            raise UserError(f"{path}: not a readable .npz file ({hint})") from error
    if path.suffix == ".jsonl":
        return _read_lines(path)
    raise UserError(f"{path}: need a name that ends in .npz or .jsonl")


def _read_lines(path: Path) -> dict[str, np.ndarray]:
    rows: list[dict] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}: line {number} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number} is {type(row).__name__}, need an object")
            if rows and row.keys() != rows[0].keys():
                odd = ", ".join(sorted(row.keys() ^ rows[0].keys()))
                raise UserError(f"{path}: line {number} and the first differ in {odd}; need the same names on all")
            rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no step")
    steps = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name == "response_mask":
            width = max((len(v) for v in values if isinstance(v, list)), default=0)
            if not all(isinstance(v, list) for v in values):
                raise UserError(f"{path}: response_mask must be a list on every line")
            values = [v + [0] * (width - len(v)) for v in values]
        kinds = {type(value) for value in values} - {int, float} if name != "success" else {type(v) for v in values}
        if len(kinds) > 1 or (name in ("reward", "step") and kinds):
            found = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise UserError(f"{path}: {name} mixes or has {found}; need one kind, and numbers for reward and step")
        steps[name] = np.array(values)
    return steps


def write_steps(path: Path, answer: dict[str, np.ndarray]) -> None:
    """An .npz or .jsonl of arrays with a row for each step. Raises UserError for another ending.

    Written beside the target first, then moved over it: what was there is kept until the new file is whole.
    """
    if path.suffix not in (".npz", ".jsonl"):
        raise UserError(f"{path}: need a name that ends in .npz or .jsonl")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            if path.suffix == ".npz":
                np.savez(file, **answer)  # type: ignore[arg-type]
            else:
                for i in range(len(next(iter(answer.values())))):
                    row = {name: values[i].tolist() for name, values in answer.items()}
                    file.write((json.dumps(row) + "\n").encode())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
