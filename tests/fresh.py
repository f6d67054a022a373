"""Fresh policies for tests, drawn by one compiled program and kept: drawn eagerly each takes seconds."""

from functools import cache

import jax
import jax.numpy as jnp

from proxmo_jax.policy.decoder import PolicyConfig, init_params


@cache
def _drawn(config: PolicyConfig, seed: int):
    return jax.device_get(jax.jit(init_params, static_argnums=0)(config, jax.random.key(seed)))


def fresh(config: PolicyConfig, seed: int = 0):
    """Parameters of a policy that has learned nothing, the caller's own: they may be donated."""
    return jax.tree.map(jnp.array, _drawn(config, seed))
