"""Episode advantages scaled by the entropy of responses (EMPG, arXiv 2509.09265), over a whole batch."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from proxmo_jax.estimator.states import at_next
from proxmo_jax.estimator.types import Advantages, Batch, Settings


def modulate(result: Advantages, batch: Batch, settings: Settings, axis_name: str | None) -> Advantages:
    """The advantages by EMPG's rule: A g(H_t) + zeta f(H_{t+1}), less its mean over the batch; A is the episode part.

    With h the entropies of the batch's steps, scaled to [0, 1]: g = exp(-k h) over its mean, and f = exp(-k_f h). A
    trajectory's last step gets no bonus. Equal entropies: h = 0.

    Args:
        result: `Advantages` [G, M, T].
        batch: with `entropy` [G, M, T].
        settings: entropy_scale, clarity_scale, clarity_bonus and episode_weight are used.
        axis_name: mapped axis over which the statistics are taken.

    Returns:
        The result with another `joint`, and the part clarity: f.
    """
    assert batch.entropy is not None
    mask = batch.mask
    entropy = batch.entropy.astype(jnp.float32)

    def over_devices(reduce, value):
        return reduce(value, axis_name) if axis_name else value

    def mean(values):
        total = over_devices(jax.lax.psum, jnp.where(mask, values, 0.0).sum())
        return total / over_devices(jax.lax.psum, jnp.maximum(mask.sum(), 0).astype(jnp.float32)).clip(1.0)

    low = over_devices(jax.lax.pmin, jnp.where(mask, entropy, jnp.inf).min())
    high = over_devices(jax.lax.pmax, jnp.where(mask, entropy, -jnp.inf).max())
    low, high = (jnp.where(jnp.isfinite(x), x, 0.0) for x in (low, high))
    h = jnp.where(mask, (entropy - low) / (high - low + TINY), 0.0)
    scale = jnp.exp(-settings.entropy_scale * h)
    scale = scale / (mean(scale) + TINY)
    clarity = jnp.where(mask, jnp.exp(-settings.clarity_scale * h), 0.0)
    following = jax.vmap(at_next)(clarity, mask, jnp.zeros_like(clarity[..., 0]))
    joint = result.joint + settings.episode_weight * (scale - 1.0) * result.episode
    joint = joint + settings.clarity_bonus * following
    centre = mean(joint)
    centre = centre + mean(joint - centre)
    return replace(result, joint=jnp.where(mask, joint - centre, 0.0), parts={**result.parts, "clarity": clarity})


TINY = 1e-8  # added to divisors, as in public code
