import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tpu_compiler import compile_for_tpu

from proxmo_jax.estimator.pallas_kernel import pallas
from proxmo_jax.estimator.partial_sums import blockwise, dense
from proxmo_jax.estimator.proximity import hard_advantage, proximity_weights, soft_advantage


def steps(seed: int, count: int, texts: int, features: int = 5):
    """Scores, a vector per distinct observation (the last is empty), each step's observation, and a mask."""
    rng = np.random.default_rng(seed)
    unit = rng.random((texts, features))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    unit[-1] = 0
    row = rng.integers(0, texts, count)
    score = rng.normal(size=count) * 5
    return (np.asarray(x, np.float32) for x in (score, unit)), row, rng.random(count) < 0.8


def loops(score, vectors, mask, temperature, exclude_self):
    """Plain float64 loops."""
    score, vectors = score.astype(np.float64), vectors.astype(np.float64)
    answer = np.zeros(len(score))
    for i in np.flatnonzero(mask):
        others = [j for j in np.flatnonzero(mask) if j != i or not exclude_self]
        if others:
            logits = np.array([vectors[i] @ vectors[j] for j in others]) / temperature
            weight = np.exp(logits - logits.max())
            answer[i] = score[i] - weight @ score[others] / weight.sum()
    return answer


SOFT = jax.jit(soft_advantage, static_argnames=("exclude_self", "kernel"))


@given(
    st.integers(0, 999), st.sampled_from([1, 2, 29]), st.sampled_from([1, 8]), st.sampled_from([0.003, 0.1, 50.0]),
    st.booleans(), st.sampled_from(["dense", "blockwise"]),
)  # fmt: skip
def test_distinct_observations_and_steps_agree_with_loops(seed, count, texts, temperature, exclude_self, kernel):
    (score, unit), row, mask = steps(seed, count, texts)
    knobs = {"temperature": temperature, "exclude_self": exclude_self, "kernel": kernel}
    wanted = loops(score, unit[row], mask, temperature, exclude_self)
    each = SOFT(score, jnp.asarray(unit[row]), mask, **knobs)
    distinct = SOFT(score, jnp.asarray(unit), mask, row=jnp.asarray(row), **knobs)
    np.testing.assert_allclose(each, wanted, atol=2e-4, rtol=1e-4)
    np.testing.assert_allclose(distinct, wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("skip_own", [False, True])
@pytest.mark.parametrize("kernel", [blockwise, pallas])
def test_kernels_agree_with_the_dense_one(kernel, skip_own):
    """Several blocks, sizes that do not divide, keys that count for nothing, a query whose only key is itself."""
    (_, unit), _, _ = steps(3, 1, 300, features=40)
    rng = np.random.default_rng(0)
    count = rng.integers(0, 4, 300).astype(np.float32)
    score = (rng.normal(size=300) * count).astype(np.float32)
    for size in (1, 129, 300):
        arguments = [jnp.asarray(x[:size]) for x in (unit, unit, count, score)]
        wanted = dense(*arguments, 0.1, skip_own=skip_own)
        got = kernel(*arguments, 0.1, skip_own=skip_own)
        np.testing.assert_allclose(got.peak, wanted.peak, atol=1e-5)
        np.testing.assert_allclose(got.weight, wanted.weight, rtol=1e-5, atol=1e-5)
        has = np.asarray(wanted.weight) > 0
        baseline = [np.asarray(x.score)[has] / np.asarray(x.weight)[has] for x in (got, wanted)]
        np.testing.assert_allclose(*baseline, rtol=1e-5, atol=1e-5)


def test_blockwise_memory_is_flat_in_turns_squared():
    """Temporaries of the compiled program: dense holds the square, blockwise a line."""

    def temporaries(kernel, count):
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((count, 64), (count,), (count,))]

        def run(unit, weight, score):
            return kernel(unit, unit, weight, score, 0.1, skip_own=False)

        return jax.jit(run).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(blockwise, 1024), temporaries(blockwise, 4096)
    assert large < 6 * small
    assert temporaries(dense, 4096) > 10 * temporaries(dense, 1024)
    assert large < temporaries(dense, 4096) / 10


MATCHED = jax.jit(hard_advantage, static_argnames="std")


