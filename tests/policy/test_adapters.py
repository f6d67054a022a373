"""Adapters alone are learned, and a policy with them merged in is the same policy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from close import EPS, roundings
from flax.traverse_util import flatten_dict
from fresh import fresh
from test_sharding import CONFIG as PLAIN
from test_sharding import rows

from proxmo_jax.policy import adapters
from proxmo_jax.policy.decoder import LOGICAL_AXES, parameter_shapes
from proxmo_jax.policy.sharding import make_mesh, parameter_shardings
from proxmo_jax.training.losses import LossSettings
from proxmo_jax.training.update import TrainState, make_optimizer, policy_step, row_log_probs

CONFIG = dataclasses.replace(PLAIN, lora_rank=3, lora_alpha=6.0, qkv_bias=True, qk_norm=False)
TERMS = roundings(CONFIG, 24)
LINEAR = ("query", "key", "value", "output", "gate", "up", "down")


def log_probs(params, config):
    return row_log_probs((params,), rows(), jnp.float32(1.0), config=config)[0]


def test_every_linear_layer_has_adapters_and_fresh_ones_change_nothing():
    params = fresh(CONFIG)
    frozen, learned = adapters.split(params)
    assert set(learned["layers"]) == {f"{name}_lora_{side}" for name in LINEAR for side in "ab"}
    assert jax.tree.structure(adapters.join(frozen, learned)) == jax.tree.structure(params)
    plain = dataclasses.replace(CONFIG, lora_rank=0)
    assert not any(x.any() for path, x in flatten_dict(learned).items() if path[-2].endswith("_lora_b"))
    np.testing.assert_allclose(log_probs(params, CONFIG), log_probs(frozen, plain), rtol=0, atol=2 * TERMS * EPS)
    assert jax.tree.structure(frozen) == jax.tree.structure(parameter_shapes(plain))


def test_without_adapters_everything_is_learned():
    frozen, learned = adapters.split(parameter_shapes(PLAIN))
    assert frozen == {}
    assert jax.tree.structure(learned) == jax.tree.structure(parameter_shapes(PLAIN))


def test_a_step_moves_adapters_alone_and_merging_changes_nothing():
    params = fresh(CONFIG)
    frozen, learned = adapters.split(params)
    optimizer = make_optimizer(1e-2, 0.0, 1.0, warmup=0)
    own = jax.tree.map(jnp.copy, learned)
    state = TrainState(own, optimizer.init(own))
    for _ in range(3):
        state, _ = policy_step(
            state, rows(), jnp.float32(1.0), 1.0, frozen, config=CONFIG, optimizer=optimizer, settings=LossSettings(),
            micro_batches=2,
        )  # fmt: skip
    assert jax.tree.structure(state.params) == jax.tree.structure(learned)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(state.params))
    trained = adapters.join(frozen, state.params)
    before, after = log_probs(params, CONFIG), log_probs(trained, CONFIG)
    assert float(jnp.abs(after - before).max()) > 0.1
    merged = adapters.merge(trained, CONFIG.lora_alpha / CONFIG.lora_rank)
    assert jax.tree.structure(merged) == jax.tree.structure(frozen)
    found = log_probs(merged, dataclasses.replace(CONFIG, lora_rank=0))
    np.testing.assert_allclose(found, after, rtol=0, atol=2 * TERMS * EPS)
    layer, delta = trained["layers"], 0.0
    for rank in range(3):  # one weight of one layer, by hand
        delta += 2.0 * layer["output_lora_a"]["kernel"][1, 5, 2, rank] * layer["output_lora_b"]["kernel"][1, rank, 7]
    found = merged["layers"]["output"]["kernel"][1, 5, 2, 7] - layer["output"]["kernel"][1, 5, 2, 7]
    np.testing.assert_allclose(found, delta, rtol=1e-3, atol=1e-6)


def test_adapters_have_a_place_on_the_mesh():
    placed = parameter_shardings(make_mesh(2, 2, 2), CONFIG)
    assert placed["layers"]["query_lora_b"]["kernel"].shard_shape((3, 3, 8, 8)) == (3, 3, 4, 8)
    names = {f"layers/{name}_lora_{side}/kernel" for name in LINEAR for side in "ab"}
    assert names <= set(LOGICAL_AXES)
