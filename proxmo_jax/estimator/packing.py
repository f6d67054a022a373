"""Packing of ragged steps, in any order, into rectangles `[group, member, turn]` and back.

Runs on the host with NumPy. Rows are counted from 0 in messages.
"""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from proxmo_jax.errors import UserError

SIMILAR = 0.95  # difflib ratio from which on two texts share an anchor in GiGPO's `similar` variant


def column(values: Any) -> Any:
    """Values of the caller, uncast: an array of numbers or times as it is, everything else as a list.

    NumPy would convert mixed ints to floats, ints beside strings to strings, and pad every string to the longest.

    Args:
        values: array or sequence [N, ...].

    Returns:
        np.ndarray or list [N, ...].
    """
    if isinstance(values, np.ma.MaskedArray):
        return values.tolist()  # None where a value is missing
    if not isinstance(values, (list, tuple)):
        values = np.asarray(values)
        if values.ndim and values.dtype.kind in "OUS":
            return values.tolist()
    return values


def shape_of(values: Any) -> tuple[int, ...]:
    """Shape of an array, or (length,) of a list."""
    return values.shape if isinstance(values, np.ndarray) else (len(values),)


def shown(value: Any) -> str:
    """A value of the caller for an error message: short, on one line."""
    value = value.item() if isinstance(value, np.generic) and value.dtype.kind not in "mM" else value
    text = repr(value) if not isinstance(value, np.generic) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def numbered(names: Any, name: str = "ids") -> tuple[np.ndarray, int]:
    """Number ids in 0..; equal numbers mean equal ids.

    Args:
        names: [N] ints of any size or strings, all of one kind.
        name: of the array, for messages.

    Returns:
        Numbers int64 [N], and how many distinct ids there are.

    Raises:
        UserError: naming the row of any other id, and of a missing one (None, NaN, an empty string).
    """
    names = column(names)
    if isinstance(names, np.ndarray) and names.dtype.kind in "iu" and names.ndim == 1:
        distinct, index = np.unique(names, return_inverse=True)
        return index, len(distinct)
    names = names.tolist() if isinstance(names, np.ndarray) else names
    if set(map(type, names)) not in ({int}, {str}):
        names = [_identity(value, name, row) for row, value in enumerate(names)]
        kinds = [type(value) for value in names]
        odd = next((row for row, kind in enumerate(kinds) if kind is not kinds[0]), None)
        if odd is not None:
            raise UserError(
                f"{name}: row 0 has {shown(names[0])} and row {odd} {shown(names[odd])}, need ints or strings, not both"
            )
    seen: dict[Any, int] = {}
    index = np.fromiter((seen.setdefault(value, len(seen)) for value in names), np.int64, len(names))
    if "" in seen:
        _identity("", name, int(np.flatnonzero(index == seen[""])[0]))
    return index, len(seen)


