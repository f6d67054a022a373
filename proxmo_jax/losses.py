"""The policy loss on token rows: PPO clip with dual clip, KL to the reference, entropy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def clipped_surrogate(
    log_ratio: jax.Array, advantage: jax.Array, *, clip: float = 0.2, dual_clip: float = 3.0
) -> jax.Array:
    """PPO-clip per token: max(-A r, -A clip(r, 1 - e, 1 + e)); where A < 0 at most -A c (dual clip).

    log_ratio = log pi - log pi_old and advantage, same shape -> loss of that shape. Sources: arXiv 1707.06347,
    1912.09729 (dual clip, c > 1).
    """
    # exp of a padding token's garbage must not become inf * 0 = nan in the gradient
    ratio = jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))
    loss = jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1.0 - clip, 1.0 + clip))
    return jnp.where(advantage < 0, jnp.minimum(loss, -advantage * dual_clip), loss)


def low_var_kl(log_prob: jax.Array, reference: jax.Array) -> jax.Array:
    """k3 of Schulman: exp(d) - d - 1, d = log ref - log pi (clamped to +-20), the result clamped to +-10 per token."""
    difference = jnp.clip(reference - log_prob, -20.0, 20.0)
    return jnp.clip(jnp.exp(difference) - difference - 1.0, -10.0, 10.0)


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
    """The loss and what a person wants to see of it; float32 scalars."""

    loss: jax.Array
    policy: jax.Array
    kl: jax.Array
    entropy: jax.Array
    clip_fraction: jax.Array
    approx_kl: jax.Array


def policy_loss(
    logits: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    advantage: jax.Array,
    old: jax.Array,
    reference: jax.Array,
    total: jax.Array | None = None,
    *,
    clip: float,
    dual_clip: float,
    kl_weight: float,
    entropy_weight: float,
) -> PolicyLoss:
    """Token mean of [surrogate + kl_weight * KL - entropy_weight * entropy] over the response tokens.

    logits [..., V]; the others [...]: sampled tokens, response mask, advantage, log-probs at rollout and of the
    reference. `total` as in `token_mean`.
    """
    log_prob, entropy = token_log_probs(logits, tokens)
    log_ratio = jnp.where(mask, log_prob - old, 0.0)
    policy = token_mean(clipped_surrogate(log_ratio, advantage, clip=clip, dual_clip=dual_clip), mask, total)
    kl = token_mean(low_var_kl(log_prob, jnp.where(mask, reference, log_prob)), mask, total)
    entropy = token_mean(entropy, mask, total)
    return PolicyLoss(
        loss=policy + kl_weight * kl - entropy_weight * entropy,
        policy=policy,
        kl=kl,
        entropy=entropy,
        clip_fraction=token_mean((jnp.abs(jnp.expm1(log_ratio)) > clip).astype(jnp.float32), mask, total),
        approx_kl=token_mean(-log_ratio, mask, total),
    )
