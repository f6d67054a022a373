import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from close import EPS, roundings, same_gradient
from fresh import fresh
from hypothesis import given
from hypothesis import strategies as st
from nested import config_with

from proxmo_jax.agent.batches import batches
from proxmo_jax.agent.rollout import Rollout
from proxmo_jax.estimator.presets import dr_grpo, gigpo, proxmo
from proxmo_jax.policy.decoder import PolicyConfig
from proxmo_jax.policy.decoding import sample
from proxmo_jax.policy.sampling import Decoding
from proxmo_jax.policy.sharding import make_mesh, parameter_shardings, place_optimizer
from proxmo_jax.training.buffers import Buffer, clear, write
from proxmo_jax.training.losses import AGGREGATIONS, LossSettings
from proxmo_jax.training.rows import gather_rows, pack_turns
from proxmo_jax.training.update import TrainState, cloning_step, estimate, make_optimizer, policy_step, row_log_probs

CONFIG = PolicyConfig(vocab_size=24, hidden_size=32, intermediate_size=48, head_dim=8, initializer_range=0.2)
TERMS = roundings(CONFIG, 24)
BACKWARDS = 3 * TERMS + 200  # two products for each one forwards; a weight's gradient is a sum over all tokens


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(20, 50), st.integers(0, 99))
def test_packing_places_every_token_once(lengths, row_length, seed):
    lengths = np.array(lengths)
    answers = (lengths + 2) // 3
    order = np.random.default_rng(seed).permutation(len(lengths))
    turns, offsets = pack_turns(lengths, answers, order, row_length=row_length, row_answers=9)
    placed = sorted(zip(turns[turns >= 0].tolist(), offsets[turns >= 0].tolist(), strict=True))
    assert placed == [(t, o) for t, n in enumerate(lengths) for o in range(n)]
    assert max(answers[np.unique(row[row >= 0])].sum() for row in turns) <= 9


def test_packing_refuses_a_turn_longer_than_a_row():
    with pytest.raises(ValueError, match="a turn has 9 tokens, need at most 8"):
        pack_turns(np.array([3, 9]), np.ones(2, int), np.arange(2), row_length=8, row_answers=8)
    with pytest.raises(ValueError, match="a turn has 3 response tokens, need at most 2"):
        pack_turns(np.array([3, 4]), np.array([1, 3]), np.arange(2), row_length=8, row_answers=2)


def played(prompt_lengths=((3, 5), (7, 0), (2, 6)), key=1):
    """A buffer of sampled turns, as a rollout leaves it."""
    rng = np.random.default_rng(0)
    prompt_lengths = np.array(prompt_lengths, np.int32)
    episodes, turns = prompt_lengths.shape
    buffer = Buffer.empty(episodes, 1, turns, prompt=8, response=4, words=2)
    answered = np.zeros_like(prompt_lengths)
    for turn in range(turns):
        prompts = np.zeros((episodes, 8), np.int32)
        for row, n in zip(prompts, prompt_lengths[:, turn], strict=True):
            row[8 - n :] = rng.integers(1, 24, n)
        answer = sample(
            fresh(CONFIG), prompts, prompt_lengths[:, turn], jax.random.key(key + turn), jnp.float32(1.0),
            config=CONFIG, decoding=Decoding(4, (3,)),
        )  # fmt: skip
        answered[:, turn] = answer.lengths
        rows = {"prompts": prompts, "responses": answer.tokens, "log_probs": answer.log_probs}
        buffer = write(buffer, np.arange(episodes), jnp.int32(turn), rows)
    return buffer, prompt_lengths, answered


def rows_of(buffer, prompt_lengths, answered, row_length=24):
    lengths = (prompt_lengths + answered).reshape(-1)
    turns, offsets = pack_turns(
        lengths, answered.reshape(-1), np.flatnonzero(lengths), row_length=row_length, row_answers=8
    )
    advantage = jnp.asarray(np.arange(lengths.size, dtype=np.float32).reshape(prompt_lengths.shape))
    return gather_rows(buffer, prompt_lengths, answered, advantage, turns, offsets, row_answers=8), turns


def test_what_was_sampled_is_what_is_trained_on():
    """The trainer's log-probs of the packed turns are the sampler's: no token moved, none re-tokenised."""
    buffer, prompt_lengths, answered = played()
    rows, turns = rows_of(buffer, prompt_lengths, answered)
    mask = np.asarray(rows.mask)
    assert mask.sum() == answered.sum()
    found = row_log_probs((fresh(CONFIG),), rows, jnp.float32(1.0), config=CONFIG)[0]
    np.testing.assert_allclose(
        np.asarray(found)[mask], np.asarray(rows.old_log_probs)[mask], rtol=0, atol=2 * TERMS * EPS
    )
    own = np.take_along_axis(turns, np.asarray(rows.places), 1)[mask]
    np.testing.assert_array_equal(np.asarray(rows.advantage)[mask], own)  # each turn its own
    np.testing.assert_array_equal(np.asarray(rows.turn_tokens)[mask], answered.reshape(-1)[own])


