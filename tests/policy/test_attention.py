"""The splash kernel (interpreted here) against masked attention on packed rows."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import fresh
from tpu_compiler import compile_for_tpu

from proxmo_jax.policy import attention
from proxmo_jax.policy.decoder import PolicyConfig, causal_attention
from proxmo_jax.policy.sharding import make_mesh, parameter_shardings, split
from proxmo_jax.training.rows import Rows
from proxmo_jax.training.update import row_log_probs, row_logits

DENSE = PolicyConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    num_hidden_layers=2, initializer_range=0.2,
)  # fmt: skip
SPLASH = dataclasses.replace(DENSE, attention="splash")


def packed(count=4, length=256) -> Rows:
    """Rows of three turns and padding, borders inside and between the kernel's blocks."""
    rng = np.random.default_rng(0)
    turns = (70, 58, 100)
    segments = np.repeat([np.repeat([1, 2, 3, 0], [*turns, length - sum(turns)])], count, 0).astype(np.int32)
    positions = np.repeat([np.concatenate([np.arange(n) for n in (*turns, length - sum(turns))])], count, 0)
    places = np.repeat([[5, 60, 69, 71, 127, 128, 200, 227]], count, 0).astype(np.int32)
    like = np.zeros(places.shape, np.float32)
    return Rows(
        tokens=rng.integers(0, 64, (count, length)).astype(np.int32), positions=positions.astype(np.int32),
        segments=segments, places=places, targets=rng.integers(0, 64, places.shape).astype(np.int32),
        mask=like == 0, advantage=like, old_log_probs=like, reference=like, turn_tokens=places * 0 + 8,
    )  # fmt: skip


def test_values_and_gradients_are_those_of_masked_attention():
    params, rows = fresh(DENSE), packed()
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 64)), jnp.float32)
    found = {}
    for config in (DENSE, SPLASH):
        value = jax.jit(jax.value_and_grad(lambda p, c=config: (weight * row_logits(p, rows, c)).sum()))
        found[config.attention] = jax.device_get(value(params))
    np.testing.assert_allclose(found["splash"][0], found["dense"][0], rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max()),
        found["splash"][1], found["dense"][1],
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_rows_and_heads_are_split_over_devices(shape):
    alone = row_log_probs((fresh(DENSE),), packed(8), jnp.float32(1.0), config=DENSE)[0]
    mesh = make_mesh(*shape)
    params = jax.device_put(fresh(DENSE), parameter_shardings(mesh, DENSE))
    with jax.set_mesh(mesh):
        found = row_log_probs((params,), split(mesh, packed(8)), jnp.float32(1.0), config=SPLASH)[0]
    np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [3, 64, 65, 160, 611])
def test_attention_in_parts_is_attention(length):
    rng = np.random.default_rng(length)
    query, key, value = (rng.normal(size=(2, length, heads, 16)).astype(np.float32) for heads in (4, 2, 2))
    segments = np.sort(rng.integers(0, 4, (2, length)), axis=1)
    mask = (segments[:, :, None] == segments[:, None, :]) & np.tril(np.ones((length, length), bool))
    expected = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])
    np.testing.assert_allclose(causal_attention(query, key, value, mask), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [20, 96, 200])
def test_prompts_attend_causally_and_not_to_padding(length):
    """Blocks, the TPU's kernel (interpreted) and what is given to cuDNN, against masked attention."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(3, length, heads, 16)).astype(np.float32) for heads in (4, 2, 2))
    start = np.array([0, 7, length - 1], np.int32)
    places = np.arange(length)
    real = places >= start[:, None]
    mask = real[:, None, :] & (places <= places[:, None])
    expected = np.asarray(jax.nn.dot_product_attention(query, key, value, mask=mask[:, None]))
    kernels = {
        "blocks": partial(attention.blockwise, block=16),
        "one block": attention.prompt_attention,
        "cudnn": partial(attention.cudnn, implementation="xla"),
    }
    if length == 200:
        kernels["splash"] = attention._splash_prompts
    for name, kernel in kernels.items():
        found = np.asarray(kernel(query, key, value, start))
        np.testing.assert_allclose(found[real], expected[real], rtol=1e-5, atol=1e-5, err_msg=name)
        assert np.isfinite(found).all(), name


def test_a_gpu_takes_cudnn_where_it_has_a_kernel(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention, "cudnn", lambda query, *others: "cudnn")
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, **by_platform: "blocks")

    def taken(head_dim, dtype):
        shape = [jnp.zeros((1, 512, heads, head_dim), dtype) for heads in (2, 1, 1)]
        return attention.prompt_attention(*shape, jnp.zeros(1, jnp.int32))

    assert taken(128, jnp.bfloat16) == "cudnn"
    assert taken(128, jnp.float32) == taken(256, jnp.bfloat16) == taken(12, jnp.bfloat16) == "blocks"


def test_a_long_rollout_fits_a_tpu():
    """Sampling on a 2 x 2 slice: dense scores of a prompt alone would take 1 GiB a row."""
    program = """
