"""The data that flows through the estimator, each shape stated once, and the packing of ragged steps.

Knows arrays only. `G` task groups, `M` members (trajectories) of a group, `T` turns of a member, `D` features.
The estimator is written for ONE group `[M, T]`; a batch is a leading axis added by `jax.vmap`.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def pytree(cls):
    """Register a frozen dataclass as a pytree; fields with `metadata={"static": True}` are not leaves."""
    names = [f.name for f in dataclasses.fields(cls)]
    static = [f.name for f in dataclasses.fields(cls) if f.metadata.get("static")]
    return jax.tree_util.register_dataclass(cls, [n for n in names if n not in static], static)


def static(default: Any) -> Any:
    """A dataclass field that is part of the program, not of the data: changing it compiles anew."""
    return field(default=default, metadata={"static": True})


@pytree
@dataclass(frozen=True)
class Group:
    """One task group as rolled out: `M` attempts at the same task, `T` turns each.

    reward        float [M, T]   environment reward of the turn
    mask          bool  [M, T]   turns that happened; everything else is padding and changes nothing
    success       bool  [M]      the trajectory solved its task
    action_valid  bool  [M, T]   the turn's action was well formed
    anchor        int32 [M, T]   id of the turn's anchor observation: equal ids, equal text (`hard` groups); or None
    embedding     float [M, T, D] unit vectors of the anchor observations, or zeros (`soft` groups); or None
    comparable    bool  []       False if no text of the whole batch has a feature (no proximity then); None: True
    """

    reward: Any
    mask: Any
    success: Any
    action_valid: Any
    anchor: Any = None
    embedding: Any = None
    comparable: Any = None


@pytree
@dataclass(frozen=True)
class Settings:
    """The knobs of the estimator. Plain numbers are leaves (`vmap` over them to sweep), choices are static.

    discount          gamma of the returns (spec: 0.95)
    invalid_penalty   c, taken from episode and step scores of a turn whose action is invalid (0.1)
    alpha             exponent of the success-rate modulation (4)
    modulation_range  the modulation weight lies in [1 - range, 1 + range] (0.05); 0 switches it off
    temperature       tau of the proximity softmax (0.1), > 0; towards 0 only equal vectors count
    step_weight       omega, the share of the step advantage in the joint one (1)
    epsilon           added to standard deviations (1e-6)

    aggregation       "none" (GRPO), "hard" (GiGPO: equal anchor ids), "soft" (ProxMO: proximity-weighted)
    episode_std       divide the episode advantage by the group's unbiased standard deviation
    step_std          the same for the step advantage; "hard" only
    episode_over      what the episode statistics are taken over: "steps" (long trajectories weigh more,
                      as the official code does) or "trajectories"
    leave_one_out     the episode baseline leaves the sample itself out (RLOO)
    success_rate      "trajectories": successes / attempts, as in the paper; "official": the official code's
                      mean penalised score over steps, clamped to [0, 1], success where the score exceeds 0.5
    exclude_self      leave the step itself out of its soft baseline
    """

    discount: Any = 0.95
    invalid_penalty: Any = 0.1
    alpha: Any = 4.0
    modulation_range: Any = 0.05
    temperature: Any = 0.1
    step_weight: Any = 1.0
    epsilon: Any = 1e-6
    aggregation: str = static("soft")
    episode_std: bool = static(False)
    step_std: bool = static(False)
    episode_over: str = static("steps")
    leave_one_out: bool = static(False)
    success_rate: str = static("trajectories")
    exclude_self: bool = static(False)

    def __post_init__(self):
        _choice("aggregation", self.aggregation, ("none", "hard", "soft"))
        _choice("episode_over", self.episode_over, ("steps", "trajectories"))
        _choice("success_rate", self.success_rate, ("trajectories", "official"))
        if self.step_std and self.aggregation == "soft":
            raise ValueError('step_std: the soft baseline has no standard deviation; use aggregation="hard"')
        if isinstance(self.temperature, (int, float)) and not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


@pytree
@dataclass(frozen=True)
class Advantages:
    """What the estimator answers for one group; every array is 0 on padding.

    returns       float32 [M, T]  discounted return of the turn
    success_rate  float32 []      p of the group, by the rule of the settings
    modulation    float32 [M, T]  weight of the episode advantage
    episode       float32 [M, T]  modulated episode advantage
    step          float32 [M, T]  step advantage
    joint         float32 [M, T]  episode + omega * step: what every response token of the turn gets
    """

    returns: Any
    success_rate: Any
    modulation: Any
    episode: Any
    step: Any
    joint: Any


class Packing:
    """Where each of `N` ragged steps lies in the rectangle `[G, M, T]`; built once at the border, on the host.

    Groups and trajectories may be named by any ints or strings and come in any order; a trajectory's turns are
    ordered by `step`. Raises ValueError naming the array for an empty batch, lengths that differ, a trajectory
    found in two groups and a repeated (trajectory, step).
    """

    def __init__(self, group: np.ndarray, trajectory: np.ndarray, step: np.ndarray):
        group, trajectory, step = np.asarray(group), np.asarray(trajectory), np.asarray(step)
        if group.ndim != 1 or len(group) == 0:
            raise ValueError(f"group: need a non-empty array of shape (N,), got shape {group.shape}")
        for name, array in (("trajectory", trajectory), ("step", step)):
            if array.shape != group.shape:
                raise ValueError(f"{name}: got shape {array.shape}, need {group.shape} as group has")
        self.groups, group_index = np.unique(group, return_inverse=True)
        self.trajectories, first, trajectory_index = np.unique(trajectory, return_index=True, return_inverse=True)
        owner = group_index[first]
        if np.any(owner[trajectory_index] != group_index):
            bad = trajectory[np.flatnonzero(owner[trajectory_index] != group_index)[0]]
            raise ValueError(f"trajectory: {bad!r} stands in two groups; a trajectory belongs to one")

        order = np.lexsort((step, trajectory_index))
        same = trajectory_index[order][1:] == trajectory_index[order][:-1]
        twice = np.flatnonzero(same & (step[order][1:] == step[order][:-1]))
        if len(twice):
            at = order[twice[0]]
            raise ValueError(f"step: trajectory {trajectory[at]!r} has step {step[at]} twice; each may stand once")
        starts = np.flatnonzero(np.r_[True, ~same])
        turn = np.empty(len(group), np.int64)
        turn[order] = np.arange(len(group)) - np.repeat(starts, np.diff(np.r_[starts, len(group)]))

        by_owner = np.argsort(owner, kind="stable")
        first_of_group = np.searchsorted(owner[by_owner], np.arange(len(self.groups)))
        member = np.empty(len(owner), np.int64)
        member[by_owner] = np.arange(len(owner)) - first_of_group[owner[by_owner]]

        self.index = (group_index, member[trajectory_index], turn)
        self.shape = tuple(int(i.max()) + 1 for i in self.index)

    def pack(self, values: np.ndarray, name: str = "values") -> np.ndarray:
        """Per-step `[N, ...]` to `[G, M, T, ...]`, zeros on padding."""
        values = np.asarray(values)
        if len(values) != len(self.index[0]):
            raise ValueError(f"{name}: got {len(values)} rows, need {len(self.index[0])}, one per step")
        rectangle = np.zeros(self.shape + values.shape[1:], values.dtype)
        rectangle[self.index] = values
        return rectangle

    def pack_trajectories(self, values: np.ndarray, name: str) -> np.ndarray:
        """A per-step flag `[N]` that is the same on all steps of a trajectory, to `[G, M]`."""
        return self.pack(values, name).max(axis=2)

    def unpack(self, rectangle: Any) -> np.ndarray:
        """`[G, M, T, ...]` back to per-step `[N, ...]` in the input's order."""
        return np.asarray(rectangle)[self.index]


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `values` where `mask`, over all axes, in two passes; 0 for an empty mask.

    The second pass removes the rounding of the first: with nearly equal scores one pass was off by 4e-2 of
    their spread.
    """
    count = jnp.maximum(mask.sum(), 1).astype(jnp.float32)
    mean = jnp.where(mask, values, 0.0).sum() / count
    return mean + jnp.where(mask, values - mean, 0.0).sum() / count
