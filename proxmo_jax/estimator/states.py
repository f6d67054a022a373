"""Values of states, and the step scores that are made of them (GAGPO, G2PO) and of distances (GraphGPO).

The state of a step is its observation. Its value is a mean over the group's visits to the same state (hard, similar)
or over all steps by proximity (soft). docs/method.md has the equations.
"""

from typing import Any

import jax
import jax.numpy as jnp

from proxmo_jax.estimator.proximity import NOISE, hard_advantage, hard_mean, places, soft_advantage, soft_mean
from proxmo_jax.estimator.types import Array, Group, Settings, masked_mean, masked_std, positive


def discounted_returns(reward: Array, mask: Array, discount: jax.Array | float) -> jax.Array:
    """Discounted returns within each trajectory: G_t = r_t + gamma * G_{t+1}.

    Args:
        reward: float [M, T].
        mask: bool [M, T], turns that happened.
        discount: gamma.

    Returns:
        float32 [M, T], 0 on padding.
    """

    def step_back(following, turn):
        r, happened = turn
        value = jnp.where(happened, r + discount * following, following)
        return value, jnp.where(happened, value, 0.0)

    start = jnp.zeros_like(reward[:, 0], dtype=jnp.float32)
    _, returns = jax.lax.scan(step_back, start, (reward.T.astype(jnp.float32), mask.T), reverse=True)
    return returns.T


def next_turn(mask: Array) -> jax.Array:
    """Index of the next turn that happened: int32 [M, T], T after the last one."""
    turns = mask.shape[1]
    at = jnp.where(mask, jnp.arange(turns), turns)
    return jnp.pad(jax.lax.cummin(at, axis=1, reverse=True)[:, 1:], ((0, 0), (0, 1)), constant_values=turns)


