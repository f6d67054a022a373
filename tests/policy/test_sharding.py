"""The same losses, gradients and answers however the devices are arranged, and meshes that cannot be."""

import dataclasses
import os
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import EPS, roundings, same_answers, same_gradient
from fresh import fresh
from tpu_compiler import compile_for_tpu

from proxmo_jax.policy.decoder import FEW_LAYERS, PolicyConfig
from proxmo_jax.policy.decoding import decoding_params, sample
from proxmo_jax.policy.sampling import Decoding
from proxmo_jax.policy.sharding import enough_threads, make_mesh, parameter_shardings, place_optimizer, split
from proxmo_jax.training.losses import LossSettings
from proxmo_jax.training.rows import Rows
from proxmo_jax.training.update import TrainState, make_optimizer, policy_step

CONFIG = PolicyConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=8, num_key_value_heads=4, head_dim=8,
    num_hidden_layers=3, initializer_range=0.2, qkv_bias=False, qk_norm=True, tie_word_embeddings=False,
)  # fmt: skip
MANY = dataclasses.replace(CONFIG, num_hidden_layers=FEW_LAYERS + 1)  # the sampler leaves their stacks as they are
RATE, DECAY = 1e-3, 0.01
LONG: dict = {"config": CONFIG, "decoding": Decoding(4, (), greedy=True)}
MESHES = [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 2, 4)]


def rows(count=8, length=24, answers=6) -> Rows:
    rng = np.random.default_rng(0)
    segments = np.repeat([[1] * 10 + [2] * 12 + [0] * 2], count, 0)
    positions = np.repeat([[*range(10), *range(12), 0, 0]], count, 0)
    places = np.repeat([[6, 7, 8, 18, 19, 20]], count, 0)
    return Rows(
        tokens=rng.integers(0, 64, (count, length)), positions=positions, segments=segments, places=places,
        targets=rng.integers(0, 64, (count, answers)), mask=rng.random((count, answers)) < 0.9,
        advantage=rng.normal(size=(count, answers)).astype(np.float32),
        old_log_probs=-rng.random((count, answers)).astype(np.float32) - 3,
        reference=-rng.random((count, answers)).astype(np.float32) - 3, turn_tokens=np.full((count, answers), 3),
    )  # fmt: skip


