"""Adapters alone are learned, and a policy with them merged in is the same policy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from test_sharding import CONFIG as PLAIN
from test_sharding import rows

from proxmo_jax import adapters
from proxmo_jax.learner import TrainState, make_optimizer, policy_step, row_log_probs
from proxmo_jax.losses import LossSettings
from proxmo_jax.policy import LOGICAL_AXES, init_params
from proxmo_jax.sharding import make_mesh, parameter_shardings

CONFIG = dataclasses.replace(PLAIN, lora_rank=3, lora_alpha=6.0, qkv_bias=True, qk_norm=False)
PARAMS = init_params(CONFIG, jax.random.key(0))
LINEAR = ("query", "key", "value", "output", "gate", "up", "down")


def log_probs(params, config):
    return row_log_probs((params,), rows(), jnp.float32(1.0), config=config)[0]


def test_every_linear_layer_has_adapters_and_fresh_ones_change_nothing():
    frozen, learned = adapters.split(PARAMS)
    assert set(learned["layers"]) == {f"{name}_lora_{side}" for name in LINEAR for side in "ab"}
    assert jax.tree.structure(adapters.join(frozen, learned)) == jax.tree.structure(PARAMS)
    plain = dataclasses.replace(CONFIG, lora_rank=0)
    np.testing.assert_array_equal(log_probs(PARAMS, CONFIG), log_probs(frozen, plain))
    assert jax.tree.structure(frozen) == jax.tree.structure(init_params(plain, jax.random.key(0)))


def test_without_adapters_everything_is_learned():
    frozen, learned = adapters.split(init_params(PLAIN, jax.random.key(0)))
    assert frozen == {}
    assert jax.tree.structure(learned) == jax.tree.structure(init_params(PLAIN, jax.random.key(0)))


def test_a_step_moves_adapters_alone_and_merging_changes_nothing():
    frozen, learned = adapters.split(PARAMS)
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
    before, after = log_probs(PARAMS, CONFIG), log_probs(trained, CONFIG)
    assert float(jnp.abs(after - before).max()) > 0.1
    merged = adapters.merge(trained, CONFIG.lora_alpha / CONFIG.lora_rank)
    assert jax.tree.structure(merged) == jax.tree.structure(frozen)
    np.testing.assert_allclose(log_probs(merged, dataclasses.replace(CONFIG, lora_rank=0)), after, rtol=1e-4, atol=1e-4)
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
