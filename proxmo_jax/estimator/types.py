"""Data types of the estimator: groups in, advantages out, and the settings between them.

Axes: `G` task groups, `M` members (trajectories) of a group, `T` turns of a member, `D` features. The estimator is
written for one group `[M, T]`; `jax.vmap` adds the leading axis of a batch. docs/method.md defines all quantities.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from proxmo_jax.errors import UserError
from proxmo_jax.estimator.packing import Packing, finite, flags, numbered, similar_anchors, strings
from proxmo_jax.estimator.words import Vocabulary, WordCounts

Array = jax.Array | np.ndarray


def pytree(cls):
    """Register a frozen dataclass as a pytree.

    Args:
        cls: the dataclass; fields with `metadata={"static": True}` are not leaves.

    Returns:
        The class.
    """
    names = [f.name for f in dataclasses.fields(cls)]
    static = [f.name for f in dataclasses.fields(cls) if f.metadata.get("static")]
    return jax.tree_util.register_dataclass(cls, [n for n in names if n not in static], static)


def static(default: Any) -> Any:
    """A dataclass field that is static under `jax.jit`: a new value compiles a new program."""
    return field(default=default, metadata={"static": True})


@pytree
@dataclass(frozen=True)
class Group:
    """The rollout of one task: `M` attempts at the same task, `T` turns each, `U` distinct anchor observations.

    Attributes:
        reward: float [M, T], environment reward of the turn.
        mask: bool [M, T], turns that happened; all others are padding and change no result.
        success: bool [M], the trajectory solved its task.
        action_valid: bool [M, T], the action of the turn is valid.
        anchor: int32 [M, T], index of the turn's anchor observation; equal numbers mean equal (or similar) texts.
            Needed for the aggregations hard and similar.
        embedding: float [M, T, D], unit vectors of the anchor observations, or zeros; or [U, D], one for each distinct
            observation, indexed by `anchor`: the same result at lower cost. Needed for the aggregation soft.
        comparable: bool [], False if no text of the whole batch has a feature: there is no proximity then. None is
            True.
        words: word counts [U, K] of the distinct observations, indexed by `anchor`; `batch_advantages` computes the
            TF-IDF embedding from them.
        anchored_by: what `from_steps` compared texts by, "equal texts" or "similar texts"; None for anchors of the
            caller.
    """

    reward: Array
    mask: Array
    success: Array
    action_valid: Array
    anchor: Array | None = None
    embedding: Array | None = None
    comparable: Array | None = None
    words: WordCounts | None = None
    anchored_by: str | None = static(None)

    @classmethod
    def from_steps(
        cls, *, group, trajectory, step, reward, success, action_valid, texts=None, anchor=None, embedding=None,
        vocabulary: Vocabulary | None = None, similarity_threshold: float | None = None,
        max_features: int | None = None,
    ) -> "tuple[Batch, Packing]":  # fmt: skip
        """Pack `N` ragged steps of many groups into a batch `[G, M, T]`, on the host.

        Args:
            group: [N] group ids, ints or strings.
            trajectory: [N] trajectory ids, ints or strings.
            step: [N] numbers or times that order the turns of a trajectory.
            reward: float [N].
            success: bool [N], the same on all steps of a trajectory.
            action_valid: bool [N].
            texts: N strings, the anchor observations.
            anchor: [N] ids of the caller in place of texts.
            embedding: float [N, D], vectors of the caller.
            vocabulary: counts the words of texts; keep it between batches to count each text once.
            similarity_threshold: texts that are at least this similar (`similar_anchors`) share an anchor, as
                `gigpo_similarity` needs; no words are counted then. Default: equal texts share one.
            max_features: as in the settings. Words that TF-IDF would drop are dropped at once if a text has more
                distinct words, which keeps the arrays narrow.

        Returns:
            The batch, and the packing: `packing.unpack(advantages.joint)` restores the order of the steps. The numbers
            of words and distinct texts are padded to powers of two.

        Raises:
            UserError: naming the array and the row, for ids and steps that `Packing` refuses, rewards that are not
                finite in float32, a trajectory whose steps disagree on success, and anchors beside texts.
        """
        packing = Packing(group, trajectory, step)
        row, words, anchored_by = _observations(packing, texts, anchor, vocabulary, similarity_threshold, max_features)
        batch = cls(
            reward=packing.pack(finite(reward, "reward"), "reward"),
            mask=packing.pack(np.ones(len(packing), bool)),
            success=packing.pack_trajectories(flags(success, "success"), "success"),
            action_valid=packing.pack(flags(action_valid, "action_valid"), "action_valid"),
            anchor=None if row is None else packing.pack(row),
            embedding=None if embedding is None else packing.pack(finite(embedding, "embedding", 2), "embedding"),
            words=words,
            anchored_by=anchored_by,
        )
        return batch, packing


def _observations(
    packing: Packing,
    texts: Sequence[str] | None,
    anchor: Any,
    vocabulary: Vocabulary | None,
    threshold: float | None,
    max_features: int | None,
) -> tuple[np.ndarray | None, WordCounts | None, str | None]:
    """(observation of each step int32 [N], word counts [G, U, K], what steps were compared by), as in `from_steps`."""
    if texts is None and threshold is not None:
        raise UserError("similarity_threshold: there are no texts; need them to number anchors by")
    if texts is not None and anchor is not None:
        raise UserError("anchor: texts number their own anchors; give one of the two")
    if texts is not None and threshold is None:
        vocabulary = vocabulary or Vocabulary()
        numbers = vocabulary.rows(strings(texts, "texts"))
        row, table = packing.distinct(numbers, "texts")
        kept = vocabulary if max_features is None else vocabulary.cut(numbers, max_features)
        return row, kept.gather(table), "equal texts"
    anchored_by = None
    if texts is not None and threshold is not None:
        anchored_by, anchor = "similar texts", similar_anchors(strings(texts, "texts"), packing.index[0], threshold)
    if anchor is None:
        return None, None, None
    row, _ = packing.distinct(numbered(anchor, "anchor")[0], "anchor")  # ids may be larger than int32
    return row, None, anchored_by


Batch = Group
"""A batch of groups: a `Group` whose arrays have a leading axis [G, ...]; `words.alphabetical` [V] has none."""

SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
RANGES = {
    "discount": (0.0, 1.0),
    "invalid_penalty": (0.0, LARGEST),
    "alpha": (SMALLEST, LARGEST),
    "modulation_range": (0.0, 1.0),
    "temperature": (SMALLEST, LARGEST),
    "step_weight": (0.0, LARGEST),
    "epsilon": (0.0, LARGEST),
}


@pytree
@dataclass(frozen=True)
class Settings:
    """Settings of the estimator. Numbers are pytree leaves (`vmap` over them to sweep), choices are static.

    The symbols are those of docs/method.md. Arrays in place of numbers are not checked.

    Raises:
        UserError: for a number outside `RANGES`, an unknown choice and choices that exclude each other.
    """

    discount: float = 0.95
    """Discount of the returns (gamma)."""
    invalid_penalty: float = 0.1
    """Subtracted from the episode and step scores of a turn with an invalid action (c)."""
    alpha: float = 4.0
    """Exponent of the success-rate modulation (alpha); above 0."""
    modulation_range: float = 0.05
    """The modulation weight lies in [1 - range, 1 + range] (rho); 0 disables the modulation."""
    temperature: float = 0.1
    """Temperature of the proximity softmax (tau); above 0. Towards 0 only equal vectors count."""
    step_weight: float = 1.0
    """Weight of the step advantage in the joint advantage (omega)."""
    epsilon: float = 1e-6
    """Added to standard deviations; with 0, equal scores still get advantage 0."""

    aggregation: Literal["none", "hard", "similar", "soft"] = static("soft")
    """Step baseline over no steps (none), equal (hard) or similar observations, or all steps by proximity (soft)."""
    episode_std: bool = static(False)
    """Divide the episode advantage by the unbiased standard deviation of the group."""
    step_std: bool = static(False)
    """Divide the step advantage by the unbiased standard deviation of the matching steps; not with aggregation soft."""
    episode_over: Literal["steps", "trajectories"] = static("steps")
    """Samples of the episode statistics: steps, as in the official code, or trajectories."""
    leave_one_out: bool = static(False)
    """Leave the sample itself out of its episode baseline (RLOO)."""
    success_rate: Literal["trajectories", "official"] = static("trajectories")
    """Rule for p: fraction of successful trajectories, or official: the clamped mean score, success above 0.5."""
    lone_step: Literal["zero", "official"] = static("zero")
    """Episode advantage of a lone step (or trajectory, with episode_over): zero, or official: the score itself."""
    exclude_self: bool = static(False)
    """Leave the step itself out of its soft baseline."""
    kernel: Literal["dense", "blockwise", "pallas"] = static("dense")
    """Summation of soft baselines: all pairs at once (dense), in linear memory (blockwise) or on a TPU (pallas)."""
    max_features: int = static(1024)
    """Size of the TF-IDF vocabulary."""

    def __post_init__(self):
        _choice("kernel", self.kernel, ("dense", "blockwise", "pallas"))
        _choice("aggregation", self.aggregation, ("none", "hard", "soft", "similar"))
        _choice("episode_over", self.episode_over, ("steps", "trajectories"))
        _choice("success_rate", self.success_rate, ("trajectories", "official"))
        _choice("lone_step", self.lone_step, ("zero", "official"))
        if self.step_std and self.aggregation == "soft":
            raise UserError('step_std: the soft baseline has no standard deviation; use aggregation="hard"')
        if self.max_features < 1:
            raise UserError(f"max_features must be at least 1, got {self.max_features}")
        for name in RANGES:
            value = getattr(self, name)
            if isinstance(value, (int, float, np.number)):
                _number(name, value)


def sweep(settings: Settings, **values: Any) -> Settings:
    """Every combination of values of some numeric settings; the last one named changes fastest.

        jax.vmap(advantages, (None, 0))(group, sweep(proxmo(), temperature=[0.05, 0.1], step_weight=[0, 1]))

    Args:
        settings: the settings of everything that is not swept.
        values: for each name, the values to try.

    Returns:
        Settings whose numbers are float32 [N].

    Raises:
        UserError: for a name that is no numeric setting, and a value outside `RANGES`.
    """
    knobs = list(RANGES)
    for name, several in values.items():
        if name not in knobs:
            raise UserError(f"sweep: {name} is no numeric knob; need one of {', '.join(knobs)}")
        for value in np.ravel(several):
            _number(name, value)
    grids = np.meshgrid(*(np.asarray(v, np.float32) for v in values.values()), indexing="ij")
    swept: dict[str, Any] = {name: grid.reshape(-1) for name, grid in zip(values, grids, strict=True)}
    size = len(next(iter(swept.values()))) if swept else 1
    for name in knobs:
        swept.setdefault(name, np.full(size, getattr(settings, name), np.float32))
    return dataclasses.replace(settings, **swept)


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise UserError for an unknown choice."""
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _number(name: str, value: Any) -> None:
    """Raise UserError for a number outside its range."""
    least, most = RANGES[name]
    if not -LARGEST <= value <= LARGEST:
        raise UserError(f"{name} must be a finite number (float32), got {value}")
    if least == SMALLEST and value <= 0:
        raise UserError(f"{name} must be > 0, got {value}")
    if not least <= value <= most:
        limits = f"at least {least:.2g}" if most == LARGEST else f"between {least:g} and {most:g}"
        raise UserError(f"{name} must be {limits}, got {value}")


