"""The policy loss on token rows: PPO clip with dual clip, KL to the reference, entropy."""

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
    """PPO-clip per token: max(-A r, -A clip(r, 1 - clip, 1 + clip_high)); where A < 0 at most -A c (dual clip).

    log_ratio = log pi - log pi_old and advantage, same shape -> loss of that shape. `clip_high` None is `clip`.
    Sources: arXiv 1707.06347, 1912.09729 (dual clip, c > 1), 2503.14476 (the two ends apart).
    """
    # exp of a padding token's garbage must not become inf * 0 = nan in the gradient
    ratio = jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))
    high = 1.0 + (clip if clip_high is None else clip_high)
    loss = jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1.0 - clip, high))
    return jnp.where(advantage < 0, jnp.minimum(loss, -advantage * dual_clip), loss)


def was_clipped(surrogate: jax.Array, log_ratio: jax.Array, advantage: jax.Array) -> jax.Array:
    """1.0 where the clip, not the ratio, made the surrogate, so that the token has no gradient."""
    return (surrogate > -advantage * jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))).astype(jnp.float32)


def low_var_kl(log_prob: jax.Array, reference: jax.Array) -> jax.Array:
    """k3 of Schulman: exp(d) - d - 1, d = log ref - log pi (clamped to +-20), the result clamped to +-10 per token."""
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
    """What each response token weighs, so that sum(weight * value) is the mini-batch's loss, however it is cut up.

    mask bool, turn_tokens (response tokens of the token's turn), same shape. With N tokens in M turns:
    token_mean 1 / N; turn_mean_token_sum 1 / M; turn_mean_token_mean 1 / (M tokens of the turn); turn_sum_over_length
    1 / `length`, the longest response. Source: verl's loss_agg_mode, where turns are sequences.
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
    """Log-prob of `tokens` [...] under `logits` [..., V], and the entropy of each distribution; float32."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    # A masked sum fuses with its gradient; the gradient of a gather is a scatter, slow on every device.
    chosen = jnp.where(jnp.arange(logits.shape[-1]) == tokens[..., None], log_probs, 0.0).sum(-1)
    return chosen, -(jnp.exp(log_probs) * log_probs).sum(-1)


def token_mean(values: jax.Array, mask: jax.Array, total: jax.Array | None = None) -> jax.Array:
    """Mean over the tokens under the mask (0 if there are none): every token weighs the same.

    `total` is the token count of the whole mini-batch when `values` is one of its micro-batches, whose means then
    add up to the global one.
    """
    count = jnp.maximum(mask.sum() if total is None else total, 1).astype(jnp.float32)
    return jnp.where(mask, values, 0.0).sum() / count


class PolicyLoss(NamedTuple):
    """The loss and what a person wants to see of it; float32 scalars.

    clip_fraction, approx_kl and gap (mean |log ratio|) are token means: at the first step after a rollout the ratio is
    between trainer and sampler at the same parameters, and the gap is what the two disagree by.
    """

    loss: jax.Array
    policy: jax.Array
    kl: jax.Array
    entropy: jax.Array
    clip_fraction: jax.Array
    approx_kl: jax.Array
    gap: jax.Array


@dataclass(frozen=True)
class LossSettings:
    """The loss's constants; published values are the defaults. `kl` is of `KL`, `aggregation` of `AGGREGATIONS`.

    longest_response: tokens, for the aggregation that divides by it.
    """

    clip: float = 0.2
    clip_high: float | None = None
    dual_clip: float = 3.0
    kl_weight: float = 0.01
    entropy_weight: float = 0.001
    kl: str = "low_var_kl"
    aggregation: str = "token_mean"
    longest_response: int = 1


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
) -> PolicyLoss:
    """Sum of weight * [surrogate + kl_weight * KL - entropy_weight * entropy] over the response tokens.

    logits [..., V]; the others [...]: sampled tokens, response mask, advantage, log-probs at rollout and of the
    reference; `weight` as from `token_weights` (default: the token mean). `total` as in `token_mean`.
    """
    log_prob, entropy = token_log_probs(logits, tokens)
    log_ratio = jnp.where(mask, log_prob - old, 0.0)
    if weight is None:
        weight = token_weights(mask, mask, "token_mean", 1)

    def summed(values: jax.Array) -> jax.Array:
        return (weight * jnp.where(mask, values, 0.0)).sum()

    surrogate = clipped_surrogate(
        log_ratio, advantage, clip=settings.clip, clip_high=settings.clip_high, dual_clip=settings.dual_clip
    )
    policy = summed(surrogate)
    kl = summed(KL[settings.kl](log_prob, jnp.where(mask, reference, log_prob)))
    entropy = summed(entropy)
    return PolicyLoss(
        loss=policy + settings.kl_weight * kl - settings.entropy_weight * entropy,
        policy=policy,
        kl=kl,
        entropy=entropy,
        clip_fraction=token_mean(was_clipped(surrogate, log_ratio, advantage), mask, total),
        approx_kl=token_mean(-log_ratio, mask, total),
        gap=token_mean(jnp.abs(log_ratio), mask, total),
    )