def _identity(value: Any, name: str, row: int) -> int | str | bytes:
    """The id as a plain int or string. Raises UserError for any other type, and for an empty string."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, (str, bytes)) and value:
        return str(value) if isinstance(value, str) else bytes(value)
    raise UserError(f"{name}: row {row} has {shown(value)}, need an int or a string that is not empty")


def first_seen(texts: Sequence[str]) -> np.ndarray:
    """Number texts in the order in which they come first; equal numbers mean equal texts.

    Args:
        texts: N strings, any of them empty.

    Returns:
        int64 [N].
    """
    seen: dict[str, int] = {}
    return np.fromiter((seen.setdefault(text, len(seen)) for text in texts), np.int64, len(texts))


def ranks(steps: Any, name: str = "step") -> np.ndarray:
    """Rank of each value among the distinct ones. Values are compared in their own type, hence without rounding.

    Args:
        steps: [N] numbers, or times as NumPy has them.
        name: of the array, for messages.

    Returns:
        int64 [N].

    Raises:
        UserError: naming the row of anything else.
    """
    steps = column(steps)
    if isinstance(steps, np.ndarray):
        if steps.dtype.kind not in "iubfmM":
            raise UserError(f"{name}: need numbers or times, got {steps.dtype}")
        odd = np.isnat(steps) if steps.dtype.kind in "mM" else ~np.isfinite(steps)
        if odd.any():
            raise UserError(f"{name}: row {odd.argmax()} has {steps[odd.argmax()]}, need finite numbers")
        return np.unique(steps, return_inverse=True)[1]
    steps = numbers(steps, name)
    place = {value: rank for rank, value in enumerate(sorted(set(steps)))}
    return np.fromiter(map(place.__getitem__, steps), np.int64, len(steps))


def numbers(values: Sequence[Any], name: str) -> list:
    """A list of finite Python numbers, ints of any size.

    Args:
        values: N values.
        name: of the array, for messages.

    Returns:
        list [N].

    Raises:
        UserError: naming the row of anything else.
    """
    if not set(map(type, values)) <= {int, float, bool}:
        values = [value.item() if isinstance(value, np.generic) else value for value in values]
    for row, value in enumerate(values):
        if not isinstance(value, (int, float)):
            raise UserError(f"{name}: row {row} has {shown(value)}, need a number")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}: row {row} has {value}, need finite numbers")
    return list(values)


def finite(values: Any, name: str, ndim: int = 1) -> np.ndarray:
    """Convert to float32.

    Args:
        values: [N], or [N, D] for `ndim` 2.
        name: of the array, for messages.
        ndim: 1 or 2.

    Returns:
        float32 [N] or [N, D].

    Raises:
        UserError: naming the first row with a value that is not a finite number or overflows float32.
    """
    values = column(values)
    if not isinstance(values, np.ndarray) and ndim == 1:
        values = np.array([_as_float(value) for value in numbers(values, name)])
    elif not isinstance(values, np.ndarray):
        try:
            values = np.array(values, np.float64)
        except (ValueError, TypeError) as error:
            raise UserError(f"{name}: need rows of numbers, all of one length ({error})") from error
    if values.dtype.kind not in "fiub":
        raise UserError(f"{name}: need numbers, got {values.dtype}")
    if values.ndim != ndim:
        raise UserError(f"{name}: got shape {values.shape}, need one {'number' if ndim == 1 else 'vector'} per step")
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    odd = np.argwhere(~np.isfinite(single))
    if len(odd):
        value = values[tuple(odd[0])]
        most = np.finfo(np.float32).max
        need = f"numbers from -{most:.2g} to {most:.2g} (float32)" if np.isfinite(value) else "finite numbers"
        raise UserError(f"{name}: row {odd[0][0]} has {value}, need {need}")
    return single


def _as_float(value: float) -> float:
    """A Python number as a float; ints out of range are clipped to the largest float."""
    most = float(np.finfo(np.float64).max)
    return float(min(max(value, -most), most))


def flags(values: Any, name: str) -> np.ndarray:
    """Convert to bool.

    Args:
        values: [N], true and false or 1 and 0.
        name: of the array, for messages.

    Returns:
        bool [N].

    Raises:
        UserError: naming the row of anything else.
    """
    values = column(values)
    if isinstance(values, np.ndarray):
        if values.ndim != 1:
            raise UserError(f"{name}: got shape {values.shape}, need true or false (1 or 0) for each step")
        odd = ~np.isin(values, (0, 1)) if values.dtype.kind in "biuf" else np.ones(len(values), bool)
    else:
        odd = np.array([not is_flag(value) for value in values], bool)
    if odd.any():
        row = int(odd.argmax())
        raise UserError(f"{name}: row {row} has {shown(values[row])}, need true or false (1 or 0)")
    return np.array(values, bool)


def is_flag(value: Any) -> bool:
    """Whether a value is true or false, or 1 or 0."""
    return isinstance(value, (bool, int, float, np.bool_, np.number)) and value in (0, 1)


def strings(values: Any, name: str) -> list[str]:
    """Convert to a list of strings.

    Args:
        values: N strings.
        name: of the array, for messages.

    Returns:
        list [N].

    Raises:
        UserError: naming the row of anything else.
    """
    values = column(values)
    if isinstance(values, np.ndarray):
        raise UserError(f"{name}: need strings, got {values.dtype}")
    if set(map(type, values)) - {str}:
        odd = next((row for row, value in enumerate(values) if not isinstance(value, str)), None)
        if odd is not None:
            raise UserError(f"{name}: row {odd} has {shown(values[odd])}, need a string")
    return list(values)


def similar_anchors(texts: Sequence[str], group: Any, threshold: float = SIMILAR) -> np.ndarray:
    """Anchor ids by similarity of texts (the `similar` variant of GiGPO).

    First fit in the order of the steps, within each group: a step joins the first cluster whose first text has a
    `difflib` ratio of at least `threshold` with its own, and founds a new cluster otherwise.

    Args:
        texts: N strings.
        group: [N] group ids.
        threshold: above 0, at most 1.

    Returns:
        int32 [N].

    Raises:
        UserError: for a threshold out of range and lengths that differ.
    """
    if not 0 < threshold <= 1:
        raise UserError(f"similarity_threshold must be above 0 and at most 1, got {threshold}")
    owners, _ = numbered(group, "group")
    if len(texts) != len(owners):
        raise UserError(f"texts: got {len(texts)} rows, need {len(owners)}, one per step")
    anchor = np.empty(len(texts), np.int32)
    known: dict[tuple[int, str], int] = {}  # an equal text has joined the same cluster
    clusters: dict[int, list[tuple[difflib.SequenceMatcher, int]]] = {}
    founded = 0
    for i, (text, owner) in enumerate(zip(texts, owners.tolist(), strict=True)):
        if (owner, text) not in known:
            mine = clusters.setdefault(owner, [])
            joined = next((cluster for first, cluster in mine if _similar(first, text, threshold)), founded)
            if joined == founded:
                mine.append((difflib.SequenceMatcher(None, "", text), founded))
                founded += 1
            known[owner, text] = joined
        anchor[i] = known[owner, text]
    return anchor


def _similar(first: difflib.SequenceMatcher, text: str, threshold: float) -> bool:
    """Whether the ratio of a text with a cluster's first is at least the threshold; its upper bounds are cheap."""
    first.set_seq1(text)
    bounds = first.real_quick_ratio, first.quick_ratio, first.ratio
    return all(bound() >= threshold for bound in bounds)


