"""Advantages for another trainer's steps: a file of steps in, a file of advantages out (`proxmo advantages`)."""

import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from proxmo_jax.errors import UserError
from proxmo_jax.estimator.batch import batch_advantages
from proxmo_jax.estimator.packing import SIMILAR, column, is_flag, shape_of, shown
from proxmo_jax.estimator.types import Group, Settings

NEEDED = ("group", "trajectory", "step", "reward", "success", "action_valid")
ANSWERS = {
    "discounted_return": "returns",
    "episode_advantage": "episode",
    "step_advantage": "step",
    "advantage": "joint",
}


def advantages_of_file(
    source: Path, target: Path, settings: Settings, *, chunk: int = 64, similarity_threshold: float | None = None
) -> int:
    """Read steps, compute their advantages, write them in the same order; returns the number of steps.

    source, `.npz` or `.jsonl`: per step `group, trajectory, step, reward, success, action_valid`, and `texts` (the
    anchor observations) if the settings compare steps; `response_mask` [N, L] or a list a line is optional. target:
    `discounted_return, episode_advantage, step_advantage, advantage`, [N] float32, or under the response mask (all but
    the return) as many numbers as the step's mask has, in an `.npz` with zeros up to the longest. The file appears
    whole or not at all. `chunk` groups are computed at a time; `similarity_threshold` as in `steps_advantages`.
    Raises UserError naming the file, the array and the row.
    """
    steps = read_steps(source)
    try:
        answer: dict[str, Any] = dict(
            steps_advantages(steps, settings, chunk=chunk, similarity_threshold=similarity_threshold)
        )
        if "response_mask" in steps:
            answer = _per_token(answer, steps["response_mask"])
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    write_steps(target, answer)
    return len(answer["advantage"])


def steps_advantages(
    steps: Mapping[str, Any],
    settings: Settings,
    *,
    chunk: int | None = None,
    similarity_threshold: float | None = None,
) -> dict[str, np.ndarray]:
    """The four answers [N] float32 of steps given as arrays or lists, in their order.

    similarity_threshold: from which on texts share an anchor; None: 0.95 under "similar", else only equal ones do.
    Raises UserError for steps that cannot be used, and for rewards so large that an answer is not finite.
    """
    if settings.aggregation == "similar" and similarity_threshold is None:
        similarity_threshold = SIMILAR
    if similarity_threshold is not None and settings.aggregation not in ("hard", "similar"):
        raise UserError(
            f"similarity_threshold: aggregation {settings.aggregation!r} has no anchors; need 'similar' (the preset"
            " gigpo_similarity)"
        )
    batch, packing = Group.from_steps(
        **needed(steps, texts=settings.aggregation != "none"),
        similarity_threshold=similarity_threshold, max_features=settings.max_features,
    )  # fmt: skip
    chunk = None if chunk is None or len(batch.reward) <= chunk else chunk
    found = _compiled(batch, settings, chunk=chunk)
    answer = {name: packing.unpack(getattr(found, ours)) for name, ours in ANSWERS.items()}
    for name, values in answer.items():
        odd = ~np.isfinite(values)
        if odd.any():
            row = int(odd.argmax())
            group = shown(column(steps["group"])[row])
            raise UserError(
                f"{name}: row {row} is {values[row]}; the rewards of group {group} are too large for float32"
            )
    return answer


def needed(steps: Mapping[str, Any], *, texts: bool) -> dict[str, Any]:
    """What `Group.from_steps` takes of steps, with their texts or without. Raises UserError for what is missing."""
    names = (*NEEDED, "texts") if texts else NEEDED
    for name in names:
        if name not in steps:
            raise UserError(f"{name} is missing; need {', '.join(NEEDED)} and, to compare steps, texts")
    return {name: steps[name] for name in names}


_compiled = jax.jit(batch_advantages, static_argnames="chunk")


