"""The policy loss on response tokens: PPO clip with dual clip, KL to the reference, entropy."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


def clipped_surrogate(
    log_ratio: jax.Array,
    advantage: jax.Array,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float = 3.0,
) -> jax.Array:
    """Clipped surrogate per token (PPO, arXiv 1707.06347) with dual clip (arXiv 1912.09729).

    max(-A r, -A clip(r, 1 - clip, 1 + clip_high)), and at most -A c where A < 0. Separate clip bounds: DAPO, arXiv
    2503.14476.

    Args:
        log_ratio: float32 [...], log pi - log pi_old.
        advantage: float32 [...].
        clip: lower clip range.
        clip_high: upper clip range; None: as `clip`.
        dual_clip: c, above 1.

    Returns:
        float32 [...].
    """
    # exp of a padding token must not become inf * 0 = nan in the gradient
    ratio = jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))
    high = 1.0 + (clip if clip_high is None else clip_high)
    loss = jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1.0 - clip, high))
    return jnp.where(advantage < 0, jnp.minimum(loss, -advantage * dual_clip), loss)


def was_clipped(surrogate: jax.Array, log_ratio: jax.Array, advantage: jax.Array) -> jax.Array:
    """Whether the clip removed the gradient of a token.

    Args:
        surrogate: float32 [...], result of `clipped_surrogate`.
        log_ratio: float32 [...].
        advantage: float32 [...].

    Returns:
        float32 [...], 1 or 0.
    """
    return (surrogate > -advantage * jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))).astype(jnp.float32)


def low_var_kl(log_prob: jax.Array, reference: jax.Array) -> jax.Array:
    """Schulman's k3 estimator of the KL divergence: exp(d) - d - 1 with d = log ref - log pi.

    d is clamped to +-20 and the result to +-10.

    Args:
        log_prob: float32 [...], log pi.
        reference: float32 [...], log ref.

    Returns:
        float32 [...].
    """
    difference = jnp.clip(reference - log_prob, -20.0, 20.0)
    return jnp.clip(jnp.exp(difference) - difference - 1.0, -10.0, 10.0)


# Estimators of KL(pi, ref) per token, from log pi and log ref; names as in verl, Schulman's in brackets.
KL = {
    "kl": lambda log_prob, reference: log_prob - reference,  # (k1)
    "abs": lambda log_prob, reference: jnp.abs(log_prob - reference),
    "mse": lambda log_prob, reference: 0.5 * jnp.square(log_prob - reference),  # (k2)
    "low_var_kl": low_var_kl,  # (k3)
}
AGGREGATIONS = ("token_mean", "turn_mean_token_sum", "turn_mean_token_mean", "turn_sum_over_length")


def token_weights(mask: jax.Array, turn_tokens: jax.Array, aggregation: str, length: int) -> jax.Array:
    """Weights of response tokens such that sum(weight * value) is the loss of the mini-batch.

    They do not depend on the number of micro-batches. With N tokens in M turns: token_mean 1 / N; turn_mean_token_sum
    1 / M; turn_mean_token_mean 1 / (M * tokens of the turn); turn_sum_over_length 1 / `length`. Source: verl's
    loss_agg_mode, where turns are sequences.

    Args:
        mask: bool [...].
        turn_tokens: int32 [...], response tokens of the token's turn.
        aggregation: one of `AGGREGATIONS`.
        length: tokens of the longest response.

    Returns:
        float32 [...].
    """
    per_turn = jnp.where(mask, 1.0 / jnp.maximum(turn_tokens, 1), 0.0).astype(jnp.float32)
    turns = jnp.maximum(per_turn.sum(), 1e-6)
    weights: dict[str, Any] = {
        "token_mean": 1.0 / jnp.maximum(mask.sum(), 1).astype(jnp.float32),
        "turn_mean_token_sum": 1.0 / turns,
        "turn_mean_token_mean": per_turn / turns,
        "turn_sum_over_length": 1.0 / length,
    }
    return jnp.where(mask, weights[aggregation], 0.0)


def token_log_probs(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probs of tokens, and the entropy of their distributions.

    Args:
        logits: float [..., V].
        tokens: int [...].

    Returns:
        Log-probs float32 [...], entropy float32 [...].
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    # A masked sum fuses with its gradient; the gradient of a gather is a scatter, which is slow on every device.
    chosen = jnp.where(jnp.arange(logits.shape[-1]) == tokens[..., None], log_probs, 0.0).sum(-1)
    return chosen, -(jnp.exp(log_probs) * log_probs).sum(-1)


def token_mean(values: jax.Array, mask: jax.Array, total: jax.Array | None = None) -> jax.Array:
    """Mean over the tokens under a mask; 0 without tokens.

    Args:
        values: float32 [...].
        mask: bool [...].
        total: tokens of the whole mini-batch if `values` is a micro-batch; the means of micro-batches then sum to the
            mean of the mini-batch.

    Returns:
        float32 [].
    """
    count = jnp.maximum(mask.sum() if total is None else total, 1).astype(jnp.float32)
    return jnp.where(mask, values, 0.0).sum() / count


def turn_mean(values: jax.Array, turn: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the tokens of each token's turn, as the log-ratio of a whole action (GSPO, arXiv 2507.18071; GAGPO).

    Args:
        values: float32 [B, A].
        turn: int32 [B, A].
        mask: bool [B, A].

    Returns:
        float32 [B, A], 0 where the mask is False.
    """
    same = (turn[:, :, None] == turn[:, None, :]) & mask[:, None, :]
    mean = jnp.einsum("bij,bj->bi", same.astype(jnp.float32), values) / jnp.maximum(same.sum(-1), 1)
    return jnp.where(mask, mean, 0.0)


