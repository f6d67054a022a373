"""Demonstrations as training data: responses in the form the parser reads, with reasons that a player could know."""

import random
import re

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nested import config_with
from scripted import say
from tiny_model import write_tiny_model

from envs_bridge.actions import project
from envs_bridge.household.engine import Household
from envs_bridge.household.expert import Habits, demonstrate
from envs_bridge.household.generate import generate_games
from envs_bridge.prompts import ANSWER_START, Notes
from envs_bridge.shop.catalogue import Catalogue, prepare
from envs_bridge.shop.engine import Shopping
from envs_bridge.shop.expert import demonstrate as shop
from envs_bridge.shop.generate import generate_catalogue
from proxmo_jax.agent.demonstrations import Example, answer, demonstration_buffer
from proxmo_jax.agent.make_player import language_player
from proxmo_jax.policy.sharding import make_mesh

WORDS = st.text(st.characters(codec="ascii", categories=["L", "N", "Zs"]), min_size=1, max_size=30)


@given(WORDS, WORDS, st.sampled_from(["", "<think>\n", "<think>\n\n</think>\n\n", ANSWER_START]))
def test_a_response_is_read_as_the_command_it_was_made_of(thought, command, begun):
    response = begun + answer(begun, thought, command)
    assert project(response) == (command.lower().strip(), True)
    assert response.count("<think>") == response.count("<action>") == 1
    assert (thought in response) or "</think>" in begun or "<action>" in begun


@pytest.fixture(scope="module")
def player(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder)
    config = config_with(model__path=str(folder), rollout__max_response_length=60, optimizer__row_length=256)
    return language_player(config, make_mesh(devices=jax.devices()[:1]))


def texts_of(player, rollout) -> list[str]:
    rows = zip(rollout.buffer.responses[:, 0].tolist(), rollout.response_lengths[:, 0].tolist(), strict=True)
    return player.tokenizer.batch_decode([row[:n] for row, n in rows])


def test_a_language_model_is_shown_thoughts_that_fit_and_its_own_end_of_turn(player):
    said: list[str] = []
    player.say = said.append
    notes = Notes.start("task", say("a room"))
    examples = [Example(notes, "look", "I am lost."), Example(notes, "look", "I am lost. " * 9)]
    examples.append(Example(notes, "look at the table " * 9, "Oh."))
    rollout = demonstration_buffer(player, examples, thoughts=True)
    bare = "<think></think><action>look</action><|im_end|>"
    assert texts_of(player, rollout) == [bare.replace("<think>", "<think>I am lost."), bare]
    assert [sentence.split(":")[0] for sentence in said] == [
        "2 of 3 demonstrated thoughts are left out",
        "1 of 3 demonstrated commands are left out",
    ]
    assert texts_of(player, demonstration_buffer(player, examples[:1])) == [bare]


@pytest.fixture(scope="module")
def houses(tmp_path_factory):
    folder = tmp_path_factory.mktemp("games")
    return [str(game) for game in generate_games(folder, split="train", count=24, seed=3, level="easy")]


@pytest.mark.parametrize("search", [0.5, 1.0])
def test_reasons_name_what_the_player_has_seen(houses, search):
    """A place is called new exactly if nothing of it was shown, and a thing is seen only where it was shown."""
    kinds = set()
    for i, path in enumerate(houses):
        shown: dict[str, str] = {}  # what each place was seen to hold
        at = ""
        for seen, command, thought in demonstrate(Household.load(path), random.Random(i), Habits(search)):
            if contents := re.search(r"(?:On the ([^,.]+)|In it), you see ([^.]*)\.", seen.text):
                shown[contents.group(1) or at] = contents.group(2)
            if new := re.fullmatch(r"I need a (\w+), and (.+) is new to me\.", thought):
                assert new.group(2) not in shown
                assert command == f"go to {new.group(2)}"
            elif saw := re.fullmatch(r"I saw a (\w+) at (.+)\.", thought):
                assert saw.group(1) in shown[saw.group(2)]
                assert command == f"go to {saw.group(2)}"
            elif here := re.fullmatch(r"Here is (.+), which I need\.", thought):
                assert here.group(1) in shown[at]
                assert command.startswith(f"take {here.group(1)} ")
            assert re.fullmatch(r"[A-Z0-9a-z].*\.", thought)
            assert "type" not in thought
            kinds.add(" ".join(thought.split()[:2]))
            at = command.removeprefix("go to ") if command.startswith("go to ") else at
    assert {"I need", "Here is"} <= kinds
    assert any(kind.endswith("1") for kind in kinds)  # what is to be done with the thing in hand


def test_a_shops_reasons_follow_the_page(tmp_path):
    catalogue = Catalogue(prepare(generate_catalogue(tmp_path, count=40, seed=0), cache=tmp_path))
    for i in range(10):
        turns = shop(Shopping(catalogue, catalogue.goal(i)), random.Random(i), 0.0, max_turns=10)
        assert all(turn.thought for turn in turns)
        assert turns[0].thought == "I search for what the instruction names."
        bought = [turn.thought for turn in turns if turn.command == "click[buy now]"]
        assert bought == ["Nothing is left to choose, so I buy it."]
    careless = shop(Shopping(catalogue, catalogue.goal(0)), random.Random(0), 1.0, max_turns=2)
    assert careless[0].thought == f"Let me {careless[0].command}."
