"""The data that flows through the estimator, each shape stated once.

Knows arrays only. `G` task groups, `M` members (trajectories) of a group, `T` turns of a member, `D` features.
The estimator is written for ONE group `[M, T]`; a batch is a leading axis added by `jax.vmap`.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxmo_jax.errors import UserError
from proxmo_jax.estimator.packing import Packing, finite, flags, numbered, similar_anchors, strings
from proxmo_jax.estimator.words import Vocabulary, WordCounts


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
    """One task group as rolled out: `M` attempts at the same task, `T` turns each, `U` distinct anchor observations.

    reward        float [M, T]   environment reward of the turn
    mask          bool  [M, T]   turns that happened; everything else is padding and changes nothing
    success       bool  [M]      the trajectory solved its task
    action_valid  bool  [M, T]   the turn's action was well formed
    anchor        int32 [M, T]   the turn's anchor observation: equal numbers, equal text (`hard`); or None
    embedding     float [M, T, D] unit vectors of the anchor observations, or zeros (`soft`); or [U, D], those of the
                                 distinct observations, whose rows `anchor` names: the same, and cheaper; or None
    comparable    bool  []       False if no text of the whole batch has a feature (no proximity then); None: True
    words         ids, counts [U, K]  word counts of the distinct observations, whose rows `anchor` names; TF-IDF
                                 makes the embedding of them (`batch_advantages`); or None
    anchored_by   what `from_steps` numbered the anchors by: "equal texts", "similar texts"; None: the caller's own

    A batch of groups is the same with a leading axis `[G, ...]` (`words.alphabetical` [V] has none).
    """

    reward: Any
    mask: Any
    success: Any
    action_valid: Any
    anchor: Any = None
    embedding: Any = None
    comparable: Any = None
    words: WordCounts | None = None
    anchored_by: str | None = static(None)

    @classmethod
    def from_steps(
        cls, *, group, trajectory, step, reward, success, action_valid, texts=None, anchor=None, embedding=None,
        vocabulary: Vocabulary | None = None, similarity_threshold: float | None = None,
        max_features: int | None = None,
    ) -> "tuple[Group, Packing]":  # fmt: skip
        """Pack `N` ragged steps of many groups, on the host, into a batch `[G, M, T]`, and say where each step lies.

        `packing.unpack(answer.joint)` brings answers back into the steps' order. Numbers of words and of distinct
        texts are padded to powers of two.

        Args:
            group, trajectory: [N] ids, ints or strings.
            step: [N] numbers or times that order the turns of a trajectory.
            reward: [N]. success: bool [N], the same on all steps of a trajectory. action_valid: bool [N].
            texts: N strings that steps are compared by, counted with `vocabulary` (kept between batches, it counts a
                text once). In their place, of the caller's own: anchor [N] ids and embedding [N, D].
            similarity_threshold: anchors are shared by texts that are at least this similar (`similar_anchors`) and
                not by equal ones only; `gigpo_similarity` needs it. There are no word counts then.
            max_features: that of the settings; it keeps the arrays narrow if a text has more different words, of
                which TF-IDF would drop the others.

        Raises:
            UserError: it names the array and the row: see `Packing`; rewards that are not finite in float32; a
                trajectory whose steps disagree on success; anchors beside texts.
        """
        packing = Packing(group, trajectory, step)
        words, anchored_by = None, None
        if texts is not None:
            if anchor is not None:
                raise UserError("anchor: texts number their own anchors; give one of the two")
            texts = strings(texts, "texts")
            if similarity_threshold is not None:
                anchored_by, anchor = "similar texts", similar_anchors(texts, packing.index[0], similarity_threshold)
            else:
                anchored_by, vocabulary = "equal texts", vocabulary or Vocabulary()
                numbers = vocabulary.rows(texts)
                row, table = packing.distinct(numbers, "texts")
                words = (vocabulary if max_features is None else vocabulary.cut(numbers, max_features)).gather(table)
        elif similarity_threshold is not None:
            raise UserError("similarity_threshold: there are no texts; need them to number anchors by")
        if anchor is not None:  # renumbered, as ids may be larger than int32
            row, _ = packing.distinct(numbered(anchor, "anchor")[0], "anchor")
        batch = cls(
            reward=packing.pack(finite(reward, "reward"), "reward"),
            mask=packing.pack(np.ones(len(packing), bool)),
            success=packing.pack_trajectories(flags(success, "success"), "success"),
            action_valid=packing.pack(flags(action_valid, "action_valid"), "action_valid"),
            anchor=None if texts is None and anchor is None else packing.pack(row),
            embedding=None if embedding is None else packing.pack(finite(embedding, "embedding", 2), "embedding"),
            words=words,
            anchored_by=anchored_by,
        )
        return batch, packing


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
    """The knobs of the estimator. Plain numbers are leaves (`vmap` over them to sweep), choices are static.

    Numbers outside of `RANGES` and unknown choices raise UserError; arrays are taken as they are.

    discount          gamma of the returns (spec: 0.95)
    invalid_penalty   c, taken from episode and step scores of a turn whose action is invalid (0.1)
    alpha             exponent of the success-rate modulation (4), > 0
    modulation_range  the modulation weight lies in [1 - range, 1 + range] (0.05); 0 switches it off
    temperature       tau of the proximity softmax (0.1), > 0; towards 0 only equal vectors count
    step_weight       omega, the share of the step advantage in the joint one (1)
    epsilon           added to standard deviations (1e-6); with 0, equal scores still give 0

    aggregation       "none" (GRPO), "hard" (GiGPO: equal anchor ids), "similar" (the same, but anchors that are known
                      to stand for equal texts are refused), "soft" (ProxMO: proximity-weighted)
    episode_std       divide the episode advantage by the group's unbiased standard deviation
    step_std          the same for the step advantage; "hard" and "similar" only
    episode_over      what the episode statistics are taken over: "steps" (long trajectories weigh more,
                      as the official code does) or "trajectories"
    leave_one_out     the episode baseline leaves the sample itself out (RLOO)
    success_rate      "trajectories": successes / attempts, as in the paper; "official": the official code's
                      mean penalised score over steps, clamped to [0, 1], success where the score exceeds 0.5
    lone_step         the episode advantage where there is nothing to compare with (one step, or one trajectory under
                      `episode_over="trajectories"`): "zero"; "official": the score itself, as in the official code
    exclude_self      leave the step itself out of its soft baseline
    kernel            how soft baselines are summed up: "dense" (all pairs of a group at once), "blockwise" (memory flat
                      in turns) or "pallas" (the same as a TPU kernel)
    max_features      words TF-IDF keeps (1024)
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
    lone_step: str = static("zero")
    exclude_self: bool = static(False)
    kernel: str = static("dense")
    max_features: int = static(1024)

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
    """Every combination of the values of some numeric knobs, the last named changing fastest: leaves float32 [N].

    `jax.vmap(advantages, (None, 0))(group, sweep(proxmo(), temperature=[0.05, 0.1], step_weight=[0, 1]))` estimates
    under all four. Raises UserError for a name that is no numeric knob and for values outside of `RANGES`.
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
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _number(name: str, value: Any) -> None:
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
    """What the estimator answers for one group; every array is 0 on padding.

    returns       float32 [M, T]  discounted return of the turn
    success_rate  float32 []      p of the group, by the rule of the settings
    modulation    float32 [M, T]  weight of the episode advantage
    episode       float32 [M, T]  modulated episode advantage
    step          float32 [M, T]  step advantage
    joint         float32 [M, T]  episode + omega * step: what every response token of the turn gets
    proximity     float32 [M * T, M * T]  weights of the soft baseline, if they were asked for; else None
    """

    returns: Any
    success_rate: Any
    modulation: Any
    episode: Any
    step: Any
    joint: Any
    proximity: Any = None


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `values` where `mask`, over all axes, in two passes; 0 for an empty mask.

    The second pass removes the rounding of the first: with nearly equal scores one pass was off by 4e-2 of
    their spread.
    """
    count = jnp.maximum(mask.sum(), 1).astype(jnp.float32)
    mean = jnp.where(mask, values, 0.0).sum() / count
    return mean + jnp.where(mask, values - mean, 0.0).sum() / count


def masked_std(deviation: jax.Array, mask: jax.Array) -> jax.Array:
    """Unbiased standard deviation of values, given less their mean, where `mask`; 0 for fewer than two.

    Relative to the largest: squares of large values are not infinite, those of small ones not 0.
    """
    deviation = jnp.where(mask, deviation, 0.0)
    peak = jnp.abs(deviation).max()
    square = jnp.square(deviation / positive(peak)).sum()
    return peak * jnp.sqrt(square / jnp.maximum(mask.sum() - 1, 1).astype(jnp.float32))


def positive(scale: jax.Array) -> jax.Array:
    """What to divide by: the scale, or 1 where it is 0."""
    return jnp.where(scale > 0, scale, 1.0)