def _per_token(answer: dict[str, np.ndarray], response_mask: Any) -> dict[str, Any]:
    """The answers but the return times each step's mask: float32 [N, L], or N of them as long as the step's own."""
    count = len(answer["advantage"])
    masks = column(response_mask)
    if shape_of(masks)[:1] != (count,) or (isinstance(masks, np.ndarray) and masks.ndim != 2):
        raise UserError(f"response_mask: got shape {shape_of(masks)}, need ({count}, L), one row per step")
    if isinstance(masks, np.ndarray):
        odd = np.argwhere((masks != 0) & (masks != 1))
        if len(odd):
            row, at = odd[0].tolist()
            raise UserError(f"response_mask: row {row} has {shown(masks[row, at])} at place {at}, need 0 or 1")
        spread: dict[str, Any] = {name: values[:, None] * masks.astype(np.float32) for name, values in answer.items()}
    else:
        masks = [_token_mask(mask, row) for row, mask in enumerate(masks)]
        spread = {name: [v * mask for v, mask in zip(values, masks, strict=True)] for name, values in answer.items()}
    return {**spread, "discounted_return": answer["discounted_return"]}


def _token_mask(mask: Any, row: int) -> np.ndarray:
    """The mask of one step, float32 [L]. Raises UserError for anything but a list of 0 and 1."""
    if not isinstance(mask, (list, tuple)):
        raise UserError(f"response_mask: row {row} has {shown(mask)}, need a list of 0 and 1")
    odd = next((at for at, value in enumerate(mask) if not is_flag(value)), None)
    if odd is not None:
        raise UserError(f"response_mask: row {row} has {shown(mask[odd])} at place {odd}, need 0 or 1")
    return np.array(mask, np.float32)


def read_steps(path: Path) -> dict[str, Any]:
    """The arrays of an .npz file or the fields of a .jsonl one, lists. Raises UserError naming the file and the line.

    An array `NAME.json` of an .npz holds UTF-8 JSON, a list that comes back as `NAME` (see `write_steps`).
    """
    if path.suffix == ".npz":
        return _read_arrays(path)
    if path.suffix == ".jsonl":
        return _read_lines(path)
    raise UserError(f"{path}: need a name that ends in .npz or .jsonl")


def _read_arrays(path: Path) -> dict[str, Any]:
    try:
        data = np.load(path, allow_pickle=False)
        if not isinstance(data, np.lib.npyio.NpzFile):
            raise UserError(f"{path}: holds one array, need an .npz file of several")
        with data:
            arrays = {name: data[name] for name in data.files}
        return {
            name.removesuffix(".json"): json.loads(bytes(x)) if name.endswith(".json") else x
            for name, x in arrays.items()
        }
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
        hint = "it holds Python objects; store strings as np.array(list of str)" if "pickle" in str(error) else error
        raise UserError(f"{path}: not a readable .npz file ({hint})") from error


def _read_lines(path: Path) -> dict[str, list]:
    steps: dict[str, list] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {number} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number} is {type(row).__name__}, need an object")
            steps = steps or {name: [] for name in row}
            if row.keys() != steps.keys():
                odd = ", ".join(sorted(row.keys() ^ steps.keys()))
                raise UserError(f"{path}: line {number} and the first differ in {odd}; need the same names on all")
            for name, value in row.items():
                steps[name].append(value)
    if not steps:
        raise UserError(f"{path}: holds no step")
    return steps


def write_steps(path: Path, answer: Mapping[str, Any]) -> None:
    """An .npz or .jsonl of arrays or lists with a row for each step. Raises UserError for another ending.

    Rows are numbers, strings or arrays [L]. In an .npz, L is the longest one's and zeros fill; strings are an array
    `NAME.json` of bytes, as an array of strings is as wide as its longest. Written beside the target first, then moved
    over it: what was there is kept until the new file is whole.
    """
    if path.suffix not in (".npz", ".jsonl"):
        raise UserError(f"{path}: need a name that ends in .npz or .jsonl")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            if path.suffix == ".npz":
                np.savez(file, **dict(_stored(name, values) for name, values in answer.items()))  # type: ignore[arg-type]
            else:
                for i in range(len(next(iter(answer.values())))):
                    row = {name: _plain(values[i]) for name, values in answer.items()}
                    file.write((json.dumps(row, allow_nan=False) + "\n").encode())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _stored(name: str, values: Any) -> tuple[str, np.ndarray]:
    """The name and the array that an .npz holds the values as."""
    values = column(values)
    if isinstance(values, np.ndarray):
        return name, values
    if values and isinstance(values[0], str):
        return f"{name}.json", np.frombuffer(json.dumps(values).encode(), np.uint8)
    rectangle = np.zeros((len(values), max(map(len, values), default=0)), np.float32)
    for row, own in zip(rectangle, values, strict=True):
        row[: len(own)] = own
    return name, rectangle


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
