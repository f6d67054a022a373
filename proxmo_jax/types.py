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
from proxmo_jax.packing import Packing, finite, flags
from proxmo_jax.words import Vocabulary, WordCounts


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

    @classmethod
    def from_steps(
        cls, *, group, trajectory, step, reward, success, action_valid, texts=None, anchor=None, embedding=None,
        vocabulary: Vocabulary | None = None,
    ) -> "tuple[Group, Packing]":  # fmt: skip
        """Pack `N` ragged steps of many groups, on the host, into a batch `[G, M, T]`, and say where each step lies.

        group, trajectory [N] ids (ints or strings), step [N] sortable; reward [N]; success bool [N], the same on all
        steps of a trajectory; action_valid bool [N]. What steps are compared by: N texts, counted with `vocabulary`
        (kept between batches, it counts a text once), or of the caller's own: anchor int [N] and embedding [N, D].
        `packing.unpack(answer.joint)` brings answers back into the steps' order. Numbers of words and of distinct
        texts are padded to powers of two.
        Raises UserError naming the array: see `Packing`; rewards that are not finite; a trajectory whose steps
        disagree on success; anchors beside texts.
        """
        packing = Packing(group, trajectory, step)
        words = None
        if texts is not None:
            if anchor is not None:
                raise UserError("anchor: texts number their own anchors; give one of the two")
            vocabulary = vocabulary or Vocabulary()
            anchor, table = packing.distinct(vocabulary.rows(texts), "texts")
            words = vocabulary.gather(table)
        batch = cls(
            reward=packing.pack(finite(reward, "reward"), "reward"),
            mask=packing.pack(np.ones(len(packing), bool)),
            success=packing.pack_trajectories(flags(success, "success"), "success"),
            action_valid=packing.pack(flags(action_valid, "action_valid"), "action_valid"),
            anchor=None if anchor is None else packing.pack(np.asarray(anchor, np.int32), "anchor"),
            embedding=None if embedding is None else packing.pack(finite(embedding, "embedding"), "embedding"),
            words=words,
        )
        return batch, packing


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
    kernel            how soft baselines are summed up: "dense" (all pairs of a group at once), "blockwise" (memory flat
                      in turns) or "pallas" (the same as a TPU kernel)
    max_features      words TF-IDF keeps (1024)
    similarity_threshold  steps whose texts are at least this similar (difflib ratio) share an anchor; None: equal
                      texts. Read where anchors are numbered (`similar_anchors`), before arrays exist
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
    kernel: str = static("dense")
    max_features: int = static(1024)
    similarity_threshold: float | None = static(None)

    def __post_init__(self):
        _choice("kernel", self.kernel, ("dense", "blockwise", "pallas"))
        _choice("aggregation", self.aggregation, ("none", "hard", "soft"))
        _choice("episode_over", self.episode_over, ("steps", "trajectories"))
        _choice("success_rate", self.success_rate, ("trajectories", "official"))
        if self.step_std and self.aggregation == "soft":
            raise UserError('step_std: the soft baseline has no standard deviation; use aggregation="hard"')
        if isinstance(self.temperature, (int, float)) and not self.temperature > 0:
            raise UserError(f"temperature must be > 0, got {self.temperature}")
        threshold = self.similarity_threshold
        if threshold is not None and not 0 < threshold <= 1:
            raise UserError(f"similarity_threshold must be above 0 and at most 1, got {threshold}")


def sweep(settings: Settings, **values: Any) -> Settings:
    """Every combination of the values of some numeric knobs, the last named changing fastest: leaves float32 [N].

    `jax.vmap(advantages, (None, 0))(group, sweep(proxmo(), temperature=[0.05, 0.1], step_weight=[0, 1]))` estimates
    under all four. Raises UserError for a name that is no numeric knob.
    """
    knobs = [f.name for f in dataclasses.fields(Settings) if not f.metadata.get("static")]
    for name in values:
        if name not in knobs:
            raise UserError(f"sweep: {name} is no numeric knob; need one of {', '.join(knobs)}")
    grids = np.meshgrid(*(np.asarray(v, np.float32) for v in values.values()), indexing="ij")
    swept: dict[str, Any] = {name: grid.reshape(-1) for name, grid in zip(values, grids, strict=True)}
    size = len(next(iter(swept.values()))) if swept else 1
    for name in knobs:
        swept.setdefault(name, np.full(size, getattr(settings, name), np.float32))
    return dataclasses.replace(settings, **swept)


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


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
