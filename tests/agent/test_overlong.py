"""Which responses were cut off, what they cost, and that masked ones leave the loss."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nested import config_with
from scripted import ScriptedPool, say, small_player
from test_dynamic_sampling import MEMBERS, go, make

from proxmo_jax.agent.batches import batches, trained_turns
from proxmo_jax.agent.overlong import length_penalty, unended
from proxmo_jax.agent.rollout import collect
from proxmo_jax.errors import UserError
from proxmo_jax.policy.decoder import init_params
from proxmo_jax.policy.sampling import Decoding, stop_table
from proxmo_jax.policy.sharding import replicate
from proxmo_jax.training.buffers import Buffer

TEXTS = ["", "<", "/a", ">", "b", "</a", "a>", "</a></a>"]
STOPS = (0, 4)


@pytest.mark.parametrize("strings", [(), ("</a>",), ("</a>", "bb")])
def test_the_end_of_responses_against_their_text(strings):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, len(TEXTS), (300, 4)).astype(np.int32)
    lengths = rng.integers(0, 5, 300).astype(np.int32)
    table = stop_table(TEXTS, strings) if strings else None
    found = np.asarray(unended(tokens, lengths, table, decoding=Decoding(4, STOPS)))
    for row, length, cut in zip(tokens, lengths, found, strict=True):
        text = "".join(TEXTS[token] for token in row)
        ended = row[-1] in STOPS or any(string in text for string in strings)
        assert cut == (length == 4 and not ended)
    assert 0 < found.sum() < (lengths == 4).sum()


@given(st.integers(1, 40), st.data())
def test_the_penalty_is_dapos(limit, data):
    buffer = data.draw(st.integers(1, limit))
    for length in range(limit + 1):
        if length <= limit - buffer:
            expected = 0.0
        else:
            expected = ((limit - buffer) - length) / buffer
        (found,) = length_penalty(np.array([length]), limit=limit, buffer=buffer, factor=2.0)
        assert found == pytest.approx(-2.0 * expected, abs=1e-6)
    assert length_penalty(np.array([limit]), limit=limit, buffer=buffer, factor=2.0) == 2.0


def play(player, penalty=None):
    """Two groups of two; the second turn ends an episode, every other one is won."""
    params = init_params(player.config, jax.random.key(0))
    limits = player.limits
    buffer = Buffer.empty(2, 2, limits.turns, prompt=limits.prompt, response=limits.response, words=16)
    pool = ScriptedPool(
        lambda slot, attempt, turn: say(f"turn {turn}", done=turn == 2, won=turn == 2 and slot % 2 == 0)
    )
    return collect(
        player, params, pool, ["a", "a", "b", "b"], jax.random.key(1), temperature=1.0,
        buffer=replicate(player.mesh, buffer), length_penalty=penalty,
    )  # fmt: skip


@pytest.fixture
def player(tmp_path):
    """One whose responses end by themselves about half of the time."""
    player = small_player(tmp_path, response=2)
    player.decoding = Decoding(2, tuple(range(1, 64, 4)), player.tokenizer.pad_token_id)
    return player


def test_a_rollout_knows_its_cut_off_responses_and_their_penalty(player):
    plain = play(player)
    responses, stops = np.asarray(plain.buffer.responses), player.decoding.stop_ids
    cut = (plain.response_lengths == 2) & ~np.isin(responses[..., 1], stops)
    np.testing.assert_array_equal(plain.overlong, cut)
    assert 0 < cut.sum() < (plain.response_lengths > 0).sum()
    assert not plain.penalty.any()

    def penalty(lengths):
        return length_penalty(lengths, limit=2, buffer=1, factor=3.0)

    fined = play(player, penalty)
    np.testing.assert_array_equal(fined.response_lengths, plain.response_lengths)
    expected = np.where(plain.response_lengths == 2, 3.0, 0.0)
    np.testing.assert_array_equal(fined.penalty, expected)
    np.testing.assert_allclose(np.asarray(fined.buffer.reward), np.asarray(plain.buffer.reward) - expected)
    assert (fined.won == plain.won).all()


def config_of(**options):
    return config_with(
        rollout__max_turns=3, rollout__max_prompt_length=64, rollout__max_response_length=2, rollout__group_size=2,
        optimizer__rows_per_batch=8, optimizer__row_length=80, **options,
    )  # fmt: skip


def test_masked_turns_are_not_in_the_rows_and_the_others_are_as_before(player):
    rollout = play(player)
    number = np.arange(rollout.prompt_lengths.size, dtype=np.float32).reshape(rollout.prompt_lengths.shape)

    def tokens(overlong):
        """Response tokens in the rows by turn."""
        found = {}
        config = config_of(rollout__overlong=overlong)
        trained = trained_turns(config, rollout, number)
        for rows in batches(config, player.mesh, rollout, trained, number, np.random.default_rng(0)):
            mask = np.asarray(rows.mask)
            for turn, token in zip(np.asarray(rows.advantage)[mask], np.asarray(rows.targets)[mask], strict=True):
                found.setdefault(int(turn), []).append(int(token))
        return found

    kept, masked = tokens("keep"), tokens("mask")
    cut = set(np.flatnonzero(rollout.overlong).tolist())
    assert set(kept) == set(np.flatnonzero(rollout.prompt_lengths).tolist())
    assert masked == {turn: found for turn, found in kept.items() if turn not in cut}
    assert 0 < len(masked) < len(kept)


def test_an_iteration_of_cut_off_responses_alone_changes_nothing(tmp_path):
    loop, state = make(tmp_path, 0, rollout__overlong="mask")
    loop.player.decoding = Decoding(2, (), loop.player.tokenizer.pad_token_id)  # nothing ends by itself
    before = jax.device_get(state.params)
    state, (row,) = go(loop, state, [1])
    assert row["train/overlong_rate"] == 1.0
    assert row["loss/steps"] == 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before)


def test_the_rates_of_an_iteration(tmp_path):
    """The reward says what was won, the penalty stands beside it."""
    loop, state = make(
        tmp_path, 0, rollout__overlong="penalise", rollout__overlong_buffer=1, rollout__overlong_penalty=0.5
    )
    _, (row,) = go(loop, state, [1])
    rollout = loop.played
    turns = (rollout.prompt_lengths > 0).sum()
    assert row["train/overlong_rate"] == rollout.overlong.sum() / turns
    assert row["train/overlong_penalty"] == pytest.approx(0.5 * (rollout.response_lengths == 2).sum() / turns)
    assert row["train/reward"] == pytest.approx(10 * rollout.won.mean())
    assert len(rollout.won) % MEMBERS == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlong": "penalise"}, "--rollout.overlong-buffer must lie between 1 and the 8 tokens"),
        ({"overlong": "penalise", "overlong_buffer": 9}, "--rollout.overlong-buffer must lie between 1 and the 8"),
        ({"overlong": "mask", "overlong_buffer": 2}, "--rollout.overlong-buffer needs --rollout.overlong penalise"),
        ({"overlong_penalty": 0.0}, "--rollout.overlong-penalty must be above 0, got 0"),
    ],
)
def test_settings_that_cannot_work(options, message):
    with pytest.raises(UserError) as error:
        config_with(**{f"rollout__{name}": value for name, value in options.items()})
    assert message in str(error.value)
