"""The estimator of one group: `advantages(group, settings)`. `jax.vmap` extends it to a batch.

    batched = jax.vmap(advantages, in_axes=(0, None))            # [G, M, T] -> [G, M, T]
    swept = jax.vmap(batched, in_axes=(None, 0))                 # and over settings

Source: ProxMO (arXiv 2602.19225). Where the official code differs from the paper, the paper is the default
(docs/method.md).
"""

import jax
import jax.numpy as jnp

from proxmo_jax.errors import UserError
from proxmo_jax.estimator.proximity import hard_advantage, proximity_weights, soft_advantage
from proxmo_jax.estimator.types import Advantages, Array, Group, Settings, masked_mean, masked_std, positive


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


def modulation_weight(
    success_rate: Array, success: Array, *, alpha: jax.Array | float, modulation_range: jax.Array | float
) -> jax.Array:
    """Success-rate-aware modulation (ProxMO, arXiv 2602.19225).

    With s the sigmoid and beta = range / (s(1) - 1/2), a success weighs 1 + beta (s((1-p)^alpha) - 1/2) and a failure
    1 + beta (s(-p^alpha) - 1/2), so that weights lie in [1 - range, 1 + range]. A success in a group that mostly fails
    is amplified; a failure in a group that mostly succeeds is attenuated.

    Args:
        success_rate: float [], p in [0, 1].
        success: bool [...].
        alpha: exponent, above 0.
        modulation_range: largest distance of a weight from 1.

    Returns:
        float32 [...], of the shape of `success`.
    """
    beta = modulation_range / (jax.nn.sigmoid(1.0) - 0.5)
    won = jax.nn.sigmoid((1.0 - success_rate) ** alpha)
    lost = jax.nn.sigmoid(-(success_rate**alpha))
    return 1.0 + beta * (jnp.where(success, won, lost) - 0.5)


def group_success_rate(group: Group) -> jax.Array:
    """p = successful trajectories / trajectories with at least one turn.

    Args:
        group: success [M], mask [M, T].

    Returns:
        float32 [].
    """
    attempted = group.mask.any(axis=1)
    wins = (group.success & attempted).sum().astype(jnp.float32)
    return wins / jnp.maximum(attempted.sum(), 1).astype(jnp.float32)


def episode_advantage(score: jax.Array, mask: Array, settings: Settings) -> jax.Array:
    """S_i minus the mean of S over the group, with the variants of the settings.

    `episode_std` divides by the unbiased standard deviation + epsilon, `leave_one_out` leaves S_i out of the mean.

    Args:
        score: float32 [M, T], episode scores S.
        mask: bool [M, T].
        settings: episode_over, episode_std, leave_one_out, lone_step and epsilon are used.

    Returns:
        float32 [M, T], 0 on padding. A group with a single sample gets 0, or its score under lone_step "official".
    """
    if settings.episode_over == "trajectories":
        # The scores of a trajectory's steps differ only by the penalty; the official code uses that of the first step.
        sample = jnp.take_along_axis(score, jnp.argmax(mask, axis=1)[:, None], axis=1)[:, 0]
        counted: Array = jnp.any(mask, axis=1)
    else:
        sample, counted = score, mask
    count = counted.sum().astype(jnp.float32)
    alone = count <= 1
    mean = masked_mean(sample, counted)
    advantage = score - mean
    if settings.leave_one_out:
        advantage = advantage * (count / jnp.maximum(count - 1.0, 1.0))
    if settings.episode_std:
        advantage = advantage / positive(masked_std(sample - mean, counted) + settings.epsilon)
    lone = jnp.zeros_like(score)
    if settings.lone_step == "official":
        lone = score / (1.0 + settings.epsilon) if settings.episode_std else score
    return jnp.where(mask, jnp.where(alone, lone, advantage), 0.0)


def step_advantage(score: jax.Array, group: Group, settings: Settings) -> jax.Array:
    """Q_i minus the baseline of comparable steps, by the aggregation of the settings.

    Args:
        score: float32 [M, T], step scores Q.
        group: the group, with `anchor` or `embedding` as the aggregation needs.
        settings: aggregation, step_std, epsilon, temperature, exclude_self and kernel are used.

    Returns:
        float32 [M, T], 0 on padding.
    """
    if settings.aggregation == "none":
        return jnp.zeros_like(score)
    flat, mask = score.reshape(-1), group.mask.reshape(-1)
    if settings.aggregation in ("hard", "similar"):
        assert group.anchor is not None  # `advantages` checks its input
        step = hard_advantage(flat, group.anchor.reshape(-1), mask, std=settings.step_std, epsilon=settings.epsilon)
    else:
        embedding, row = _step_embedding(group)
        step = soft_advantage(
            flat, embedding, mask, temperature=settings.temperature, exclude_self=settings.exclude_self, row=row,
            kernel=settings.kernel,
        )  # fmt: skip
        if group.comparable is not None:
            step = jnp.where(group.comparable, step, 0.0)
    return step.reshape(score.shape)


