"""Rollouts whose worker dies in the middle, and whose texts are long: nothing broken is learned from, nothing stops."""

import dataclasses
import os
import signal
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from nested import config_with
from rich.console import Console
from scripted import ScriptedPool, say, small_player
from tiny_model import write_tiny_model

from envs_bridge.household.expert import Habits, episodes
from envs_bridge.pool import Pool
from envs_bridge.prompts import ANSWER_START, History, Notes
from envs_bridge.shop.notes import ShopNotes
from envs_bridge.turn import Goal
from envs_bridge.worker import WORD
from proxmo_jax.agent.demonstrations import Example, demonstration_buffer, demonstrations
from proxmo_jax.agent.loop import rollout_row, steps_of
from proxmo_jax.agent.make_player import make_player
from proxmo_jax.agent.player import Limits, Player, reading_order, width_bucket
from proxmo_jax.agent.report import progress_bar
from proxmo_jax.agent.rollout import TRIES, NothingPlayed, collect
from proxmo_jax.agent.train import Evaluation
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.presets import graphgpo, proxmo
from proxmo_jax.estimator.steps_file import steps_advantages
from proxmo_jax.policy.decoder import PolicyConfig, init_params
from proxmo_jax.policy.sampling import Decoding
from proxmo_jax.policy.sharding import make_mesh, replicate
from proxmo_jax.policy.tokenizer import build_word_tokenizer
from proxmo_jax.training.buffers import Buffer, write
from proxmo_jax.training.update import estimate

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
    with Pool(1) as pool, pytest.raises(NothingPlayed, match=r"no episode could be played: .*cannot be read"):
        play(player, pool, [str(tmp_path / "gone"), str(tmp_path / "gone too")])


def play_script(player, script, *, groups, members, words=16):
    params = init_params(player.config, jax.random.key(0))
    limits = player.limits
    buffer = Buffer.empty(groups, members, limits.turns, prompt=limits.prompt, response=limits.response, words=words)
    games = [str(g) for g in range(groups) for _ in range(members)]
    return collect(
        player, params, ScriptedPool(script), games, jax.random.key(1), temperature=1.0,
        buffer=replicate(player.mesh, buffer),
    )  # fmt: skip


def check_words(player, rollout, members):
    """Every turn's anchor names the row that has the words of the text that was seen."""
    buffer, names = jax.device_get(rollout.buffer), player.vocabulary._ids.words
    assert buffer.mask.sum() == sum(map(len, rollout.transcripts))
    for e, turns in enumerate(rollout.transcripts):
        for t, (text, _) in enumerate(turns):
            row = e // members, buffer.anchor[e, t]
            found = zip(buffer.word_ids[row], buffer.word_counts[row], strict=True)
            assert {names[i]: n for i, n in found if n} == Counter(WORD.findall(text.lower()))


def test_what_is_read_in_another_order_is_written_to_its_own_episode(tmp_path):
    """The later an episode, the shorter its prompts, and each drops out at a time of its own."""
    player = small_player(tmp_path, turns=4, prompt=256)
    player.start = History.start
    lasts = [3, 1, 4, 2, 4, 1]

    def script(slot, attempt, turn):
        return say(" ".join(["look"] * (6 - slot) + ["hand"] * turn), done=turn == lasts[slot])

    rollout = play_script(player, script, groups=3, members=2)
    buffer = jax.device_get(rollout.buffer)
    assert (np.diff(rollout.prompt_lengths[:, 0]) < 0).all()
    assert buffer.mask.sum(1).tolist() == lasts
    for e, turns in enumerate(lasts):
        for t in range(turns):
            prompt = buffer.prompts[e, t, -rollout.prompt_lengths[e, t] :].tolist()
            assert prompt == player.encode([memory_at(player, script, e, t, rollout.transcripts[e])])[0]


def memory_at(player, script, slot, turn, transcript):
    """The memory of an episode before a turn."""
    memory = player.start("task", script(slot, 0, 0))
    for done in range(turn):
        memory.remember(transcript[done][1], script(slot, 0, done + 1))
    return memory


