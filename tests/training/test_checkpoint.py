"""Checkpoints: written while the state changes, kept by number and evaluation, restored on other devices, and skipped
where they are damaged or of another run."""

import resource
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from proxmo_jax.errors import UserError
from proxmo_jax.policy.sharding import make_mesh, replicate
from proxmo_jax.training.checkpoint import Checkpoints, checksums


@partial(jax.jit, donate_argnums=0)
def changed(state):
    return jax.tree.map(lambda x: x + 1, state)


def state_on(mesh, value: float = 0.0):
    """A parameter that is sharded over the mesh, a vector in bfloat16, a count."""
    matrix = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32) + value
    return {
        "matrix": jax.device_put(matrix, NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))),
        **replicate(mesh, {"vector": jnp.full(7, value, jnp.bfloat16), "count": jnp.int32(value)}),
    }


def test_saves_hold_what_was_given_although_the_state_goes_on_changing(tmp_path):
    """The newest two stay, and the best of those that were evaluated; what is restored lies on other devices."""
    state = state_on(make_mesh(1, 4, 2))
    checkpoints = Checkpoints(tmp_path, keep=2)
    better = []
    for iteration in range(1, 6):
        state = changed(state)
        if iteration != 3:
            better.append(checkpoints.note_score(iteration, {2: 0.9}.get(iteration, 0.5)))
        checkpoints.save(iteration, state, {"row": {"loss": 0.1 * iteration}})
    state = changed(state)
    checkpoints.close()
    assert better == [True, True, False, False]

    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best() == 2
    for mesh in (make_mesh(1, 2, 4), make_mesh(devices=jax.devices()[:1])):
        like = state_on(mesh)
        for iteration in (2, 5):
            found, progress = checkpoints.restore(like, iteration)
            assert progress == {"row": {"loss": 0.1 * iteration}}
            assert found["matrix"].sharding == like["matrix"].sharding
            expected = state_on(mesh)
            for _ in range(iteration):
                expected = changed(expected)
            assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found, expected))
    checkpoints.close()


def test_a_damaged_or_foreign_checkpoint_is_skipped_and_set_aside(tmp_path):
    like = state_on(make_mesh(devices=jax.devices()[:1]))
    checkpoints = Checkpoints(tmp_path, keep=9)
    for iteration in (1, 2, 3, 4):
        checkpoints.save(iteration, jax.tree.map(lambda x, i=iteration: x + i, like), {"run": iteration})
    checkpoints.close()
    (tmp_path / "notes").mkdir()
    (tmp_path / "5").mkdir()  # torn: nothing of it is there
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
    files = [path for path in (tmp_path / "4" / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)

    def refuse(progress):
        return "another seed" if progress["run"] == 3 else ""

    said = []
    reader = Checkpoints(tmp_path, writes=False)
    assert reader.restore_newest(like, said.append, refuse)[0] == 2
    reader.close()
    assert (tmp_path / "5").exists()
    assert (tmp_path / "7.orbax-checkpoint-tmp").exists()  # the run that writes there may be alive
    assert [f"{tmp_path / str(number)}: " in line for number, line in zip((5, 4, 3), said, strict=True)] == [True] * 3
    assert "is of another run (another seed); skipped, 2 is used" in said[2]

    checkpoints = Checkpoints(tmp_path, keep=9)
    iteration, state, progress = checkpoints.restore_newest(like, said.append, refuse)
    assert (iteration, progress) == (2, {"run": 2})
    np.testing.assert_array_equal(state["matrix"], like["matrix"] + 2)
    assert checkpoints.steps() == [1, 2]
    checkpoints.save(4, state, {"run": 1})
    checkpoints.close()
    assert {path.name for path in tmp_path.iterdir()} == {
        "1", "2", "4", "3.unreadable", "4.unreadable", "5.unreadable", "notes"
    }  # fmt: skip
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"4: is of another run [(]no[)], nor can the 2 older ones"):
        checkpoints.restore_newest(like, said.append, lambda progress: "no")
    checkpoints.close()


def test_a_disk_that_fills_up_during_a_save_leaves_the_earlier_checkpoints(tmp_path):
    like = state_on(make_mesh(devices=jax.devices()[:1]))
    large = {**like, "matrix": jnp.asarray(np.random.default_rng(1).normal(size=(300, 300)), jnp.float32)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, like, {})
    checkpoints.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        checkpoints.save(2, large, {})
        with pytest.raises(UserError, match=f"{tmp_path}: a checkpoint cannot be written there [(]File too large"):
            poll_for_a_minute(checkpoints)  # as each iteration does
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name for path in tmp_path.iterdir()} == {"1"}
    assert checkpoints.steps() == [1]
    checkpoints.save(2, like, {})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore_newest(like, print)[0] == 2
    checkpoints.close()


def poll_for_a_minute(checkpoints):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        checkpoints.poll()


def test_checksums_do_not_depend_on_the_mesh_and_find_every_bit():
    state = state_on(make_mesh(2, 2, 2))
    assert checksums(state) == checksums(state_on(make_mesh(devices=jax.devices()[:1])))
    bits = np.asarray(state["matrix"]).view(np.uint32).astype(np.uint64)
    weights = 1 + 2 * np.arange(bits.size, dtype=np.uint64).reshape(bits.shape)
    assert checksums(state)[1] == int((bits * weights).sum() % (1 << 32))
    for bit in range(32):
        other = bits.astype(np.uint32)
        other[3, 5] ^= np.uint32(1 << bit)
        assert checksums(state | {"matrix": jnp.asarray(other.view(np.float32))})[1] != checksums(state)[1]
