"""The estimator's public door: `advantages(group, settings)` for one group; `jax.vmap` it over the batch.

    batched = jax.vmap(advantages, in_axes=(0, None))            # [G, M, T] in, [G, M, T] out
    swept = jax.vmap(batched, in_axes=(None, 0))                 # and over settings

Source: ProxMO (arXiv 2602.19225); where the official code departs from the paper the paper is the default.
"""

import jax
import jax.numpy as jnp

from proxmo_jax.errors import UserError
from proxmo_jax.estimator.proximity import hard_advantage, proximity_weights, soft_advantage
from proxmo_jax.estimator.types import Advantages, Group, Settings, masked_mean, masked_std, positive


def discounted_returns(reward: jax.Array, mask: jax.Array, discount: jax.Array | float) -> jax.Array:
    """G_t = r_t + gamma * G_{t+1} inside each trajectory. reward, mask [M, T] -> [M, T] float32, 0 on padding."""

    def back(following, turn):
        r, happened = turn
        value = jnp.where(happened, r + discount * following, following)
        return value, jnp.where(happened, value, 0.0)

    start = jnp.zeros_like(reward[:, 0], dtype=jnp.float32)
    _, returns = jax.lax.scan(back, start, (reward.T.astype(jnp.float32), mask.T), reverse=True)
    return returns.T


def modulation_weight(
    success_rate: jax.Array, success: jax.Array, *, alpha: jax.Array | float, modulation_range: jax.Array | float
) -> jax.Array:
    """Success-rate-aware modulation: how much an outcome says, given how hard the task is for this policy.

    success: w = 1 + beta (s((1-p)^alpha) - 1/2); failure: w = 1 + beta (s(-p^alpha) - 1/2), s the sigmoid,
    beta = range / (s(1) - 1/2), so w lies in [1 - range, 1 + range]: a rare success is amplified, a failure in
    a mostly solved group attenuated. success_rate [] in [0, 1], success bool [...] -> [...] float32.
    """
    beta = modulation_range / (jax.nn.sigmoid(1.0) - 0.5)
    won = jax.nn.sigmoid((1.0 - success_rate) ** alpha)
    lost = jax.nn.sigmoid(-(success_rate**alpha))
    return 1.0 + beta * (jnp.where(success, won, lost) - 0.5)


def group_success_rate(group: Group) -> jax.Array:
    """p = successful trajectories / trajectories with at least one turn. -> [] float32."""
    attempted = group.mask.any(axis=1)
    wins = (group.success & attempted).sum().astype(jnp.float32)
    return wins / jnp.maximum(attempted.sum(), 1).astype(jnp.float32)


def episode_advantage(score: jax.Array, mask: jax.Array, settings: Settings) -> jax.Array:
    """S_i - mean(S) over the group; optionally / (unbiased std + epsilon), or leaving S_i out of the mean.

    score, mask [M, T] -> [M, T] float32. A group of one sample gets 0, or by the settings the score (mean 0, std 1).
    """
    if settings.episode_over == "trajectories":
        # A trajectory's steps differ by the penalty alone; the official code takes the first one's score for it.
        sample = jnp.take_along_axis(score, jnp.argmax(mask, axis=1)[:, None], axis=1)[:, 0]
        counted = mask.any(axis=1)
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
    """Q_i minus the baseline of comparable steps, by the settings' aggregation. score [M, T] -> [M, T] float32."""
    if settings.aggregation == "none":
        return jnp.zeros_like(score)
    flat, mask = score.reshape(-1), group.mask.reshape(-1)
    if settings.aggregation in ("hard", "similar"):
        anchor = group.anchor.reshape(-1)
        step = hard_advantage(flat, anchor, mask, std=settings.step_std, epsilon=settings.epsilon)
    else:
        embedding, row = _step_embedding(group)
        step = soft_advantage(
            flat, embedding, mask, temperature=settings.temperature, exclude_self=settings.exclude_self, row=row,
            kernel=settings.kernel,
        )  # fmt: skip
        if group.comparable is not None:
            step = jnp.where(group.comparable, step, 0.0)
    return step.reshape(score.shape)


def _step_embedding(group: Group) -> tuple[jax.Array, jax.Array | None]:
    """Unit vectors [N, D] of the steps and no row; or [U, D] of distinct observations and each step's row."""
    if jnp.ndim(group.embedding) == 3:
        return group.embedding.reshape(-1, group.embedding.shape[-1]), None
    return group.embedding, group.anchor.reshape(-1)


def advantages(group: Group, settings: Settings, *, with_proximity: bool = False) -> Advantages:
    """Everything the estimator knows of one group (spec: 'The estimator', steps 1 to 6).

    Scores: S_i = episode return - c (1 - valid_i), Q_i = discounted return - c (1 - valid_i). Then the episode
    advantage of S, modulated; the step advantage of Q; joint = episode + omega * step. Gradients are stopped:
    an advantage is data to the policy loss. `with_proximity` also returns the weights of the soft baseline
    [M * T, M * T]. Raises ValueError for arrays of the wrong rank (a missing vmap), masks that are not bool and an
    aggregation whose input (anchor, embedding) is absent; UserError for "similar" on anchors of equal texts.
    """
    _check(group, settings)
    group, settings = jax.lax.stop_gradient((group, settings))
    mask = group.mask
    reward = jnp.where(mask, group.reward, 0.0).astype(jnp.float32)
    penalty = settings.invalid_penalty * (1.0 - group.action_valid.astype(jnp.float32))
    returns = discounted_returns(reward, mask, settings.discount)
    episode_score = jnp.where(mask, reward.sum(axis=1, keepdims=True) - penalty, 0.0)
    step_score = jnp.where(mask, returns - penalty, 0.0)

    if settings.success_rate == "official":
        # The official code reads p off its table of group means, which holds 0 for a group of one step.
        success_rate = jnp.where(mask.sum() > 1, jnp.clip(masked_mean(episode_score, mask), 0.0, 1.0), 0.0)
        success = episode_score > 0.5
    else:
        success_rate = group_success_rate(group)
        success = jnp.broadcast_to(group.success[:, None], mask.shape)
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


def _check(group: Group, settings: Settings) -> None:
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
            hint = "batch_advantages() makes it of the word counts"
        got = "nothing" if embedding is None else f"shape {embedding}"
        raise ValueError(f"embedding: got {got}, need {(*shape, 'D')}, or (U, 'D') of distinct observations; {hint}")