def _step_embedding(group: Group) -> tuple[Array, Array | None]:
    """(step vectors [N, D], None), or (vectors of distinct observations [U, D], each step's index [N])."""
    assert group.embedding is not None  # `advantages` checks its input
    if group.embedding.ndim == 3:
        return group.embedding.reshape(-1, group.embedding.shape[-1]), None
    assert group.anchor is not None
    return group.embedding, group.anchor.reshape(-1)


def advantages(group: Group, settings: Settings, *, with_proximity: bool = False) -> Advantages:
    """Compute the advantages of one group (ProxMO, arXiv 2602.19225; equations in docs/method.md).

    Scores are S_i = episode return - c (1 - valid_i) and Q_i = discounted return - c (1 - valid_i). The episode
    advantage of S is modulated, and joint = episode + omega * step, with the step advantage of Q. Gradients are
    stopped.

    Args:
        group: arrays [M, T] as in `Group`.
        settings: of the estimator.
        with_proximity: also return the weights of the soft baseline, [M * T, M * T].

    Returns:
        `Advantages`.

    Raises:
        ValueError: for arrays of the wrong rank (a missing vmap), masks that are not bool, and an aggregation without
            its input (anchor, embedding).
        UserError: for aggregation "similar" with anchors of equal texts.
    """
    _check(group, settings)
    group, settings = jax.lax.stop_gradient((group, settings))
    mask = group.mask
    reward = jnp.where(mask, group.reward, 0.0).astype(jnp.float32)
    penalty = settings.invalid_penalty * (1.0 - group.action_valid.astype(jnp.float32))
    returns = discounted_returns(reward, mask, settings.discount)
    episode_score = jnp.where(mask, reward.sum(axis=1, keepdims=True) - penalty, 0.0)
    step_score = jnp.where(mask, returns - penalty, 0.0)

    success_rate, success = _success(group, episode_score, settings)
    weight = modulation_weight(success_rate, success, alpha=settings.alpha, modulation_range=settings.modulation_range)
    weight = jnp.where(mask, weight, 0.0)

    episode = weight * episode_advantage(episode_score, mask, settings)
    step = step_advantage(step_score, group, settings)
    proximity = None
    if with_proximity and settings.aggregation == "soft":
        embedding, row = _step_embedding(group)
        proximity = proximity_weights(
            embedding if row is None else embedding[row], mask.reshape(-1),
            temperature=settings.temperature, exclude_self=settings.exclude_self,
        )  # fmt: skip
    return Advantages(
        returns=returns,
        success_rate=success_rate,
        modulation=weight,
        episode=episode,
        step=step,
        joint=episode + settings.step_weight * step,
        proximity=proximity,
    )


def _success(group: Group, score: jax.Array, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """(success rate [], success of each turn [M, T]) by the rule of the settings; score [M, T] is the episode score."""
    mask = group.mask
    if settings.success_rate == "official":
        # The official code takes p from its group means, which are 0 for a group with a single step.
        rate = jnp.where(mask.sum() > 1, jnp.clip(masked_mean(score, mask), 0.0, 1.0), 0.0)
        return rate, score > 0.5
    return group_success_rate(group), jnp.broadcast_to(group.success[:, None], mask.shape)


def _check(group: Group, settings: Settings) -> None:
    """Raise as `advantages` does for a group that does not fit the settings."""
    hint = "advantages() takes ONE group; use jax.vmap(advantages, (0, None)) for a batch of groups"
    shape = jnp.shape(group.reward)
    if len(shape) != 2:
        raise ValueError(f"reward: got shape {shape}, need [member, turn]; {hint}")
    needed: dict[str, tuple] = {"mask": shape, "action_valid": shape, "success": shape[:1]}
    embedding = None if group.embedding is None else jnp.shape(group.embedding)
    distinct = embedding is not None and len(embedding) == 2
    if settings.aggregation in ("hard", "similar") or (settings.aggregation == "soft" and distinct):
        needed["anchor"] = shape
    if settings.aggregation == "similar" and group.anchored_by == "equal texts":
        raise UserError(
            "anchor: numbered by equal texts, gigpo_similarity needs them by similar ones; give a similarity_threshold"
            " to Group.from_steps, or use gigpo"
        )
    for name, want in needed.items():
        value = getattr(group, name)
        if value is None or jnp.shape(value) != want:
            got = "nothing" if value is None else f"shape {jnp.shape(value)}"
            raise ValueError(f"{name}: got {got}, need {want} as reward has; {hint}")
        if name != "anchor" and value.dtype != bool:  # a mask of floats could hold NaN
            raise ValueError(f"{name}: got {value.dtype}, need bool")
    if settings.aggregation == "soft" and not distinct and (embedding is None or embedding[:-1] != shape):
        if embedding is None and group.words is not None:
            hint = "batch_advantages() computes it from the word counts"
        got = "nothing" if embedding is None else f"shape {embedding}"
        raise ValueError(f"embedding: got {got}, need {(*shape, 'D')}, or (U, 'D') of distinct observations; {hint}")