def test_a_row_computes_as_its_turns_alone():
    buffer, prompt_lengths, answered = played()
    packed, _ = rows_of(buffer, prompt_lengths, answered, row_length=24)
    alone, _ = rows_of(buffer, prompt_lengths, answered, row_length=12)
    sums = [
        float(jnp.where(rows.mask, row_log_probs((fresh(CONFIG),), rows, jnp.float32(1.0), config=CONFIG)[0], 0).sum())
        for rows in (packed, alone)
    ]
    np.testing.assert_allclose(sums[0], sums[1], rtol=0, atol=2 * TERMS * EPS * int(packed.mask.sum()))


def step(rows, micro_batches=1, rate=1.0, **settings):
    """Plain SGD, so that at rate 1 what the parameters lose is the gradient."""
    optimizer = optax.sgd(rate)
    params = fresh(CONFIG)
    return policy_step(
        TrainState(params, optimizer.init(params)), rows, jnp.float32(1.0), config=CONFIG, optimizer=optimizer,
        settings=LossSettings(**settings), micro_batches=micro_batches,
    )  # fmt: skip


def gradient(state):
    return jax.tree.map(jnp.subtract, fresh(CONFIG), state.params)


def two_parts():
    """An even number of rows."""
    rows, _ = rows_of(*played(), row_length=12)
    return jax.tree.map(lambda x: jnp.concatenate([x, x])[: len(x) + len(x) % 2], rows)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_change_nothing(aggregation):
    rows = two_parts()
    whole, parts = step(rows, aggregation=aggregation, longest_response=4)
    split, split_parts = step(rows, micro_batches=2, aggregation=aggregation, longest_response=4)
    same_gradient(gradient(split), gradient(whole), BACKWARDS)
    np.testing.assert_allclose(parts.loss, split_parts.loss, rtol=TERMS * EPS)


def test_log_probs_come_part_by_part_in_the_same_order():
    rows = two_parts()
    other = fresh(CONFIG, 9)
    whole = row_log_probs((fresh(CONFIG), other), rows, jnp.float32(1.0), config=CONFIG)
    parts = row_log_probs((fresh(CONFIG), other), rows, jnp.float32(1.0), config=CONFIG, micro_batches=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2 * TERMS * EPS), whole, parts)
    assert float(jnp.abs(whole[0] - whole[1]).max()) > 0.1


def test_padding_rows_change_nothing():
    rows, _ = rows_of(*played(), row_length=12)
    padded = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x)]), rows)
    same_gradient(gradient(step(padded)[0]), gradient(step(rows)[0]), BACKWARDS)


