"""What every estimator gives the same steps, computed by one compiled program."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxmo_jax.errors import UserError
from proxmo_jax.estimator.batch import batch_advantages
from proxmo_jax.estimator.packing import Packing, column, numbered, shape_of, similar_anchors, strings
from proxmo_jax.estimator.steps_file import NEEDED, mean_entropy, needed
from proxmo_jax.estimator.types import Advantages, Batch, Group, Settings
from proxmo_jax.estimator.words import Vocabulary, WordCounts, bucket

NEAREST = 10
WEIGHTS_AT_MOST = 1 << 27  # of all pairs of turns: half a gigabyte
LONG = 2048  # turns of a group from which on soft baselines are summed block by block


@dataclass(frozen=True)
class Estimates:
    """Advantages of `N` steps in `G` groups by several methods.

    Attributes:
        place: group, member and turn of each step, each int64 [N].
        success_rate: float32 [G], the fraction of trajectories that succeeded.
        results: by method: episode, step, joint, modulation and returns, and the parts that the method has, each
            float32 [N].
        left_out: why a method is missing, by its name.
        near: int64 [N, 10], the steps whose observations are nearest, -1 for none.
        near_weight: float32 [N, 10], their proximity weights.
        near_by: the method whose weights they are; "" if there are none.
    """

    place: tuple[np.ndarray, np.ndarray, np.ndarray]
    success_rate: np.ndarray
    results: dict[str, dict[str, np.ndarray]]
    left_out: dict[str, str]
    near: np.ndarray
    near_weight: np.ndarray
    near_by: str


def estimate(steps: Mapping[str, Any], methods: Mapping[str, Settings], vocabulary: Vocabulary | None = None):
    """Advantages of steps by every method that can be computed from them.

    Args:
        steps: [N] values by name, as in a steps file.
        methods: settings by name; neighbours are those of the first soft one.
        vocabulary: as in `Group.from_steps`.

    Returns:
        `Estimates`, in the order of the steps.

    Raises:
        UserError: for steps that cannot be used.
    """
    usable, left_out = _usable(steps, methods)
    compare = "texts" in steps
    batch, packing = Group.from_steps(
        **needed(steps, texts=compare),
        next_texts=steps["next_texts"] if compare and "next_texts" in steps else None,
        entropy=mean_entropy(steps["entropy"], steps.get("response_mask")) if "entropy" in steps else None,
        vocabulary=vocabulary,
        max_features=max((settings.max_features for settings in usable.values()), default=None),
    )
    similar = None
    if any(settings.aggregation == "similar" for settings in usable.values()):
        anchor = similar_anchors(strings(steps["texts"], "texts"), packing.index[0])
        similar = packing.pack(packing.distinct(anchor)[0])
    groups, members, turns = batch.reward.shape
    if members * turns > LONG:
        usable = {name: replace(settings, kernel="blockwise") for name, settings in usable.items()}
    fits = groups * (members * turns) ** 2 <= WEIGHTS_AT_MOST
    near_by = next((name for name, s in usable.items() if s.aggregation == "soft"), "") if fits else ""
    batch, similar = _padded(batch, similar)
    chunk = None if groups * members * turns <= 1 << 14 else max(1, (1 << 14) // (members * turns))
    every, near = _compute(batch, similar, usable, near_by=near_by, chunk=chunk)
    results = {name: _unpacked(own, packing, usable[name]) for name, own in jax.device_get(every).items()}
    _refuse_infinite(results)
    return Estimates(
        packing.index, _success_rate(batch)[:groups], results, left_out, *_neighbours(near, packing), near_by=near_by
    )


def _usable(steps: Mapping[str, Any], methods: Mapping[str, Settings]) -> tuple[dict[str, Settings], dict[str, str]]:
    """The methods that these steps suffice for, and what is missing for the others."""
    usable, left_out = {}, {}
    for name, settings in methods.items():
        missing = []
        if settings.aggregation != "none" and "texts" not in steps:
            missing.append("texts")
        if settings.score == "distance" and "next_texts" not in steps:
            missing.append("next_texts")
        if settings.entropy and "entropy" not in steps:
            missing.append("entropy")
        if missing:
            left_out[name] = f"needs {' and '.join(missing)}"
        else:
            usable[name] = settings
    return usable, left_out


@partial(jax.jit, static_argnames=("near_by", "chunk"))
def _compute(
    batch: Batch, similar: Any, methods: dict[str, Settings], *, near_by: str, chunk: int | None
) -> tuple[dict[str, Advantages], Any]:
    """Advantages by every method, and the nearest turns of each turn by one: (int32 and float32 [G, M T, 10])."""
    by_similar = replace(batch, anchor=similar, anchored_by="similar texts", words=None, embedding=None)
    every, near = {}, None
    for name, settings in methods.items():
        group = by_similar if settings.aggregation == "similar" else batch
        own = batch_advantages(group, settings, chunk=chunk, with_proximity=name == near_by)
        if own.proximity is not None:
            near = _nearest(own.proximity, batch.mask)
        every[name] = replace(own, proximity=None)
    return every, near


def _nearest(weight: jax.Array, mask: Any) -> tuple[jax.Array, jax.Array]:
    """The largest weights [G, N, N] of other turns, and whose they are: [G, N, 10] each; -1 where there is none."""
    size = weight.shape[1]
    others = jnp.asarray(mask).reshape(len(weight), 1, size) & ~jnp.eye(size, dtype=bool)
    top, at = jax.lax.top_k(jnp.where(others, weight, -1.0), min(NEAREST, size))
    return jnp.where(top >= 0, at, -1), top


def _padded(batch: Batch, similar: Any) -> tuple[Batch, Any]:
    """The batch with sizes of which there are few: a run's rollouts share one program, whose compilation takes long."""
    _, members, turns = batch.reward.shape
    turns = -turns % 8

    def pad(x: Any) -> Any:
        return None if x is None else np.pad(x, [(0, 0), (0, 0), (0, turns)] + [(0, 0)] * (x.ndim - 3))

    names = ("reward", "mask", "action_valid", "anchor", "edge", "text", "entropy")
    changed: dict[str, Any] = {name: pad(getattr(batch, name)) for name in names}
    if batch.words is not None:
        ids, counts, alphabetical = (np.asarray(x) for x in batch.words)
        _, texts, words = ids.shape
        least = bucket(min(members * (batch.reward.shape[2] + turns), 256))
        room = ((0, 0), (0, bucket(texts, least) - texts), (0, bucket(words, 128) - words))
        ranks = np.arange(len(alphabetical), max(len(alphabetical), 2048), dtype=alphabetical.dtype)
        changed["words"] = WordCounts(
            np.pad(ids, room), np.pad(counts, room), np.concatenate([alphabetical, ranks])
        )  # fmt: skip
    return replace(batch, **changed), pad(similar)


