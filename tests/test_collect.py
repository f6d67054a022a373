"""Rollouts whose worker dies in the middle: nothing broken is learned from, and nothing stops."""

import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from envs_bridge.collect import TRIES, Limits, Player, collect, demonstrations
from envs_bridge.household.expert import Habits, episodes
from envs_bridge.pool import Pool, WorkerError
from envs_bridge.prompts import ANSWER_START
from proxmo_jax.buffers import Buffer
from proxmo_jax.policy import PolicyConfig, init_params
from proxmo_jax.sampling import Decoding
from proxmo_jax.sharding import make_mesh, replicate
from proxmo_jax.tokenizer import build_word_tokenizer

TURNS = 3


@pytest.fixture(scope="module")
def player(games, tmp_path_factory):
    demos = demonstrations(episodes(games, seed=0, habits=Habits(), max_turns=20))
    texts = [f"{demo.memory.prompt()} {demo.command}" for demo in demos]
    tokenizer = build_word_tokenizer(texts, tmp_path_factory.mktemp("tokenizer"))
    size = -(-len(tokenizer) // 32) * 32
    config = PolicyConfig(vocab_size=size, hidden_size=32, intermediate_size=48, head_dim=8, num_hidden_layers=1)
    mesh = make_mesh(devices=jax.devices()[:1])
    decoding = Decoding(4, (tokenizer.eos_token_id,), tokenizer.pad_token_id)
    limits = Limits(turns=TURNS, prompt=128, response=4)
    return Player(
        tokenizer, config, limits, mesh, decoding, render=lambda p: p + ANSWER_START, answer_start=ANSWER_START
    )


def play(player, pool, games, on_turn=None):
    params = init_params(player.config, jax.random.key(0))
    limits = player.limits
    buffer = Buffer.empty(2, 8, TURNS, prompt=limits.prompt, response=limits.response, words=limits.words)
    files = [game for game in games[:2] for _ in range(8)]
    buffer = replicate(player.mesh, buffer)
    return collect(player, params, pool, files, jax.random.key(1), temperature=1.0, buffer=buffer, on_turn=on_turn)


def test_lost_episodes_are_played_anew(player, games):
    turns = []

    def kill_once(turn, active):
        turns.append((turn, active))
        if turns == [(0, 16), (1, 16)]:
            os.kill(pool._links[1].process.pid, signal.SIGKILL)

    with Pool(2) as pool:
        rollout = play(player, pool, games, kill_once)
    assert turns == [(0, 16), (1, 16), (2, 8), (0, 8), (1, 8), (2, 8)]
    assert rollout.lost == 8
    assert rollout.finished.all()
    assert (rollout.prompt_lengths > 0).all()
    assert np.asarray(rollout.buffer.mask).all()
    assert [len(transcript) for transcript in rollout.transcripts] == [TURNS] * 16


def test_a_game_file_deleted_under_way_costs_its_episodes_alone(player, games, tmp_path):
    """The other group plays on, and nothing of the lost one is learned from."""
    gone = tmp_path / "game.tw-pddl"
    gone.write_bytes(Path(games[0]).read_bytes())
    with Pool(2) as pool:
        assert play(player, pool, [str(gone), games[1]]).finished.all()
    gone.unlink()
    with Pool(2) as pool:  # whose workers have not read the file yet
        rollout = play(player, pool, [str(gone), games[1]])
        assert "cannot be read" in pool.fault
    assert rollout.finished.tolist() == [False] * 8 + [True] * 8
    assert rollout.lost == 8 * TRIES
    mask = np.asarray(rollout.buffer.mask)
    assert not mask[:8].any()
    assert mask[8:].all()


def test_what_stays_lost_is_nowhere(player, games):
    """One group's worker dies every time: the group is out of mask, lengths and rates; the other is whole."""

    def kill_always(turn, active):
        if turn == 1:
            os.kill(pool._links[1].process.pid, signal.SIGKILL)

    with Pool(2) as pool:
        rollout = play(player, pool, games, kill_always)
    assert rollout.finished.tolist() == [True] * 8 + [False] * 8
    mask = np.asarray(rollout.buffer.mask)
    assert mask[:8].all()
    assert not mask[8:].any()
    assert not rollout.prompt_lengths[8:].any()
    assert 0 <= rollout.admissible <= 1


def test_no_episode_at_all_is_an_error(player, games, tmp_path):
    with Pool(1) as pool, pytest.raises(WorkerError, match=r"no episode could be played: .*cannot be read"):
        play(player, pool, [str(tmp_path / "gone"), str(tmp_path / "gone too")])
