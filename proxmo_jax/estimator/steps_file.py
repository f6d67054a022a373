"""Advantages for steps of another trainer: a file of steps in, a file of advantages out (`proxmo advantages`)."""

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
from proxmo_jax.estimator.packing import SIMILAR, column, finite, is_flag, shape_of, shown
from proxmo_jax.estimator.types import Group, Settings

NEEDED = ("group", "trajectory", "step", "reward", "success", "action_valid")
RESULTS = {
    "discounted_return": "returns",
    "episode_advantage": "episode",
    "step_advantage": "step",
    "advantage": "joint",
}


def advantages_of_file(
    source: Path, target: Path, settings: Settings, *, chunk: int = 64, similarity_threshold: float | None = None,
    parts: bool = False,
) -> int:  # fmt: skip
    """Compute the advantages of the steps in a file and write them in the same order.

    The target is written atomically.

    Args:
        source: `.npz` or `.jsonl` with `group, trajectory, step, reward, success, action_valid` of each step, and
            `texts` (the anchor observations) if the settings compare steps. `response_mask`, [N, L] or a list in each
            line, is optional. Score distance needs `next_texts`, the observations after each action; entropy needs
            `entropy`, the mean of each response, [N], or that of each token, [N, L], beside a response mask.
        target: `.npz` or `.jsonl` with `discounted_return, episode_advantage, step_advantage, advantage`, float32 [N].
            With a response mask all but the return are per token, padded with zeros in an `.npz`.
        settings: of the estimator.
        chunk: groups computed at a time.
        similarity_threshold, parts: as in `steps_advantages`; parts are per step.

    Returns:
        The number of steps.

    Raises:
        UserError: naming the file, the array and the row.
    """
    steps = read_steps(source)
    try:
        result: dict[str, Any] = dict(
            steps_advantages(steps, settings, chunk=chunk, similarity_threshold=similarity_threshold, parts=parts)
        )
        if "response_mask" in steps:
            result = _per_token(result, steps["response_mask"])
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    if target.suffix == ".jsonl" and "level_advantage" in result:  # NaN where there is no such level
        rows = result["level_advantage"].tolist()
        result["level_advantage"] = [[None if value != value else value for value in row] for row in rows]
    write_steps(target, result)
    return len(result["advantage"])


def steps_advantages(
    steps: Mapping[str, Any],
    settings: Settings,
    *,
    chunk: int | None = None,
    similarity_threshold: float | None = None,
    parts: bool = False,
) -> dict[str, np.ndarray]:
    """Advantages of steps given as arrays or lists.

    Args:
        steps: [N] values by name, as in `advantages_of_file`.
        settings: of the estimator.
        chunk: groups computed at a time (default: all).
        similarity_threshold: ratio from which two texts share an anchor, or with score distance a node of the graph.
            Default: 0.95 under aggregation "similar"; otherwise only equal texts share one.
        parts: also return what the advantages are made of (`Advantages.parts`), [N] or [N, K].

    Returns:
        float32 [N] by name (`RESULTS`), in the order of the steps.

    Raises:
        UserError: for steps that cannot be used, and for rewards so large that a result is not finite.
    """
    if settings.aggregation == "similar" and similarity_threshold is None:
        similarity_threshold = SIMILAR
    nodes = settings.score == "distance"
    if similarity_threshold is not None and not nodes and settings.aggregation not in ("hard", "similar"):
        raise UserError(
            f"similarity_threshold: aggregation {settings.aggregation!r} has no anchors; need 'similar' (the preset"
            " gigpo_similarity)"
        )
    batch, packing = Group.from_steps(
        **needed(steps, texts=settings.aggregation != "none"),
        **_for_settings(steps, settings),
        similarity_threshold=None if nodes else similarity_threshold,
        node_similarity=similarity_threshold if nodes else None,
        max_features=settings.max_features,
        count_words=settings.aggregation == "soft",
    )
    chunk = None if chunk is None or len(batch.reward) <= chunk else chunk
    advantages = _compiled(batch, settings, chunk=chunk)
    result = {name: packing.unpack(getattr(advantages, ours)) for name, ours in RESULTS.items()}
    for name, values in result.items():
        odd = ~np.isfinite(values)
        if odd.any():
            row = int(odd.argmax())
            group = shown(column(steps["group"])[row])
            raise UserError(
                f"{name}: row {row} is {values[row]}; the rewards of group {group} are too large for float32"
            )
    if parts:
        result |= {name: packing.unpack(values) for name, values in advantages.parts.items()}
    return result