class Packing:
    """Position of each of `N` ragged steps in the rectangle `[G, M, T]`, computed once on the host.

    Groups, trajectories and steps may come in any order.

    Attributes:
        index: (group, member, turn), each int64 [N].
        shape: (G, M, T).
    """

    def __init__(self, group: Any, trajectory: Any, step: Any):
        """Compute the positions.

        Args:
            group: [N] ids, ints or strings (`numbered`).
            trajectory: [N] ids, ints or strings.
            step: [N] numbers or times that order the turns of a trajectory (`ranks`).

        Raises:
            UserError: naming the array, for an empty batch, lengths that differ, a trajectory in two groups and a
                repeated (trajectory, step).
        """
        group, trajectory, step = column(group), column(trajectory), column(step)
        shape = shape_of(group)
        if len(shape) != 1 or shape[0] == 0:
            raise UserError(f"group: need a non-empty array of shape (N,), got shape {shape}")
        for name, values in (("trajectory", trajectory), ("step", step)):
            if shape_of(values) != shape:
                raise UserError(f"{name}: got shape {shape_of(values)}, need {shape} as group has")
        rank = ranks(step)
        group_index, groups = numbered(group, "group")
        trajectory_index, trajectories = numbered(trajectory, "trajectory")
        owner = np.empty(trajectories, np.int64)
        owner[trajectory_index] = group_index
        if np.any(owner[trajectory_index] != group_index):
            bad = trajectory[np.flatnonzero(owner[trajectory_index] != group_index)[0]]
            raise UserError(f"trajectory: {shown(bad)} stands in two groups; a trajectory belongs to one")

        order = np.lexsort((rank, trajectory_index))
        same = trajectory_index[order][1:] == trajectory_index[order][:-1]
        twice = np.flatnonzero(same & (rank[order][1:] == rank[order][:-1]))
        if len(twice):
            at = order[twice[0]]
            raise UserError(
                f"step: trajectory {shown(trajectory[at])} has step {shown(step[at])} twice; each may stand once"
            )
        starts = np.flatnonzero(np.r_[True, ~same])
        turn = np.empty(len(group), np.int64)
        turn[order] = np.arange(len(group)) - np.repeat(starts, np.diff(np.r_[starts, len(group)]))

        by_owner = np.argsort(owner, kind="stable")
        first_of_group = np.searchsorted(owner[by_owner], np.arange(groups))
        member = np.empty(len(owner), np.int64)
        member[by_owner] = np.arange(len(owner)) - first_of_group[owner[by_owner]]

        self._trajectory = trajectory
        self.index = (group_index, member[trajectory_index], turn)
        self.shape = tuple(int(i.max()) + 1 for i in self.index)

    def __len__(self) -> int:
        return len(self.index[0])

    def pack(self, values: np.ndarray, name: str = "values") -> np.ndarray:
        """Scatter per-step values into the rectangle.

        Args:
            values: [N, ...].
            name: of the array, for messages.

        Returns:
            [G, M, T, ...], zeros on padding.

        Raises:
            UserError: for another number of rows.
        """
        values = np.asarray(values)
        if values.shape[:1] != (len(self),):
            raise UserError(f"{name}: got shape {values.shape}, need {len(self)} rows, one per step")
        rectangle = np.zeros(self.shape + values.shape[1:], values.dtype)
        rectangle[self.index] = values
        return rectangle

    def pack_trajectories(self, values: np.ndarray, name: str) -> np.ndarray:
        """Scatter a per-step flag that is constant within each trajectory.

        Args:
            values: bool [N].
            name: of the array, for messages.

        Returns:
            bool [G, M].

        Raises:
            UserError: naming a trajectory whose steps disagree.
        """
        flag = self.pack(values, name).max(axis=2)
        differs = np.flatnonzero(values != flag[self.index[:2]])
        if len(differs):
            at = differs[0]
            trajectory = shown(self._trajectory[at])
            raise UserError(f"{name}: the steps of trajectory {trajectory} disagree; need one value for all")
        return flag

    def unpack(self, rectangle: Any) -> np.ndarray:
        """Gather a rectangle `[G, M, T, ...]` into per-step values `[N, ...]` in the order of the input."""
        return np.asarray(rectangle)[self.index]

    def distinct(self, numbers: np.ndarray, name: str = "numbers") -> tuple[np.ndarray, np.ndarray]:
        """Distinct numbers of each group.

        Args:
            numbers: int64 [N], at least 0.
            name: of the array, for messages.

        Returns:
            row int32 [N] and table int64 [G, U], where table[g, row] is the number of the step. U is 16 or a multiple
            of 32: the work of a soft baseline is quadratic in it. Unused entries are -1.

        Raises:
            UserError: for another number of rows.
        """
        group, size = self.index[0], int(numbers.max(initial=0)) + 1
        if len(numbers) != len(self):
            raise UserError(f"{name}: got {len(numbers)} rows, need {len(self)}, one per step")
        both, which = np.unique(group * size + numbers, return_inverse=True)
        owner = both // size
        row = np.arange(len(both)) - np.searchsorted(owner, np.arange(self.shape[0]))[owner]
        most = int(row.max()) + 1
        table = np.full((self.shape[0], 16 if most <= 16 else -(-most // 32) * 32), -1, np.int64)
        table[owner, row] = both - owner * size
        return row[which].astype(np.int32), table