def _unpacked(own: Advantages, packing: Packing, settings: Settings) -> dict[str, np.ndarray]:
    """A method's results in the order of the steps, and its step baseline where that is one mean."""
    fields = {name: getattr(own, name) for name in ("episode", "step", "joint", "modulation", "returns")}
    parts = {name: values for name, values in own.parts.items() if values.ndim == own.joint.ndim}
    found = {name: packing.unpack(values) for name, values in {**parts, **fields}.items()}
    one_mean = settings.score in ("return", "distance") and not settings.step_std and not settings.history_length
    if one_mean and not settings.base_group and "step_score" in found:
        found["step_baseline"] = found["step_score"] - found["step"]
    if not (settings.episode_std or settings.leave_one_out or settings.entropy or settings.episode_over == "none"):
        weight = found["modulation"]
        found["episode_baseline"] = found["episode_score"] - found["episode"] / np.where(weight == 0, 1.0, weight)
    return found


def _success_rate(batch: Batch) -> np.ndarray:
    """Fraction of each group's trajectories that succeeded: float32 [G]."""
    played = np.asarray(batch.mask).any(2)
    return ((np.asarray(batch.success) & played).sum(1) / np.maximum(played.sum(1), 1)).astype(np.float32)


def _neighbours(near: Any, packing: Packing) -> tuple[np.ndarray, np.ndarray]:
    """(steps, weights) of the nearest turns, [N, 10] each, in the order of the steps."""
    count = len(packing)
    step, weight = np.full((count, NEAREST), -1, np.int64), np.zeros((count, NEAREST), np.float32)
    if near is None:
        return step, weight
    at, top = (np.asarray(x) for x in near)
    group, member, turn = packing.index
    turns = -(-packing.shape[2] // 8) * 8
    step_at = np.full((packing.shape[0], packing.shape[1] * turns), -1, np.int64)
    step_at[group, member * turns + turn] = np.arange(count)
    own = at[group, member * turns + turn]
    found = own >= 0
    step[:, : own.shape[1]] = np.where(found, step_at[group[:, None], np.maximum(own, 0)], -1)
    weight[:, : own.shape[1]] = np.where(found, top[group, member * turns + turn], 0.0)
    return step, weight


def _refuse_infinite(results: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Raise UserError for rewards so large that a joint advantage is not finite."""
    for name, own in results.items():
        odd = ~np.isfinite(own["joint"])
        if odd.any():
            row = int(odd.argmax())
            raise UserError(f"reward: row {row}: the rewards of its group are too large for float32 ({name})")


def selection(steps: Mapping[str, Any], most: int) -> np.ndarray | None:
    """The rows of as many whole groups, evenly spread, as have `most` steps; None if that is all of them.

    A group that is larger alone is cut to whole trajectories.

    Args:
        steps: [N] values by name.
        most: at least 1.

    Returns:
        int64 [K], in order, or None.

    Raises:
        UserError: for arrays that are missing or of different lengths, and for a trajectory of more steps.
    """
    given = needed(steps, texts=False)
    count = shape_of(column(given["group"]))[0] if len(shape_of(column(given["group"]))) else 0
    for name in NEEDED:
        if shape_of(column(given[name]))[:1] != (count,):
            raise UserError(f"{name}: got shape {shape_of(column(given[name]))}, need {count} rows, one per step")
    if count <= most:
        return None
    rows = np.arange(count)
    for name in ("group", "trajectory"):
        unit = numbered(column(given[name]), name)[0][rows]
        distinct, unit, sizes = np.unique(unit, return_inverse=True, return_counts=True)
        for kept in range(min(len(distinct), math.ceil(len(distinct) * most / len(rows)) + 1), 0, -1):
            chosen = np.unique(np.linspace(0, len(distinct) - 1, kept).astype(int))
            if sizes[chosen].sum() <= most:
                return rows[np.isin(unit, chosen)]
        rows = rows[unit == 0]
    raise UserError(f"trajectory: one has {len(rows)} steps, need at most {most} (--max-turns)")


def taken(steps: Mapping[str, Any], rows: np.ndarray) -> dict[str, Any]:
    """The steps of these rows."""
    chosen = rows.tolist()
    return {
        name: values[rows] if isinstance(values, np.ndarray) else [values[row] for row in chosen]
        for name, values in steps.items()
    }
