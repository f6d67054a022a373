"""The border: ragged steps, named and ordered as they come, into rectangles `[group, member, turn]` and back.

Host only; knows NumPy.
"""

from typing import Any

import numpy as np

from proxmo_jax.errors import UserError
from proxmo_jax.words import bucket


def numbered(names: np.ndarray) -> tuple[np.ndarray, int]:
    """(a number 0.. for each name int64 [N], how many names there are). Names are ints or strings."""
    if names.dtype.kind in "iub":
        distinct, index = np.unique(names, return_inverse=True)
        return index, len(distinct)
    seen: dict[Any, int] = {}
    index = np.fromiter((seen.setdefault(name, len(seen)) for name in names.tolist()), np.int64, len(names))
    return index, len(seen)


def finite(values: Any, name: str) -> np.ndarray:
    """The values as float32. Raises UserError naming the first row with one that is not a finite number."""
    values = np.asarray(values)
    if values.dtype.kind not in "fiub":
        raise UserError(f"{name}: need numbers, got {values.dtype}")
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise UserError(f"{name}: row {bad[0][0]} has {values[tuple(bad[0])]}, need finite numbers")
    return values.astype(np.float32)


def flags(values: Any, name: str) -> np.ndarray:
    """The values as bool. Raises UserError for anything but true and false, or 1 and 0."""
    values = np.asarray(values)
    if values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        raise UserError(
            f"{name}: need true or false (1 or 0) in every row, got {values.dtype} {values[:3].tolist()}..."
        )
    return values.astype(bool)


class Packing:
    """Where each of `N` ragged steps lies in the rectangle `[G, M, T]`; built once at the border, on the host.

    Groups and trajectories may be named by any ints or strings and come in any order; a trajectory's turns are
    ordered by `step`. Raises UserError naming the array for an empty batch, lengths that differ, a trajectory
    found in two groups and a repeated (trajectory, step).
    """

    def __init__(self, group: np.ndarray, trajectory: np.ndarray, step: np.ndarray):
        group, trajectory, step = np.asarray(group), np.asarray(trajectory), np.asarray(step)
        if group.ndim != 1 or len(group) == 0:
            raise UserError(f"group: need a non-empty array of shape (N,), got shape {group.shape}")
        for name, array in (("trajectory", trajectory), ("step", step)):
            if array.shape != group.shape:
                raise UserError(f"{name}: got shape {array.shape}, need {group.shape} as group has")
        step = finite(step, "step")
        group_index, groups = numbered(group)
        trajectory_index, trajectories = numbered(trajectory)
        owner = np.empty(trajectories, np.int64)
        owner[trajectory_index] = group_index
        if np.any(owner[trajectory_index] != group_index):
            bad = trajectory[np.flatnonzero(owner[trajectory_index] != group_index)[0]]
            raise UserError(f"trajectory: {bad} stands in two groups; a trajectory belongs to one")

        order = np.lexsort((step, trajectory_index))
        same = trajectory_index[order][1:] == trajectory_index[order][:-1]
        twice = np.flatnonzero(same & (step[order][1:] == step[order][:-1]))
        if len(twice):
            at = order[twice[0]]
            raise UserError(f"step: trajectory {trajectory[at]} has step {step[at]:g} twice; each may stand once")
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
        """Per-step `[N, ...]` to `[G, M, T, ...]`, zeros on padding."""
        values = np.asarray(values)
        if values.shape[:1] != (len(self),):
            raise UserError(f"{name}: got shape {values.shape}, need {len(self)} rows, one per step")
        rectangle = np.zeros(self.shape + values.shape[1:], values.dtype)
        rectangle[self.index] = values
        return rectangle

    def pack_trajectories(self, values: np.ndarray, name: str) -> np.ndarray:
        """A per-step flag bool [N] that is the same on all steps of a trajectory, to `[G, M]`.

        Raises UserError naming a trajectory whose steps disagree.
        """
        flag = self.pack(values, name).max(axis=2)
        differs = np.flatnonzero(values != flag[self.index[:2]])
        if len(differs):
            at = differs[0]
            raise UserError(f"{name}: the steps of trajectory {self._trajectory[at]} disagree; need one value for all")
        return flag

    def unpack(self, rectangle: Any) -> np.ndarray:
        """`[G, M, T, ...]` back to per-step `[N, ...]` in the input's order."""
        return np.asarray(rectangle)[self.index]

    def distinct(self, numbers: np.ndarray, name: str = "numbers") -> tuple[np.ndarray, np.ndarray]:
        """The distinct ones of each group among ints >= 0 [N], and which of them each step has.

        Returns (row int32 [N], table int64 [G, U]): table[g, row] is the step's number; U is a power of two, -1 fills.
        """
        group, size = self.index[0], int(numbers.max(initial=0)) + 1
        if len(numbers) != len(self):
            raise UserError(f"{name}: got {len(numbers)} rows, need {len(self)}, one per step")
        both, which = np.unique(group * size + numbers, return_inverse=True)
        owner = both // size
        row = np.arange(len(both)) - np.searchsorted(owner, np.arange(self.shape[0]))[owner]
        table = np.full((self.shape[0], bucket(int(row.max()) + 1)), -1, np.int64)
        table[owner, row] = both - owner * size
        return row[which].astype(np.int32), table