def previous_turn(mask: Array) -> jax.Array:
    """Index of the last turn that happened before: int32 [M, T], -1 before the first one."""
    at = jnp.where(mask, jnp.arange(mask.shape[1]), -1)
    return jnp.pad(jax.lax.cummax(at, axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1)


def at_next(values: Array, mask: Array, end: Array) -> jax.Array:
    """Values [M, T] of each turn's next turn, and `end` [M] after the last one."""
    after = next_turn(mask)
    found = jnp.take_along_axis(values, jnp.minimum(after, values.shape[1] - 1), axis=1)
    return jnp.where(after < values.shape[1], found, end[:, None])


def state_vectors(group: Group) -> tuple[Array, Array | None]:
    """(step vectors [N, D], None), or (vectors of distinct observations [U, D], each step's index [N])."""
    assert group.embedding is not None  # `advantages` checks its input
    if group.embedding.ndim == 3:
        return group.embedding.reshape(-1, group.embedding.shape[-1]), None
    assert group.anchor is not None
    return group.embedding, group.anchor.reshape(-1)


def _how(settings: Settings) -> dict:
    """The arguments of the soft mean."""
    return {
        "temperature": settings.temperature, "exclude_self": settings.exclude_self, "kernel": settings.kernel,
    }  # fmt: skip


def state_values(values: Array, group: Group, settings: Settings) -> jax.Array:
    """Mean of the values of comparable steps, by the aggregation of the settings.

    Args:
        values: float32 [M, T], of the visits.
        group: the group.
        settings: aggregation, temperature, exclude_self and kernel are used.

    Returns:
        float32 [M, T], 0 on padding; the visit's own value where nothing is comparable.
    """
    flat, mask = values.reshape(-1), group.mask.reshape(-1)
    if settings.aggregation == "soft":
        vectors, row = state_vectors(group)
        mean, found = soft_mean(flat, vectors, mask, row=row, **_how(settings))
        if group.comparable is not None:
            found &= group.comparable
        mean = jnp.where(found, mean, flat)
    else:
        assert group.anchor is not None
        mean, _ = hard_mean(flat, places(group.anchor.reshape(-1)), mask)
    return jnp.where(mask, mean, 0.0).reshape(values.shape)


def compared(score: Array, group: Group, settings: Settings) -> jax.Array:
    """Scores less the baseline of comparable steps, by the aggregation of the settings.

    Args:
        score: float32 [M, T], step scores Q.
        group: the group, with `anchor` or `embedding` as the aggregation needs.
        settings: aggregation, step_std, biased_std, epsilon, temperature, exclude_self and kernel are used.

    Returns:
        float32 [M, T], 0 on padding.
    """
    flat, mask = score.reshape(-1), group.mask.reshape(-1)
    std: dict[str, Any] = {"std": settings.step_std, "epsilon": settings.epsilon}
    if settings.aggregation == "soft":
        vectors, row = state_vectors(group)
        step = soft_advantage(flat, vectors, mask, row=row, **std, **_how(settings))
        if group.comparable is not None:
            step = jnp.where(group.comparable, step, 0.0)
    else:
        assert group.anchor is not None
        step = hard_advantage(flat, group.anchor.reshape(-1), mask, biased=settings.biased_std, **std)
    return step.reshape(score.shape)


def compared_in_group(score: Array, mask: Array, settings: Settings, size: jax.Array) -> jax.Array:
    """Scores less their mean over all steps of the group, over the unbiased standard deviation with step_std.

    Args:
        score: float32 [M, T].
        mask: bool [M, T].
        settings: step_std and epsilon are used.
        size: float32 [], the largest of the numbers whose differences the scores are; beside it, scores that differ
            by rounding errors are equal.

    Returns:
        float32 [M, T]; 0 on padding and for a lone step.
    """
    deviation = jnp.where(mask & (mask.sum() > 1), score - masked_mean(score, mask), 0.0)
    deviation = jnp.where(jnp.abs(deviation) > 2 * NOISE * size, deviation, 0.0)
    if settings.step_std:
        deviation = deviation / positive(masked_std(deviation, mask) + settings.epsilon)
    return deviation


def residual_part(
    reward: Array, returns: Array, penalty: Array, group: Group, settings: Settings, values: Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Step advantage of GAGPO (arXiv 2605.13217): generalised advantage estimation over values of states.

    V(s) is the mean discounted return of the visits to s, delta_t = r_t + gamma V(s_{t+1}) - V(s_t) with 0 after the
    last step, A_t = delta_t + gamma lambda A_{t+1}, and the result is A over the group: less its mean, over its std.

    Args:
        reward, returns, penalty: float32 [M, T].
        group: the group.
        settings: of the estimator.
        values: float32 [M, T], values of the states; None: from this group.

    Returns:
        float32 [M, T], and its parts.
    """
    mask = group.mask
    values = state_values(returns, group, settings) if values is None else jnp.asarray(values)
    following = at_next(values, mask, jnp.zeros_like(values[:, 0]))
    delta = jnp.where(mask, reward + settings.discount * following - values, 0.0)
    residual = discounted_returns(delta, mask, settings.discount * settings.lam)
    parts = {"state_value": values, "raw_advantage": residual}
    score = jnp.where(mask, residual - penalty, 0.0)
    if not settings.standardize:
        return score, parts
    size = jnp.maximum(jnp.abs(values).max(), jnp.where(mask, jnp.abs(reward), 0.0).max())
    flat = masked_std(score - masked_mean(score, mask), mask) < ZERO_STD
    return jnp.where(flat, 0.0, compared_in_group(score, mask, settings, size)), parts


ZERO_STD = 1e-6  # a group whose residuals vary less has no step advantage


def gain_part(
    total: Array, penalty: Array, group: Group, settings: Settings
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """Scores of G2PO (arXiv 2606.22995): a visit at turn t of T is worth gamma^(T - t) R, a state their mean.

    The value after a step is that of the next observation; after the last step it is success_reward if the return is
    exactly that, else 0. The edge part is the gain of the value over the state's own, compared with the whole group.

    Args:
        total: float32 [M], episode returns R.
        penalty: float32 [M, T], of the node part.
        group: the group.
        settings: of the estimator.

    Returns:
        The node part's scores float32 [M, T], parts, and the edge part float32 [M, T].
    """
    mask = group.mask
    left = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1].astype(jnp.float32)
    worth = jnp.where(mask, settings.discount**left * total[:, None], 0.0)
    value = state_values(worth, group, settings)
    end = jnp.where(total == settings.success_reward, settings.success_reward, 0.0)
    after = jnp.where(mask, at_next(value, mask, end), 0.0)
    size = jnp.maximum(jnp.abs(value).max(), jnp.abs(after).max())
    edge = compared_in_group(jnp.where(mask, after - value, 0.0), mask, settings, size)
    return after - penalty, {"state_value": value, "next_value": after}, edge


def goal_distances(edge: Array, reached: Array, mask: Array) -> tuple[jax.Array, jax.Array]:
    """Fewest actions from each step's observation, and from the one after it, to the goal within the group.

    Each step is an edge of length 1 between observations; the last step of a trajectory that reached the goal leads
    there. A fixed point of d(s) = min over the edges of 1 + d(next), as in Bellman and Ford's algorithm; a round
    follows every trajectory to its end, so that there are as many as the shortest paths change trajectories.

    Args:
        edge: int [M, T, 2], nodes before and after the action, any ids.
        reached: bool [M].
        mask: bool [M, T].

    Returns:
        float32 [M, T] each, 0 on padding. Where the goal cannot be reached: the largest distance + 1, or 1 in a group
        that has no goal.
    """
    shape, node = mask.shape, places(edge.reshape(-1)).reshape(edge.shape)
    here, there = node[..., 0], node[..., 1]
    after = next_turn(mask)
    onwards = jnp.minimum(after, shape[1] - 1)
    linked = (after < shape[1]) & (jnp.take_along_axis(here, onwards, axis=1) == there)
    goal = mask & (after == shape[1]) & reached[:, None]

    def ahead(distance):
        return jnp.where(goal, 0.0, distance[there])

    def along(following, turn):
        length, link, happened = turn
        length = jnp.where(link, jnp.minimum(length, 1.0 + following), length)
        return jnp.where(happened, length, following), length

    def shorten(state):
        _, distance = state
        length = 1.0 + ahead(distance)
        start = jnp.full_like(length[:, 0], jnp.inf)
        _, length = jax.lax.scan(along, start, (length.T, linked.T, mask.T), reverse=True)
        shorter = distance.at[here].min(jnp.where(mask, length.T, jnp.inf))
        return (shorter < distance).any(), shorter

    # Derived from the input, so that it varies over the same mapped axes as the result.
    nothing = jnp.where(edge.reshape(-1) == edge.reshape(-1), jnp.inf, 0.0).astype(jnp.float32)
    _, distance = jax.lax.while_loop(lambda state: state[0], shorten, (mask.any(), nothing))
    far = jnp.where(jnp.isfinite(distance), distance, 0.0).max() + 1.0

    def whole(length):
        return jnp.where(mask, jnp.where(jnp.isfinite(length), length, far), 0.0)

    return whole(distance[here]), whole(ahead(distance))


def path_part(total: Array, penalty: Array, group: Group, settings: Settings) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Scores of GraphGPO (arXiv 2605.26684): the success reward, discounted by the distance to the goal.

    r gamma^(d(next) + 1) as in the paper, r gamma^d(next) (path "official"), or r gamma^(d(next) - d(here) + 1)
    ("progress"). A trajectory with a return above 0 ends at the goal.

    Args:
        total: float32 [M], episode returns.
        penalty: float32 [M, T].
        group: the group, with `edge`.
        settings: of the estimator.

    Returns:
        float32 [M, T], and its parts.
    """
    assert group.edge is not None
    here, there = goal_distances(group.edge, total > 0, group.mask)
    power = {"paper": there + 1.0, "official": there, "progress": there - here + 1.0}[settings.path]
    gain = jnp.where(group.mask, settings.success_reward * settings.discount**power, 0.0)
    return gain - penalty, {"distance": here, "next_distance": there, "graph_return": gain}