def test_room_for_words_grows_with_what_is_seen(tmp_path):
    """What was written before is kept, a few programs are enough, and a second rollout needs none."""
    player, said = small_player(tmp_path, turns=6), []
    player.say = said.append

    def script(slot, attempt, turn):
        return say(" ".join(f"word{i}" for i in range((slot % 2 + 1) * 10 * (turn + 1))))

    before = write._cache_size()
    rollout = play_script(player, script, groups=2, members=4)
    assert rollout.buffer.word_ids.shape == (2, 24, 128)
    check_words(player, rollout, 4)
    assert write._cache_size() - before <= 2 * 4  # widths 16, 32, 64, 128, each at most twice
    assert not said


def test_an_observation_with_too_many_words_keeps_its_commonest(tmp_path, monkeypatch):
    monkeypatch.setattr("proxmo_jax.agent.player.MOST_WORDS", 32)
    player, said = small_player(tmp_path), []
    player.say = said.append
    text = " ".join(f"w{i:02d}" for i in range(60)) + " w59 w59 w30"
    rollout = play_script(player, lambda slot, attempt, turn: say(text), groups=1, members=2)
    buffer, names = jax.device_get(rollout.buffer), player.vocabulary._ids.words
    assert buffer.word_ids.shape[2] == 32
    found = {names[i]: n for i, n in zip(buffer.word_ids[0, 0], buffer.word_counts[0, 0], strict=True) if n}
    assert found == {"w59": 3, "w30": 2, **{f"w{i:02d}": 1 for i in range(30)}}
    assert set(said) == {"An observation has more than 32 different words: its commonest are compared."}


def test_what_lost_attempts_saw_leaves_room_for_the_others(tmp_path):
    """One member is lost at its last turn, twice, and sees something new each time; the other's group is the same."""
    player = small_player(tmp_path, turns=12)

    def script(slot, attempt, turn):
        if slot == 1 and attempt < 2 and turn == 12:
            return None
        return say(f"attempt{attempt} of{slot} at{turn} is here")

    rollout = play_script(player, script, groups=1, members=2)
    assert rollout.lost == 2
    assert rollout.finished.all()
    assert rollout.texts == 48  # of 24 turns
    check_words(player, rollout, 2)


def test_what_the_last_action_led_to(tmp_path):
    """Two members end where a turn began and two somewhere new; the graph has one node for each text."""
    player = small_player(tmp_path)

    def script(slot, attempt, turn):
        if turn < 3:
            return say(f"room {turn}")
        return say(("room 1", "the garden", "the garden", "the cellar")[slot], done=slot > 1, won=slot == 3)

    rollout = play_script(player, script, groups=1, members=4)
    assert rollout.endings == ["room 1", "the garden", "the garden", "the cellar"]
    anchor = np.asarray(rollout.buffer.anchor)
    assert rollout.ending_anchor.tolist() == [anchor[0, 1], 3, 3, 4]
    assert steps_of(rollout, 4)["next_texts"][:3] == ["room 1", "room 2", "room 1"]
    answer = estimate(
        rollout.buffer, rollout.won, rollout.ending_anchor, player.vocabulary.alphabetical(), graphgpo(), texts=4
    )
    assert np.asarray(answer.parts["distance"])[0].tolist() == [[3, 2, 1]] * 4
    assert np.asarray(answer.parts["next_distance"])[0, :, 2].tolist() == [2, 4, 4, 0]
    direct = steps_advantages(steps_of(rollout, 4), graphgpo())["advantage"]
    np.testing.assert_allclose(np.asarray(answer.joint).reshape(-1), direct, atol=1e-5)


