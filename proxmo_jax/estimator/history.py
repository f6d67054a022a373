"""Step advantages over histories of observations (HGPO, arXiv 2602.22817)."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from proxmo_jax.estimator.proximity import hard_mean, places
from proxmo_jax.estimator.states import compared, previous_turn, state_vectors
from proxmo_jax.estimator.types import Array, Group, Settings


def history_part(
    score: jax.Array, group: Group, settings: Settings, episode: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted mean of the advantages of steps by their last 1, 2, .. K + 1 observations, with K = history_length.

    A step that has fewer than d observations behind it, its own included, has no advantage of depth d. Depth d weighs
    d^alpha, in a mean over all depths (paper), or (d + 1)^alpha, in a mean over the depths at which the advantage of
    this step is not 0, with epsilon added to the sum of weights (official). With base_group the episode advantage is
    one more, of weight 1.

    Args:
        score: float32 [M, T].
        group: the group.
        settings: of the estimator.
        episode: float32 [M, T], the episode advantage.

    Returns:
        float32 [M, T], and the part level_advantage [M, T, K + 1]: column d - 1 is depth d, NaN where there is none or
        no other step has the same history.
    """
    official = settings.history_weights == "official"
    total, weights, levels = jnp.zeros_like(score), jnp.zeros_like(score), []
    for depth, at in enumerate(_of_depths(group, settings), 1):
        level = compared(score, at, settings)
        levels.append(jnp.where(_has_others(at, settings), level, jnp.nan))
        weight = jnp.float32(depth + official) ** settings.length_weight_alpha
        weights += jnp.where(level != 0, weight, 0.0) if official else weight
        total += weight * level
    if settings.base_group:
        weights += jnp.where(episode != 0, 1.0, 0.0) if official else 1.0
        total += episode
    step = total / jnp.where(weights > 0, weights + (settings.epsilon if official else 0.0), 1.0)
    parts = {"level_advantage": jnp.where(group.mask[..., None], jnp.stack(levels, -1), 0.0)}
    return jnp.where(group.mask, step, 0.0), parts


def _has_others(group: Group, settings: Settings) -> jax.Array:
    """Whether a step has another one to be compared with, bool [M, T]."""
    if settings.aggregation == "soft":
        return jnp.asarray(group.mask) & (group.mask.sum() > 1)
    assert group.anchor is not None
    mask = group.mask.reshape(-1)
    _, count = hard_mean(mask, places(group.anchor.reshape(-1)), mask)
    return (count > 1).reshape(group.mask.shape) & group.mask


def _of_depths(group: Group, settings: Settings):
    """The group as it is compared at depth 1, 2, .. K + 1: steps that have such a history, and what it is."""
    yield group
    before = previous_turn(group.mask)
    soft = settings.aggregation == "soft"
    if soft:
        vectors, row = state_vectors(group)
        own = jnp.asarray(vectors if row is None else vectors[row]).reshape(*group.mask.shape, -1)
    else:
        assert group.anchor is not None
        own = places(group.anchor.reshape(-1)).reshape(group.anchor.shape)
    history, mask = own, group.mask
    for depth in range(2, settings.history_length + 2):
        mask = group.mask & (before >= 0) & _at(mask, before)
        if soft:
            history = jnp.concatenate([own, _at(history, before)], -1)
            yield replace(group, mask=mask, embedding=history / jnp.sqrt(jnp.float32(depth)), anchor=None)
        else:
            history = _numbered_pairs(own, _at(history, before))
            yield replace(group, mask=mask, anchor=history)


def _at(values: Array, turn: Array) -> jax.Array:
    """Values [M, T, ...] of other turns int [M, T]; any for a turn that there is not."""
    index = jnp.maximum(turn, 0).reshape(*turn.shape, *[1] * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1)


def _numbered_pairs(a: jax.Array, b: jax.Array) -> jax.Array:
    """Numbers in [0, N) for N pairs of such numbers, equal for equal pairs; without a product that could overflow."""
    first, second = a.reshape(-1), b.reshape(-1)
    order = jnp.lexsort((second, first))
    first, second = first[order], second[order]
    new = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    number = jnp.cumsum(jnp.pad(new, (1, 0)))
    return jnp.zeros_like(number).at[order].set(number, unique_indices=True).reshape(a.shape)