def test_update_moves_towards_positive_advantage():
    rows, _ = rows_of(*played())
    better = step(rows, kl_coef=0.0, entropy_coef=0.0, rate=0.1)[0].params
    before, after = row_log_probs((fresh(CONFIG), better), rows, jnp.float32(1.0), config=CONFIG)
    gain = jnp.where(rows.mask, (after - before) * rows.advantage, 0).sum()
    assert float(gain) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cloning_learns_its_answers(dtype):
    """Also with the optimiser's moments in half the memory."""
    rows, _ = rows_of(*played())
    optimizer = make_optimizer(1e-2, 0.0, 1.0, 2, moments_dtype=dtype)
    params = fresh(CONFIG)
    state, losses = TrainState(params, place_optimizer(optimizer, params, one_device())), []
    for _ in range(40):
        state, loss = cloning_step(state, rows, config=CONFIG, optimizer=optimizer)
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]
    moments = [x for x in jax.tree.leaves(state.opt_state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert len(moments) == 2 * len(jax.tree.leaves(params))
    assert {str(x.dtype) for x in moments} == {dtype}


def one_device():
    return parameter_shardings(make_mesh(devices=jax.devices()[:1]), CONFIG)


def test_buffer_drops_batch_padding_and_clears():
    buffer = Buffer.empty(2, 2, 3, prompt=4, response=2, words=2)
    counts = np.array([[1, 2], [3, 4]], np.float32)
    rows = {"reward": np.array([5.0, 9.0], np.float32), "anchor": np.array([4, 0]), "word_counts": counts}
    buffer = write(buffer, np.array([2, 4]), jnp.int32(1), rows)
    np.testing.assert_array_equal(buffer.reward, [[0, 0, 0], [0, 0, 0], [0, 5, 0], [0, 0, 0]])
    assert buffer.word_counts.shape == (2, 6, 2)
    np.testing.assert_array_equal(buffer.word_counts[1, 4], [1, 2])
    assert np.asarray(buffer.word_counts).sum() == 3
    assert not np.asarray(clear(buffer).reward).any()


CORRIDOR, START, STOP = 4, 10, 3


@pytest.mark.parametrize("settings", [dr_grpo(), gigpo(), proxmo()], ids=["dr_grpo", "gigpo", "proxmo"])
def test_the_loop_learns_a_corridor(settings):
    """A probe world: right on odd tokens, left on even ones, won at the fourth place. Text in, policy gradient out."""
    episodes, members, turns = 32, 8, 8
    optimizer = make_optimizer(3e-3, 0.0, 1.0, 0)
    params = fresh(CONFIG, 5)
    state, rates = TrainState(params, optimizer.init(params)), []
    for update in range(15):
        buffer = Buffer.empty(episodes // members, members, turns, prompt=2, response=1, words=2)
        place, done = np.zeros(episodes, int), np.zeros(episodes, bool)
        prompt_lengths = np.zeros((episodes, turns), np.int32)
        for turn in range(turns):
            prompts = np.stack([np.full(episodes, START), START + 1 + np.maximum(place, 0)], 1).astype(np.int32)
            answer = sample(
                state.params, prompts, np.where(done, 0, 2).astype(np.int32), jax.random.key(update * 100 + turn),
                jnp.float32(1.0), config=CONFIG, decoding=Decoding(1, (STOP,)),
            )  # fmt: skip
            action, active, place_before = np.asarray(answer.tokens)[:, 0], ~done, place
            place = np.where(active, np.clip(place + np.where(action % 2, 1, -1), 0, CORRIDOR), place)
            won = active & (place == CORRIDOR)
            done |= won
            prompt_lengths[:, turn] = 2 * active
            rows = {
                "prompts": prompts, "responses": answer.tokens, "log_probs": answer.log_probs,
                "reward": won.astype(np.float32), "mask": active, "action_valid": np.ones(episodes, bool),
                "anchor": np.maximum(place_before, 0).astype(np.int32),
                "word_ids": np.stack([prompts[:, 1]] * 2, 1).astype(np.int32) % 16,
                "word_counts": np.tile(np.float32([[1, 0]]), (episodes, 1)),
            }  # fmt: skip
            buffer = write(buffer, np.arange(episodes), jnp.int32(turn), rows)
        rates.append(done.mean())
        alphabetical, ending = np.arange(16, dtype=np.int32), place.astype(np.int32)
        answer = estimate(buffer, done, ending, alphabetical, settings, texts=CORRIDOR + 1)
        lengths = (prompt_lengths + (prompt_lengths > 0)).reshape(-1)
        at, offsets = pack_turns(
            lengths, (lengths > 0).astype(int), np.flatnonzero(lengths), row_length=6, row_answers=2
        )
        short = 256 - len(at)
        at, offsets = np.pad(at, ((0, short), (0, 0)), constant_values=-1), np.pad(offsets, ((0, short), (0, 0)))
        advantage, answered = answer.joint.reshape(episodes, turns), (prompt_lengths > 0).astype(np.int32)
        rows = gather_rows(buffer, prompt_lengths, answered, advantage, at, offsets, row_answers=2)
        rows = rows.__class__(**{**rows.__dict__, "reference": rows.old_log_probs})
        state, _ = policy_step(
            state, rows, jnp.float32(1.0), config=CONFIG, optimizer=optimizer, settings=LossSettings(kl_coef=0.0)
        )
    assert np.mean(rates[:2]) < 0.6
    assert np.mean(rates[-3:]) > 0.9
    assert policy_step._cache_size() < 20


@pytest.mark.parametrize("warmup", [0, 1, 5, 20])
def test_the_rate_rises_from_above_zero(warmup):
    """Measured on one parameter: Adam's first steps along a constant gradient are of the rate's size."""
    optimizer = make_optimizer(1e-2, 0.0, 1e9, warmup)
    params = jnp.zeros(())
    state, sizes = optimizer.init(params), []
    for _ in range(warmup + 3):
        update, state = optimizer.update(jnp.float32(1.0), state, params)
        sizes.append(-float(update))
    rise = [(i + 1) / (warmup + 1) for i in range(warmup)]
    np.testing.assert_allclose(sizes, 1e-2 * np.array([*rise, 1, 1, 1]), rtol=1e-4)


@pytest.mark.parametrize(
    ("rows", "size", "steps"),
    [(33, 32, [17, 16]), (32, 32, [32]), (31, 32, [31]), (65, 32, [22, 22, 21]), (1, 8, [1]), (17, 8, [6, 6, 5])],
)
def test_rows_are_spread_evenly_over_the_steps(rows, size, steps):
    """One shape, and every turn once."""
    config = config_with(
        optimizer__rows_per_batch=size,
        optimizer__row_length=9,
        rollout__max_response_length=1,
        rollout__max_prompt_length=8,
    )
    prompts = np.full((rows, 1), 8, np.int32)
    buffer = Buffer.empty(rows, 1, 1, prompt=8, response=1, words=1)
    played = Rollout(
        buffer, prompts, np.ones((rows, 1), np.int32), np.ones(rows, bool), np.ones(rows, np.float32), [], []
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    advantage = jnp.arange(1.0, rows + 1)[:, None]
    found = list(batches(config, mesh, played, prompts > 0, advantage, np.random.default_rng(0)))
    assert {part.tokens.shape for part in found} == {(size, 9)}
    assert [int((part.segments > 0).any(1).sum()) for part in found] == steps
    seen = np.concatenate([np.asarray(part.advantage)[np.asarray(part.mask)] for part in found])
    assert sorted(seen.tolist()) == list(range(1, rows + 1))