@given(st.integers(0, 999), st.booleans(), st.sampled_from([1.0, 1e-20, 1e15]))
def test_exact_matching_agrees_with_loops(seed, std, size):
    """Anchors are any int32, the extremes too; scores of very different sizes stand in one group."""
    rng = np.random.default_rng(seed)
    ids = np.array([-(2**31), 2**31 - 1, 0, -1, 7], np.int32)
    count = 40
    anchor, mask = rng.choice(ids, count), rng.random(count) < rng.random()
    score = (rng.normal(size=count) * np.where(anchor == 7, size, 1.0)).astype(np.float32)
    wanted, scale = np.zeros(count), np.ones(count)
    for i in np.flatnonzero(mask):
        same = score[mask & (anchor == anchor[i])].astype(np.float64)
        if len(same) > 1:
            wanted[i] = score[i] - same.mean()
            scale[i] = same.std(ddof=1) if std else np.abs(same).max()
            wanted[i] /= scale[i]
    found = np.asarray(MATCHED(score, anchor, mask, std=std, epsilon=0.0), np.float64)
    np.testing.assert_allclose(found if std else found / scale, wanted, atol=1e-4 if std else 1e-6)


def test_exact_matching_grows_with_the_steps():
    """Temporaries of the compiled program, in a batch as well: four times the steps, about four times the memory."""

    def temporaries(count):
        kinds = (jnp.float32, jnp.int32, jnp.bool_)
        arguments = [jax.ShapeDtypeStruct((3, count), kind) for kind in kinds]
        run = jax.jit(jax.vmap(lambda *steps: hard_advantage(*steps, std=True)))
        return run.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16_384) < 6 * temporaries(4096) < 6 * 4096 * 3 * 100


def test_the_kernel_maps_over_groups():
    (score, unit), row, mask = steps(1, 20, 6)
    batch = [jnp.stack([jnp.asarray(x)] * 3) for x in (score, unit[row], mask)]
    run = {
        kernel: jax.vmap(lambda s, e, m, kernel=kernel: soft_advantage(s, e, m, temperature=0.1, kernel=kernel))(*batch)
        for kernel in ("dense", "pallas")
    }
    np.testing.assert_allclose(run["pallas"], run["dense"], atol=1e-5)


@given(st.integers(0, 999), st.booleans())
def test_weights_are_a_distribution_and_give_the_baseline(seed, exclude_self):
    (score, unit), row, mask = steps(seed, 12, 4)
    weight = np.asarray(proximity_weights(unit[row], mask, temperature=0.1, exclude_self=exclude_self))
    assert not weight[:, ~mask].any()
    assert not weight[~mask].any()
    if mask.sum() > exclude_self:
        np.testing.assert_allclose(weight[mask].sum(1), 1, rtol=1e-5)
    step = soft_advantage(score, unit[row], mask, temperature=0.1, exclude_self=exclude_self)
    has = weight.sum(1) > 0
    np.testing.assert_allclose(step, np.where(has, score - weight @ score, 0), atol=1e-4)


def test_compiles_for_a_tpu():
    """The whole estimator on a 2 x 2 slice, with every kernel; libtpu is a compiler, no device is needed."""
    program = """
import jax, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from proxmo_jax import Group, WordCounts, proxmo
from proxmo_jax.estimator.batch import sharded_advantages
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
like = jax.ShapeDtypeStruct
shape = (16, 8, 50)
words = WordCounts(like((16, 256, 64), np.int32), like((16, 256, 64), np.float32), like((2048,), np.int32))
group = Group(
    reward=like(shape, np.float32), mask=like(shape, bool), success=like(shape[:2], bool),
    action_valid=like(shape, bool), anchor=like(shape, np.int32), words=words,
)
for kernel in ("dense", "blockwise", "pallas"):
    for exclude_self in (False, True):
        settings = proxmo(kernel=kernel, exclude_self=exclude_self)
        text = sharded_advantages.lower(group, settings, mesh=mesh).compile().as_text()
        assert ("tpu_custom_call" in text) == (kernel == "pallas"), kernel
        assert "all-reduce" in text
print("compiled")
"""
    compile_for_tpu(program)
