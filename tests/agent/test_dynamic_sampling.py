"""Groups without spread are drawn anew: what is kept, what is counted, and that a run repeats and resumes exactly."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nested import config_with
from scripted import ScriptedPool, say, small_player
from test_rollout import check_words

from envs_bridge.turn import Goal
from proxmo_jax.agent.dynamic_sampling import without_spread
from proxmo_jax.agent.loop import Loop
from proxmo_jax.agent.make_player import new_state, run_optimizer
from proxmo_jax.agent.rollout import collect
from proxmo_jax.agent.settings import RolloutSettings, check
from proxmo_jax.errors import UserError
from proxmo_jax.policy.decoder import init_params
from proxmo_jax.policy.sharding import replicate
from proxmo_jax.training.buffers import Buffer

GROUPS, MEMBERS, TURNS = 3, 2, 3


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.booleans()), min_size=3, max_size=24))
def test_spread_is_what_plain_loops_find(episodes):
    episodes = episodes[: len(episodes) // 3 * 3]
    outcome, finished = (np.array(x) for x in zip(*episodes, strict=True))
    expected = []
    for g in range(0, len(episodes), 3):
        expected.append(len({value for value, over in episodes[g : g + 3] if over}) < 2)
    assert without_spread(outcome, finished, 3).tolist() == expected


def world(won: bool, turn: int, what: str):
    """Over in the second turn."""
    over = {"done": True, "won": won, "reward": float(won)} if turn == 2 else {}
    return say(f"{what} turn{turn}", **over)


def test_replaced_groups_leave_nothing_behind(tmp_path):
    """The first group is replaced twice, its first attempts are longer and see more than what is kept."""
    player = small_player(tmp_path, turns=TURNS)

    def script(slot, attempt, turn):
        if slot < MEMBERS and attempt == 0:
            return say(" ".join(f"old{slot} turn{turn} word{i}" for i in range(20)))
        return world(slot % 2 == 0 and attempt != 1, turn, f"slot{slot} attempt{attempt}")

    asked = []

    def redraw(rollout):
        asked.append(rollout.won.copy())
        return {0: f"new{len(asked)}"} if len(asked) < 3 else None

    params = init_params(player.config, jax.random.key(0))
    buffer = replicate(player.mesh, Buffer.empty(GROUPS, MEMBERS, TURNS, prompt=64, response=2, words=16))
    pool = ScriptedPool(script)
    games = [f"game{g}" for g in range(GROUPS) for _ in range(MEMBERS)]
    rollout = collect(player, params, pool, games, jax.random.key(1), temperature=1.0, buffer=buffer, redraw=redraw)
    assert [won.tolist() for won in asked] == [
        [False, False, True, False, True, False],
        [False, False, True, False, True, False],
        [True, False, True, False, True, False],
    ]
    assert pool.attempts == {0: 2, 1: 2, 2: 0, 3: 0, 4: 0, 5: 0}
    assert rollout.lost == 0
    assert [len(turns) for turns in rollout.transcripts] == [2] * 6
    assert rollout.transcripts[0][0][0] == "slot0 attempt2 turn0"
    mask = np.asarray(rollout.buffer.mask)
    assert mask.sum(1).tolist() == [2] * 6
    assert ((rollout.prompt_lengths > 0) == mask).all()
    assert rollout.score.tolist() == [1, 0, 1, 0, 1, 0]
    assert rollout.texts == 4
    check_words(player, rollout, MEMBERS)
    # What was sampled counts all: two episodes of three turns, then two, and two; and four episodes of two turns.
    assert sum(len(prompts) for prompts, _ in rollout.sampled) == 2 * 3 + 2 * 2 + 2 * 2 + 4 * 2


class Worlds(ScriptedPool):
    """Attempts at a game are all lost, all won or half won, by its number."""

    def __init__(self):
        super().__init__(lambda slot, attempt, turn: world(self.won(slot), turn, f"game{self.at[slot].number % 5}"))
        self.at, self.played = {}, []

    def reset(self, games):
        for slot, game in games:
            self.at[slot] = game
            self.played.append((slot, game.number))
        return super().reset(games)

    def won(self, slot):
        return (False, True, slot % 2 == 0)[self.at[slot].number % 3]


def make(tmp_path, rounds, last=None, **options):
    player = small_player(tmp_path, turns=TURNS)
    config = config_with(
        env__name="shop", rollout__num_groups=GROUPS, rollout__group_size=MEMBERS, rollout__max_turns=TURNS,
        rollout__max_prompt_length=64, rollout__max_response_length=2, rollout__dynamic_sampling=rounds,
        optimizer__rows_per_batch=8, optimizer__row_length=80, **options,
    )  # fmt: skip
    games = [Goal("x", i, "ab"[i // 6 % 2]) for i in range(24)]
    reference = replicate(player.mesh, init_params(player.config, jax.random.key(0)))
    optimizer = run_optimizer(config)
    loop = Loop(config, player, Worlds(), games, player.mesh, optimizer, reference, last or {})
    return loop, new_state(player, reference, optimizer)


def go(loop, state, iterations):
    rows = []
    for i in iterations:
        state, row = loop.iteration(state, i, jax.random.key(i))
        rows.append({k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))})
    return state, rows


@pytest.mark.parametrize("rounds", [0, 1, 8])
def test_an_iteration_counts_what_is_played_and_trains_on_what_is_left(tmp_path, rounds):
    loop, state = make(tmp_path, rounds)
    noted = []
    note = loop.note_success
    loop.note_success = lambda games, won, finished: (
        noted.extend(zip(games, won, strict=True)),
        note(games, won, finished),
    )
    _, (row,) = go(loop, state, [1])
    played = loop.pool.played
    groups = [index for slot, index in played if slot % MEMBERS == 0]
    assert [game for game, _ in noted] == groups  # every group played, in this order
    wins = sum(won for _, won in noted)
    assert wins == sum((0, 2, 1)[index % 3] for index in groups)
    assert row["train/success_rate"] == wins / (MEMBERS * len(groups))
    assert len(set(groups)) == len(groups)  # others than those played
    kept = [loop.pool.at[g * MEMBERS].number % 3 for g in range(GROUPS)]
    assert row["train/mixed_groups"] == pytest.approx(np.mean([k == 2 for k in kept]))
    if rounds == 0:
        assert len(groups) == GROUPS
        assert not {"train/success_rate_filtered", "train/num_gen_batches", "train/redrawn_groups"} & set(row)
        return
    assert row["train/success_rate_filtered"] == pytest.approx(np.mean([(0, 1, 0.5)[k] for k in kept]))
    assert row["train/redrawn_groups"] == len(groups) - GROUPS
    assert 1 <= row["train/num_gen_batches"] <= 1 + rounds
    if rounds == 8:
        assert set(kept) == {2}
        assert len(groups) > GROUPS


def test_a_run_repeats_and_resumes_exactly(tmp_path):
    loop, state = make(tmp_path / "a", 4)
    whole, rows = go(loop, state, [1, 2, 3])
    again, repeated = go(*make(tmp_path / "b", 4), [1, 2, 3])
    assert rows == repeated
    first, halves = go(*make(tmp_path / "c", 4), [1, 2])
    loop, _ = make(tmp_path / "d", 4, halves[-1])
    second, more = go(loop, first, [3])
    assert halves + more == rows
    assert max(row["train/redrawn_groups"] for row in rows) > 0
    for other in (again, second):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(other.params), jax.device_get(whole.params))


def test_scores_without_spread_are_drawn_anew_where_they_are_the_reward(tmp_path):
    """All lost with different scores: spread of the reward only where the score is rewarded."""
    for reward, redrawn in (("score", 0), ("success", 3)):
        loop, state = make(tmp_path / reward, 1, env__reward=reward)
        loop.pool.script = lambda slot, attempt, turn: say(f"turn{turn}", reward=0.1 * (slot % 2))
        _, (row,) = go(loop, state, [1])
        assert row["train/redrawn_groups"] == redrawn


def test_fewer_games_than_groups_are_drawn_again(tmp_path):
    loop, state = make(tmp_path, 2)
    loop.games, loop.kinds = loop.games[:3:3], loop.kinds[:3:3]  # one, which is always lost
    _, (row,) = go(loop, state, [1])
    assert row["train/num_gen_batches"] == 3
    assert row["train/redrawn_groups"] == 2 * GROUPS
    assert row["train/success_rate"] == 0


def test_a_negative_number_is_refused():
    with pytest.raises(UserError, match=r"--rollout.dynamic-sampling must be at least 0, got -1"):
        RolloutSettings(dynamic_sampling=-1)


NO_TERMS = {
    "loss__kl_coef": 0.0, "loss__entropy_coef": 0.0, "optimizer__weight_decay": 0.0, "estimator__invalid_penalty": 0.0,
}  # fmt: skip


def test_turns_without_an_advantage_can_be_left_out(tmp_path):
    """Groups that won nothing have no gradient; without them the update counts the tokens of the others alone."""
    (tmp_path / "all").mkdir()
    lost, state = make(tmp_path / "all", 0, **NO_TERMS)
    lost.pool.won = lambda slot: False
    before = jax.device_get(state.params)
    state, (row,) = go(lost, state, [1])
    assert row["loss/steps"] > 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before)

    loop, state = make(tmp_path, 0, **NO_TERMS, optimizer__skip_zero_advantages=True)
    _, row = loop.iteration(state, 1, jax.random.key(1))
    played = loop.played
    some = played.won.reshape(-1, MEMBERS).any(1).repeat(MEMBERS)
    assert 0 < some.sum() < len(some)
    assert row["perf/total_num_tokens"] == (played.prompt_lengths + played.response_lengths)[some].sum()


def test_an_iteration_trains_equal_turns_once(tmp_path):
    (tmp_path / "each").mkdir()
    rows = []
    for folder, options in ((tmp_path / "each", {}), (tmp_path, {"optimizer__sum_equal_turns": True})):
        loop, state = make(folder, 0, **NO_TERMS, optimizer__skip_zero_advantages=True, **options)
        rows.append(loop.iteration(state, 1, jax.random.key(1))[1])
    played = loop.played
    width, turns = played.buffer.prompts.shape[-1], set()
    some = played.won.reshape(-1, MEMBERS).any(1).repeat(MEMBERS)
    for e, t in zip(*np.nonzero(played.prompt_lengths * some[:, None]), strict=True):
        prompt = np.asarray(played.buffer.prompts[e, t, width - played.prompt_lengths[e, t] :])
        answer = np.asarray(played.buffer.responses[e, t, : played.response_lengths[e, t]])
        turns.add((*prompt.tolist(), -1, *answer.tolist()))
    each, once = (row["train/trained_turns"] * (played.prompt_lengths > 0).sum() for row in rows)
    assert 0 < once <= len(turns) <= each
    assert rows[1]["train/advantage_size"] == rows[0]["train/advantage_size"]


@pytest.mark.parametrize("skip", [{"optimizer__skip_zero_advantages": True}, {"optimizer__skip_gradient_share": 0.01}])
def test_turns_that_have_a_gradient_are_not_left_out(skip):
    with pytest.raises(UserError, match=r"needs 0 instead of --loss.kl-coef 0.01, which train all turns"):
        check(config_with(**{**NO_TERMS, "loss__kl_coef": 0.01}, **skip))