import jax, jax.numpy as jnp
from functools import partial
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from proxmo_jax.policy.decoder import PolicyConfig, parameter_shapes
from proxmo_jax.policy.decoding import decoding_params, sample
from proxmo_jax.policy.sampling import Decoding
from proxmo_jax.policy.sharding import RULES, make_mesh, parameter_shardings
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = make_mesh(1, 2, 2, devices=devices)
config = PolicyConfig(
    vocab_size=512, hidden_size=256, num_attention_heads=4, head_dim=64, num_hidden_layers=6, dtype="bfloat16",
)
like = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
params = jax.tree.map(like, parameter_shapes(config), parameter_shardings(mesh, config))
made = jax.jit(partial(decoding_params, config=config, mesh=mesh)).lower(params).compile()
shapes = jax.eval_shape(partial(decoding_params, config=config, mesh=mesh), params)
params = jax.tree.map(like, shapes, made.output_shardings)
rows, whole = NamedSharding(mesh, PartitionSpec(RULES["batch"])), NamedSharding(mesh, PartitionSpec())
key = like(jax.eval_shape(lambda: jax.random.key(0)), whole)
arguments = (
    params, jax.ShapeDtypeStruct((16, 8192), jnp.int32, sharding=rows),
    jax.ShapeDtypeStruct((16,), jnp.int32, sharding=rows), key, jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),
)
options = {"config": config, "decoding": Decoding(64, (1,)), "mesh": mesh}
program = sample.lower(*arguments, **options).compile()
assert "tpu_custom_call" in program.as_text()
cache = 2 * 6 * 16 * 2 * 64 * 8256 * 2 / 4
temporaries = program.memory_analysis().temp_size_in_bytes
assert temporaries < 3 * cache + 2**27, (temporaries, cache)
print("compiled")
"""
    compile_for_tpu(program)


def test_compiles_for_a_tpu():
    """The train step of a 2 x 2 slice; libtpu is a compiler, no device is needed."""
    program = """
import sys, jax, numpy as np
sys.path.insert(0, "tests")
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from test_attention import packed
from proxmo_jax.training.update import TrainState, make_optimizer, policy_step
from proxmo_jax.training.losses import LossSettings
from proxmo_jax.policy.decoder import PolicyConfig, parameter_shapes
from proxmo_jax.policy.sharding import RULES, make_mesh, parameter_shardings
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = make_mesh(1, 2, 2, devices=devices)
optimizer = make_optimizer(1e-3, 0.0, 1.0, warmup=1)
for head_dim in (64, 128):
    temporaries = []
    for attention in ("dense", "splash"):
        config = PolicyConfig(
            vocab_size=512, hidden_size=256, num_attention_heads=4, head_dim=head_dim, num_hidden_layers=6,
            dtype="bfloat16", remat="full", attention=attention,
        )
        like = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        params = jax.tree.map(like, parameter_shapes(config), parameter_shardings(mesh, config))
        rows = jax.tree.map(lambda x: like(x, NamedSharding(mesh, PartitionSpec(RULES["batch"]))), packed(4, 4096))
        with jax.set_mesh(mesh):
            step = policy_step.lower(
                TrainState(params, jax.eval_shape(optimizer.init, params)), rows, 1.0, config=config,
                optimizer=optimizer, settings=LossSettings(),
            ).compile()
        assert ("tpu_custom_call" in step.as_text()) == (attention == "splash"), attention
        temporaries.append(step.memory_analysis().temp_size_in_bytes)
    assert temporaries[1] < temporaries[0] / 2, temporaries
print("compiled")
"""
    compile_for_tpu(program)


@pytest.mark.parametrize(
    ("named", "row_length", "tpu", "kind"),
    [
        ("auto", 4096, True, "splash"), ("auto", 4000, True, "dense"), ("auto", 4096, False, "dense"),
        ("splash", 4096, False, "splash"), ("dense", 4096, True, "dense"),
    ],
)  # fmt: skip
def test_auto_is_splash_on_tpus_for_rows_that_fit_its_blocks(named, row_length, tpu, kind):
    assert attention.attention_kind(named, row_length, tpu) == kind