def test_lost_episodes_are_in_no_statistic(tmp_path):
    """Groups of two: one solved by a member, one whose other member is lost, one lost altogether."""
    player = small_player(tmp_path)

    def script(slot, attempt, turn):
        if slot >= 3:
            return None if turn == 2 else say("lost soon", reward=0.5)
        over = {"done": True, "won": True, "reward": 1.0} if slot != 1 and turn == 2 else {}
        return say(f"turn {turn}", **over)

    rollout = play_script(player, script, groups=3, members=2)
    assert rollout.finished.tolist() == [True] * 3 + [False] * 3
    row = rollout_row(config_with(rollout__group_size=2, env__reward_scale=10.0, env__name="shop"), rollout)
    assert row["train/success_rate"] == pytest.approx(2 / 3)
    assert row["train/reward"] == pytest.approx(20 / 3)
    assert row["train/score"] == pytest.approx(2 / 3)
    assert row["train/turns"] == pytest.approx((2 + 3 + 2) / 3)
    assert row["train/mixed_groups"] == 0.5  # the first of the two that were played
    assert rollout.score[3:].tolist() == [0, 0, 0]
    mask = np.asarray(rollout.buffer.mask)
    assert mask.sum(1).tolist() == [2, 3, 2, 0, 0, 0]
    answer = estimate(
        rollout.buffer, rollout.won, rollout.ending_anchor, player.vocabulary.alphabetical(), proxmo(), texts=6
    )
    np.testing.assert_allclose(np.asarray(answer.success_rate), [0.5, 1.0, 0.0])
    assert not np.asarray(answer.joint)[1:, 1].any()

    games = [Goal("x", i, kind) for i, kind in enumerate("aabbcc")]
    evaluation = Evaluation(config_with(env__name="shop"), player, ScriptedPool(script), games)
    with progress_bar(Console(quiet=True)) as bar:
        row = evaluation.run(init_params(player.config, jax.random.key(0)), bar, "before")
    assert row["eval/games"] == 3
    assert row["eval/turns"] == pytest.approx(7 / 3)
    assert row["eval/success_rate"] == pytest.approx(2 / 3)
    assert row["eval/score"] == pytest.approx(2 / 3)
    assert {k: v for k, v in row.items() if k.startswith("eval/success_rate/")} == {
        "eval/success_rate/a": 0.5,
        "eval/success_rate/b": 1.0,
    }


LONG = {
    "words": "on the table is a cup and " * 400,
    "chinese": "桌子上有一个苹果和一把椅子" * 400,
    "json": '{"items":[' + ",".join(f'{{"id":{i},"name":"lamp_{i}"}}' for i in range(900)) + "]}",
    "one run": "x" * 9000,
    "emoji": "👩‍👩‍👧🇩🇪👍🏽" * 900,
    "spaces": " \n" * 5000,
    "half an emoji": "lamp \ud83d " * 900,
}
MEMORIES = {
    "history": lambda task, seen: History.start(task, seen),
    "notes": Notes.start,
    "shop": ShopNotes.start,
}


