"""Truncated importance sampling: what the sampler and the trainer compute differently, taken into account."""

import dataclasses

import jax
import jax.numpy as jnp

from proxmo_jax.training.losses import token_mean
from proxmo_jax.training.rows import Rows


def importance_weights(trainer: jax.Array, sampler: jax.Array, cap: float) -> jax.Array:
    """Token-level truncated importance weights: min(pi_trainer / pi_sampler, cap).

    Source: "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (Yao et al., 2025); verl's
    `tis_imp_ratio_cap`, token-level `rollout_is` since.

    Args:
        trainer: float32 [...], the trainer's log-probs of the sampled tokens, under the parameters of the rollout.
        sampler: float32 [...], the sampler's.
        cap: the largest weight, above 0.

    Returns:
        float32 [...].
    """
    return jnp.minimum(jnp.exp(jnp.clip(trainer - sampler, -20.0, 20.0)), cap)


def weighted(rows: Rows, sampler: jax.Array, cap: float) -> tuple[Rows, dict[str, jax.Array]]:
    """Multiply the surrogate of each token by its importance weight, without a gradient through the weight.

    The clipped surrogate with dual clip is homogeneous in the advantage: c >= 0 times the advantage is c times the
    surrogate. So the weight goes onto the advantage; KL and entropy have none, as in verl.

    Args:
        rows: packed rows [B, L]; their `old_log_probs` are the trainer's.
        sampler: float32 [B, A], the sampler's log-probs.
        cap: the largest weight, above 0.

    Returns:
        The rows; token means of the weight and of whether it is truncated, float32 [].
    """
    weight = importance_weights(rows.old_log_probs, sampler, cap)
    truncated = rows.old_log_probs - sampler > jnp.log(cap)
    means = {
        "importance_weight": token_mean(weight, rows.mask),
        "importance_truncated": token_mean(truncated.astype(jnp.float32), rows.mask),
    }
    return dataclasses.replace(rows, advantage=jnp.where(rows.mask, weight * rows.advantage, 0.0)), means