@pytree
@dataclass(frozen=True)
class Advantages:
    """Results of the estimator for one group. Arrays are 0 on padding; a batch has a leading axis [G, ...].

    Attributes:
        returns: float32 [M, T], discounted return of the turn.
        success_rate: float32 [], success rate p of the group, by the rule of the settings.
        modulation: float32 [M, T], weight of the episode advantage.
        episode: float32 [M, T], modulated episode advantage.
        step: float32 [M, T], step advantage.
        joint: float32 [M, T], episode + step_weight * step: the advantage of every response token of the turn.
        proximity: float32 [M * T, M * T], weights of the soft baseline if they were requested, else None.
    """

    returns: jax.Array
    success_rate: jax.Array
    modulation: jax.Array
    episode: jax.Array
    step: jax.Array
    joint: jax.Array
    proximity: jax.Array | None = None


def masked_mean(values: Array, mask: Array) -> jax.Array:
    """Mean over all axes under a mask, in two passes.

    The second pass removes the rounding of the first: with nearly equal scores one pass was off by 4e-2 of their
    spread.

    Args:
        values: float [...].
        mask: bool [...], of the same shape.

    Returns:
        float32 []; 0 for an empty mask.
    """
    count = jnp.maximum(mask.sum(), 1).astype(jnp.float32)
    mean = jnp.where(mask, values, 0.0).sum() / count
    return mean + jnp.where(mask, values - mean, 0.0).sum() / count


def masked_std(deviation: Array, mask: Array) -> jax.Array:
    """Unbiased standard deviation under a mask.

    Scaled by the largest deviation, so that squares of large values do not overflow and those of small ones do not
    underflow.

    Args:
        deviation: float [...], values minus their mean.
        mask: bool [...], of the same shape.

    Returns:
        float32 []; 0 for fewer than two values.
    """
    deviation = jnp.where(mask, deviation, 0.0)
    peak = jnp.abs(deviation).max()
    square = jnp.square(deviation / positive(peak)).sum()
    return peak * jnp.sqrt(square / jnp.maximum(mask.sum() - 1, 1).astype(jnp.float32))


def positive(scale: jax.Array) -> jax.Array:
    """The divisor itself, or 1 where it is 0."""
    return jnp.where(scale > 0, scale, 1.0)