@pytest.fixture(scope="module")
def language_player(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder)
    config = config_with(
        model__path=str(folder), rollout__max_prompt_length=900, optimizer__row_length=1024, rollout__prompt="history"
    )
    return make_player(config, make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize("memory", list(MEMORIES))
@pytest.mark.parametrize("text", list(LONG))
def test_a_long_observation_is_cut_by_tokens(language_player, text, memory):
    """Nearly all the room is used: what is left is less than what may not be divided, or the observation's space."""
    notes = MEMORIES[memory]("find the cup", say("a room"))
    notes.remember("look", say(LONG[text]))
    ids = language_player.encode([notes])[0]
    assert len(ids) <= 900
    said = language_player.tokenizer.decode(ids)
    assert "find the cup" in said
    assert "\ufffd" not in said
    assert said.startswith("<|im_start|>user")
    assert said.endswith("assistant\n")  # the template is whole
    if text == "spaces" and memory == "shop":  # which writes one space for many
        return
    assert len(ids) > 900 - 40


@pytest.mark.parametrize("memory", list(MEMORIES))
@pytest.mark.parametrize("text", list(LONG))
def test_a_long_task_is_cut_last_and_that_is_said(language_player, text, memory, monkeypatch):
    said = []
    monkeypatch.setattr(language_player, "say", said.append)
    notes = MEMORIES[memory](LONG[text], say("a room"))
    ids, other = language_player.encode([notes, MEMORIES[memory]("find the cup", say("a room"))])
    assert 900 - 40 < len(ids) <= 900
    assert len(other) < 500
    assert said == ["A task is too long for prompts of 900 tokens: its end is left out."]


def test_long_names_and_commands_end_nothing_either(language_player):
    notes = Notes.start("find the cup", say("a room"))
    notes.here, notes.hand, notes.last = "desk " * 500, "cup " * 500, "go " * 500
    assert 860 < len(language_player.encode([notes])[0]) <= 900
    notes = Notes.start("find the cup", say("a room"))
    notes.places = {f"cabinet {i}": None for i in range(300)}
    ids = language_player.encode([notes])[0]
    assert 860 < len(ids) <= 900
    assert "now You are in the middle of a room." in language_player.tokenizer.decode(ids)


def test_the_most_that_fits_is_kept(tmp_path):
    """Against every number of words, one after the other; a word is a token here."""
    player = small_player(tmp_path)
    for length in range(40, 120, 7):
        notes = Notes("task", "word is on the table " * length)
        notes.places = {f"new {i}": ["word"] * (i % 3) for i in range(length % 5)}
        ids = player.encode([notes])[0]
        assert len(ids) == player.limits.prompt


def test_a_prompt_that_cannot_fit_is_refused_before_anything_is_played(tmp_path):
    small_player(tmp_path, prompt=20).check_room()
    with pytest.raises(UserError, match=r"without task and observation it has \d+ tokens, need at most 8 \(--rollout"):
        small_player(tmp_path, prompt=8).check_room()


def test_demonstrated_commands_that_are_too_long_are_left_out(tmp_path):
    player, said = small_player(tmp_path, response=3), []
    player.say, player.answer_start = said.append, ANSWER_START
    notes = Notes.start("task", say("a room"))
    examples = [Example(notes, command) for command in ("look", "look at the table " * 20, "look at")]
    rollout = demonstration_buffer(player, examples)
    assert rollout.response_lengths.tolist() == [[2], [3]]
    assert said == [
        "1 of 3 demonstrated commands are left out: their responses have up to 81 tokens, need at most 3"
        " (--rollout.max-response-length)"
    ]
    with pytest.raises(UserError, match="every command has 81 tokens or more, need at most 3"):
        demonstration_buffer(player, examples[1:2])


def test_widths_of_prompts_fall_into_few_buckets():
    widths = [width_bucket(n) for n in range(1, 4097)]
    assert all(n <= w <= max(-(-n // 32) * 32, 1.5 * n) for n, w in enumerate(widths, start=1))
    assert len(set(widths)) == 14


def test_equal_prompts_stand_side_by_side_and_short_ones_first():
    rows = [[7, 7], [8], [7, 7], [9, 9, 9], [7, 6], [8], [7, 7], [1]]
    one, two = (make_mesh(devices=jax.devices()[:n]) for n in (1, 2))
    assert reading_order(rows, 16, one).tolist() == [7, 1, 5, 4, 0, 2, 6, 3]
    assert reading_order(rows, 8, two).tolist() == [1, 0, 2, 3, 7, 5, 4, 6]  # each device orders its own


def test_cpus_sample_in_float32(tmp_path, monkeypatch):
    player, found, whole = small_player(tmp_path), [], Player.sample
    player.config = dataclasses.replace(player.config, dtype="bfloat16", lora_rank=2)

    def noted(self, params, policy, *rest):
        found.append((params, policy))
        return whole(self, params, policy, *rest)

    monkeypatch.setattr(Player, "sample", noted)
    play_script(player, lambda slot, attempt, turn: say("look", done=turn == 1), groups=1, members=2)
    ((params, policy),) = found
    assert (policy.dtype, policy.lora_rank) == ("float32", 0)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