def _for_settings(steps: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The arguments of `Group.from_steps` that only some settings need. Raises UserError for a missing array."""
    found: dict[str, Any] = {}
    if settings.score == "distance":
        if "next_texts" not in steps:
            raise UserError(
                "next_texts is missing; score 'distance' (graphgpo) needs the observation after each action"
            )
        found["next_texts"] = steps["next_texts"]
    if settings.entropy:
        if "entropy" not in steps:
            raise UserError("entropy is missing; settings with entropy (empg) need that of each response or token")
        found["entropy"] = mean_entropy(steps["entropy"], steps.get("response_mask"))
    return found


def mean_entropy(entropy: Any, response_mask: Any) -> np.ndarray:
    """Mean entropy of each response, [N], from such means or from tokens [N, L]; 0 for a response without tokens."""
    values = column(entropy)
    tokens = values.ndim == 2 if isinstance(values, np.ndarray) else any(isinstance(v, (list, tuple)) for v in values)
    if not tokens:
        return finite(values, "entropy")
    if response_mask is None:
        raise UserError("response_mask is missing; entropy of each token needs it, for the mean of each response")
    masks = column(response_mask)
    if len(masks) != len(values):
        raise UserError(f"response_mask: got {len(masks)} rows, need {len(values)}, one per step")
    means = np.zeros(len(values))
    for row, (own, mask) in enumerate(zip(values, masks, strict=True)):
        if np.ndim(own) != 1 or np.shape(own) != np.shape(mask):
            raise UserError(f"entropy: row {row} has shape {np.shape(own)}, need {np.shape(mask)} as response_mask has")
        used = np.asarray(own, np.float64)[np.asarray(mask) != 0]
        means[row] = used.mean() if len(used) else 0.0
    return finite(means, "entropy")


def needed(steps: Mapping[str, Any], *, texts: bool) -> dict[str, Any]:
    """The arguments of `Group.from_steps` among the steps' arrays.

    Args:
        steps: [N] values by name.
        texts: whether texts are needed.

    Returns:
        The values by name.

    Raises:
        UserError: for a missing array.
    """
    names = (*NEEDED, "texts") if texts else NEEDED
    for name in names:
        if name not in steps:
            raise UserError(f"{name} is missing; need {', '.join(NEEDED)} and, to compare steps, texts")
    return {name: steps[name] for name in names}


_compiled = jax.jit(batch_advantages, static_argnames="chunk")


def _per_token(result: dict[str, np.ndarray], response_mask: Any) -> dict[str, Any]:
    """The results times each step's response mask, [N, L] or N arrays [L]; the return and parts stay per step."""
    count, once = (
        len(result["advantage"]),
        {name: v for name, v in result.items() if name in RESULTS and name != "discounted_return"},
    )
    masks = column(response_mask)
    if shape_of(masks)[:1] != (count,) or (isinstance(masks, np.ndarray) and masks.ndim != 2):
        raise UserError(f"response_mask: got shape {shape_of(masks)}, need ({count}, L), one row per step")
    if isinstance(masks, np.ndarray):
        odd = np.argwhere((masks != 0) & (masks != 1))
        if len(odd):
            row, at = odd[0].tolist()
            raise UserError(f"response_mask: row {row} has {shown(masks[row, at])} at place {at}, need 0 or 1")
        spread: dict[str, Any] = {name: v[:, None] * masks.astype(np.float32) for name, v in once.items()}
    else:
        masks = [_token_mask(mask, row) for row, mask in enumerate(masks)]
        spread = {name: [v * mask for v, mask in zip(values, masks, strict=True)] for name, values in once.items()}
    return {**result, **spread}


def _token_mask(mask: Any, row: int) -> np.ndarray:
    """The response mask of one step, float32 [L]. Raises UserError for anything but a list of 0 and 1."""
    if not isinstance(mask, (list, tuple)):
        raise UserError(f"response_mask: row {row} has {shown(mask)}, need a list of 0 and 1")
    odd = next((at for at, value in enumerate(mask) if not is_flag(value)), None)
    if odd is not None:
        raise UserError(f"response_mask: row {row} has {shown(mask[odd])} at place {odd}, need 0 or 1")
    return np.array(mask, np.float32)


def read_steps(path: Path) -> dict[str, Any]:
    """Read the arrays of an `.npz` file or the fields of a `.jsonl` file.

    Args:
        path: in an `.npz`, an array `NAME.json` holds a list as UTF-8 JSON, returned as `NAME` (see `write_steps`).

    Returns:
        An array or a list [N] by name.

    Raises:
        UserError: naming the file and the line.
    """
    if path.suffix == ".npz":
        return _read_arrays(path)
    if path.suffix == ".jsonl":
        return _read_lines(path)
    raise UserError(f"{path}: need a name that ends in .npz or .jsonl")


def _read_arrays(path: Path) -> dict[str, Any]:
    """The arrays of an `.npz` file."""
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
    """The fields of a `.jsonl` file, each a list."""
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


def write_steps(path: Path, values: Mapping[str, Any], *, compressed: bool = False) -> None:
    """Write arrays or lists with one row for each step to an `.npz` or `.jsonl` file. The file is written atomically.

    Args:
        path: the target. An `.npz` pads rows of different lengths with zeros, and stores strings as UTF-8 JSON in an
            array `NAME.json`, since an array of strings is as wide as its longest.
        values: N numbers, strings or arrays [L] by name.
        compressed: compress an `.npz`.

    Raises:
        UserError: for another ending of the name.
    """
    if path.suffix not in (".npz", ".jsonl"):
        raise UserError(f"{path}: need a name that ends in .npz or .jsonl")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            if path.suffix == ".npz":
                save = np.savez_compressed if compressed else np.savez
                save(file, **dict(_stored(name, rows) for name, rows in values.items()))  # type: ignore[arg-type]
            else:
                for i in range(len(next(iter(values.values())))):
                    row = {name: _plain(rows[i]) for name, rows in values.items()}
                    file.write((json.dumps(row, allow_nan=False) + "\n").encode())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _stored(name: str, values: Any) -> tuple[str, np.ndarray]:
    """(name, array) under which an `.npz` stores the values."""
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
    """A value as JSON takes it."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _umask() -> int:
    """The umask of the process."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