def learn(mesh, steps=1):
    """(losses, states) of a few updates on a mesh, the state before them first."""
    optimizer = make_optimizer(RATE, DECAY, 1.0, warmup=0)
    shardings = parameter_shardings(mesh, CONFIG)
    params = jax.device_put(fresh(CONFIG), shardings)
    state = TrainState(params, place_optimizer(optimizer, params, shardings))
    batch, losses, states = split(mesh, rows()), [], [jax.device_get(state)]
    for step in range(steps):
        state, loss = policy_step(
            state, batch, jnp.float32(1.0), config=CONFIG, optimizer=optimizer, settings=LossSettings()
        )
        losses.append(float(loss.loss))
        states.append(jax.device_get(state))
        if step == 1:  # the optimiser's counter lay elsewhere before the first
            programs = policy_step._cache_size()
    assert steps < 3 or policy_step._cache_size() == programs  # the new state lies where the old one lay
    spread = state.params["layers"]["gate"]["kernel"].sharding
    assert spread.shard_shape((3, 32, 64)) == (3, 32 // mesh.shape["fsdp"], 64 // mesh.shape["tensor"])
    return losses, states


def moments(state: TrainState):
    """(mu, nu) of Adam."""
    (adam,) = (part for part in state.opt_state if hasattr(part, "mu"))
    return adam.mu, adam.nu


@pytest.fixture(scope="module")
def alone():
    return learn(make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize(("shape", "steps"), zip(MESHES, (1, 3, 1, 1), strict=True))
def test_every_mesh_learns_the_same(alone, shape, steps):
    """The gradient is compared by its norm, as the first moment of the first step has it. Adam divides by the root of
    the second moment: where that is tiny, the parameters of two programs are as far apart as two steps may be, so that
    they say nothing. Their steps are compared with Adam's rule in float64, from the moments that the mesh itself has.
    """
    losses, states = learn(make_mesh(*shape), steps)
    terms = roundings(CONFIG, 24)
    np.testing.assert_allclose(losses[0], alone[0][0], rtol=0, atol=terms * EPS)
    # Backwards there are two products for each one forwards; a weight's gradient is a sum over all tokens.
    same_gradient(moments(states[1])[0], moments(alone[1][1])[0], 3 * terms + 8 * 24)
    for mu, nu in zip(*map(jax.tree.leaves, moments(states[1])), strict=True):
        np.testing.assert_allclose(nu, 0.02 * np.square(np.asarray(mu, np.float64) / 0.1), rtol=16 * EPS, atol=1e-37)
    for count, (before, after) in enumerate(pairwise(states), start=1):
        leaves = (jax.tree.leaves(tree) for tree in (before.params, after.params, *moments(after)))
        for p, found, mu, nu in zip(*leaves, strict=True):
            p, mu, nu = (np.asarray(x, np.float64) for x in (p, mu, nu))
            size = mu / (1 - 0.9**count) / (np.sqrt(nu / (1 - 0.98**count)) + 1e-8)
            # A dozen roundings of the step, the powers among them, and two of the sum.
            limit = 16 * EPS * RATE * (np.abs(size) + DECAY * np.abs(p)) + 2 * EPS * np.abs(p)
            assert (np.abs(found - (p - RATE * (size + DECAY * p))) <= limit).all()


def greedy(mesh):
    """(answers, temporaries) with all prompts side by side, and with half of them waiting for a row."""
    prompts = np.random.default_rng(1).integers(4, 64, (16, 16)).astype(np.int32)
    arguments = *split(mesh, (prompts, np.full(16, 16, np.int32))), jax.random.key(0), jnp.float32(0.0)
    params = jax.device_put(fresh(MANY), parameter_shardings(mesh, MANY))
    programs = [
        sample.lower(
            params, *arguments, config=MANY, decoding=Decoding(6, (3, 4, 5)), slots=slots, mesh=mesh
        ).compile()
        for slots in (0, 8)
    ]  # fmt: skip
    answers = [jax.device_get(program(params, *arguments)) for program in programs]
    return answers, [program.memory_analysis().temp_size_in_bytes for program in programs]


@pytest.fixture(scope="module")
def greedy_alone():
    return greedy(make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize("shape", MESHES)
def test_every_mesh_samples_the_same(greedy_alone, shape):
    """The cache is split as the rows and heads are."""
    (expected, waited), alone = greedy_alone
    answers, temporaries = greedy(make_mesh(*shape))
    for answer in (waited, *answers):
        # Rounding of a logit, and of the sum of all.
        same_answers(answer, expected, atol=2 * roundings(MANY, 22) * EPS)
    assert temporaries[0] < alone[0] / 3


@pytest.fixture(scope="module")
def long_prompts():
    """32 padded prompts, of which 16 are different, their lengths, and their answers."""
    rng = np.random.default_rng(0)
    which = np.sort(rng.integers(0, 16, 32))
    prompts = rng.integers(4, 64, (16, 4128)).astype(np.int32)[which]
    lengths = rng.integers(1, 40, 16).astype(np.int32)[which]
    answers = sample(fresh(CONFIG), prompts[:, -40:], lengths, jax.random.key(0), jnp.float32(0.0), **LONG)
    return prompts, lengths, jax.device_get(answers)


@pytest.mark.parametrize("shape", MESHES[1:])
def test_long_shared_prompts_and_gathered_weights_on_every_mesh(long_prompts, shape):
    """A part of a prefill for each row of a device, some of them left out; a device has all it needs of the weights."""
    mesh, (prompts, lengths, expected) = make_mesh(*shape), long_prompts
    params = jax.device_put(fresh(CONFIG), parameter_shardings(mesh, CONFIG))
    params = decoding_params(params, config=CONFIG, mesh=mesh)
    gate = params["layers"]["gate"]["kernel"]
    assert gate.sharding.shard_shape(gate.shape) == (3, 32, 64 // mesh.shape["tensor"])
    greedy = jnp.float32(0.0)
    arguments = *split(mesh, (prompts, lengths)), jax.random.key(0), greedy
    found = jax.device_get(sample(params, *arguments, **LONG, mesh=mesh))
    same_answers(found, expected, atol=2 * roundings(CONFIG, 44) * EPS)


def test_meshes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="data 3 x fsdp 1 x tensor 2 is 6 devices, need the 8 there are"):
        make_mesh(3, 1, 2)
    with pytest.raises(ValueError, match="does not divide kv_heads 4 by tensor 8"):
        parameter_shardings(make_mesh(1, 1, 8), CONFIG)


def test_a_mesh_may_split_the_axes_of_a_torus():
    compile_for_tpu(
        """
        from jax.experimental import topologies
        from proxmo_jax.policy.sharding import make_mesh
        found = topologies.get_topology_desc(platform="tpu", topology_name="v5p:4x4x4").devices
        assert dict(make_mesh(2, 8, 4, found).shape) == {"data": 2, "fsdp": 8, "tensor": 4}
        print("compiled")
        """.replace("\n        ", "\n")
    )


def test_no_device_waits_for_a_thread(monkeypatch):
    """Four devices on two cores abort within a few iterations of a run, half the time, with a thread for each."""
    monkeypatch.setenv("NPROC", "")
    monkeypatch.delenv("NPROC")
    enough_threads()
    assert int(os.environ["NPROC"]) >= 8 * jax.device_count()
    monkeypatch.setenv("NPROC", "3")  # the user's
    enough_threads()
    assert os.environ["NPROC"] == "3"