class PolicyLoss(NamedTuple):
    """The loss and its diagnostics, float32 scalars.

    Attributes:
        loss: policy + kl_coef * kl - entropy_coef * entropy.
        policy: weighted sum of the surrogate.
        kl: weighted sum of the KL estimator.
        entropy: weighted sum of the entropy.
        clip_fraction: token mean of `was_clipped`.
        approx_kl: token mean of -log ratio.
        sampler_mismatch: token mean of |log ratio|; in the first step after a rollout, how far sampler and trainer
            are apart.
    """

    loss: jax.Array
    policy: jax.Array
    kl: jax.Array
    entropy: jax.Array
    clip_fraction: jax.Array
    approx_kl: jax.Array
    sampler_mismatch: jax.Array


@dataclass(frozen=True)
class LossSettings:
    """Constants of the loss; the defaults are the published values."""

    clip: float = 0.2
    """Lower clip range of the probability ratio."""
    clip_high: float | None = None
    """Upper clip range; None: as `clip`."""
    dual_clip: float = 3.0
    """Bound c of the dual clip; above 1."""
    kl_coef: float = 0.01
    """Coefficient of the KL term."""
    entropy_coef: float = 0.001
    """Coefficient of the entropy bonus."""
    kl: str = "low_var_kl"
    """Estimator of the KL divergence, one of `KL`."""
    aggregation: str = "token_mean"
    """Weights of tokens and turns in the loss, one of `AGGREGATIONS`."""
    longest_response: int = 1
    """Tokens of the longest response, the divisor of turn_sum_over_length."""
    importance_sampling_level: str = "token"
    """Probability ratio of each token, or of each whole action, normalised by its length (sequence)."""


def policy_loss(
    logits: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    advantage: jax.Array,
    old: jax.Array,
    reference: jax.Array,
    settings: LossSettings,
    *,
    weight: jax.Array | None = None,
    total: jax.Array | None = None,
    turn: jax.Array | None = None,
) -> PolicyLoss:
    """PPO loss of response tokens: sum of weight * (surrogate + kl_coef * KL - entropy_coef * entropy).

    Args:
        logits: float [..., V].
        tokens: int32 [...], sampled tokens.
        mask: bool [...], response tokens.
        advantage: float32 [...].
        old: float32 [...], log-probs at rollout.
        reference: float32 [...], log-probs of the reference policy.
        settings: constants of the loss.
        weight: float32 [...], from `token_weights` (default: the token mean).
        total: as in `token_mean`.
        turn: int32 [B, A], the turn of each token of a row; needed for importance_sampling_level "sequence".

    Returns:
        The loss and its diagnostics.
    """
    log_prob, entropy = token_log_probs(logits, tokens)
    of_token = log_ratio = jnp.where(mask, log_prob - old, 0.0)
    if settings.importance_sampling_level == "sequence":
        assert turn is not None
        log_ratio = turn_mean(log_ratio, turn, mask)
    if weight is None:
        weight = token_weights(mask, mask, "token_mean", 1)

    def weighted_sum(values: jax.Array) -> jax.Array:
        return (weight * jnp.where(mask, values, 0.0)).sum()

    surrogate = clipped_surrogate(
        log_ratio, advantage, clip=settings.clip, clip_high=settings.clip_high, dual_clip=settings.dual_clip
    )
    policy = weighted_sum(surrogate)
    kl = weighted_sum(KL[settings.kl](log_prob, jnp.where(mask, reference, log_prob)))
    entropy = weighted_sum(entropy)
    return PolicyLoss(
        loss=policy + settings.kl_coef * kl - settings.entropy_coef * entropy,
        policy=policy,
        kl=kl,
        entropy=entropy,
        clip_fraction=token_mean(was_clipped(surrogate, log_ratio, advantage), mask, total),
        approx_kl=token_mean(-of_token, mask, total),
        sampler_mismatch=token_mean(jnp.abs(of_token), mask, total),
    )
