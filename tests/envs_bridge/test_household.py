import json
import random
import re
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs_bridge.household.engine import NOTHING, Household
from envs_bridge.household.expert import Habits, demonstrate, episodes, next_command
from envs_bridge.household.game import TASK_TYPES, GameFileError, build_game, load_game
from envs_bridge.household.generate import LEVELS, generate_games, make_game


def play(world: Household, commands) -> None:
    seen = world.reset()
    for command in commands:
        assert command in seen.admissible, (command, seen.admissible)
        seen = world.step(command)
    assert seen.won
    assert seen.reward == 1.0


def test_upstream_games_are_won_by_their_walkthroughs(upstream_games):
    for path in upstream_games:
        world = Household.load(str(path))
        play(world, world.game.walkthrough)


def test_upstream_games_in_the_earlier_wording(upstream_games):
    for path in upstream_games:
        earlier = Path(str(path).replace("current", "earlier"))
        world = Household.load(str(earlier))
        assert world.dialect.wording == "put"
        walkthrough = Household.load(str(path)).game.walkthrough
        put = [
            c.replace("move ", "put ").replace(" to ", " in/on ") if c.startswith("move") else c for c in walkthrough
        ]
        play(world, put)


def test_first_words_of_an_upstream_game(upstream_games):
    path = next(p for p in upstream_games if "Pen-None-DeskLamp" in str(p))
    world = Household.load(str(path))
    assert world.text.startswith(
        "-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. Looking quickly"
    )
    assert world.text.endswith("Your task is to: look at pen under the desklamp.")
    assert world.step("go to desk 1").text == (
        "You arrive at desk 1. On the desk 1, you see a cd 1, a laptop 1, and a pen 1."
    )
    assert world.step("look").text == "You are facing the desk 1. Next to it, you see nothing."
    assert world.step("examine cd 1").text == NOTHING  # only what is in hand can be examined
    assert world.step("take cd 1 from desk 1").text == "You pick up the cd 1 from the desk 1."
    assert world.step("examine cd 1").text == "There's nothing special about cd 1."
    assert world.step("inventory").text == "You are carrying: a cd 1."


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_generated_games_are_solvable_and_not_solved_at_the_start(level, task_type):
    for index in range(5):
        name, data, trajectory = make_game("train", index, 3, level, task_type)
        assert name.startswith(task_type)
        assert trajectory["task_type"] == task_type
        world = Household(build_game(data))
        assert not world.won()
        play(world, world.game.walkthrough)
        low, high = LEVELS[level].receptacles
        assert min(low, 4) <= len(world.game.receptacles) <= high


def test_games_depend_on_the_seed_alone(tmp_path):
    a, b, c = (make_game("train", 4, seed, "easy", TASK_TYPES[4])[1] for seed in (1, 1, 2))
    assert a == b != c
    files = generate_games(tmp_path, split="valid_unseen", count=7, seed=1)
    assert len(set(files)) == 7
    scenes = {int(p.parts[-3].rpartition("-")[2]) % 100 for p in files}
    assert all(81 <= scene <= 99 for scene in scenes)  # never a training scene


def test_every_admissible_command_does_something_and_nothing_else_does(games):
    for path in games:
        rng = random.Random(path)
        world = Household.load(path)
        seen = world.reset()
        for _ in range(40):
            before = seen.admissible
            assert world.step("open the pod bay doors").text == NOTHING
            seen = world.step(rng.choice(before))
            assert seen.text != NOTHING
            if seen.done:
                break


@given(st.integers(0, 11), st.integers(0, 1000), st.floats(0, 1), st.floats(0, 0.5))
def test_the_expert_recovers_from_every_habit(games, index, seed, search, mistake):
    world = Household.load(games[index])
    turns = demonstrate(world, random.Random(seed), Habits(search, mistake), max_turns=400)
    assert world.done
    if mistake == 0:
        assert all(turn.command in turn.seen.admissible for turn in turns)


def test_the_expert_wins_upstream_games(upstream_games):
    for path in upstream_games:
        world = Household.load(str(path))
        for _ in range(20):
            if world.step(next_command(world)).done:
                break
        assert world.done


@pytest.mark.parametrize("kind", ["pick_clean_then_place_in_recep", "look_at_obj_in_light"])
def test_a_house_without_what_the_goal_needs_is_played_by_its_walkthrough(tmp_path, kind):
    """Nothing in it cleans, or the lamp stands nowhere."""
    game = make_game("train", 1, 0, "easy", kind)[1]
    kinds = re.findall(r"\(receptacletype \S+ (\S+)\)", game["pddl_problem"], re.IGNORECASE)
    other = next(kind for kind in kinds if kind.lower() != "sinkbasintype")
    fact, instead = {
        "look_at_obj_in_light": (r"\(inreceptacle \S*lamp\S* \S+\)", ""),
        "pick_clean_then_place_in_recep": (r"\(receptacletype (\S+) sinkbasintype\)", rf"(receptacletype \1 {other})"),
    }[kind]
    problem, count = re.subn(fact, instead, game["pddl_problem"], flags=re.IGNORECASE)
    assert count
    path = tmp_path / "game.tw-pddl"
    path.write_text(json.dumps({**game, "pddl_problem": problem}))
    world = Household.load(str(path))
    with pytest.raises(ValueError, match=r"game\.tw-pddl: no"):
        deque((world.step(next_command(world)) for _ in range(20)), maxlen=0)
    ((task, turns),) = episodes([str(path)], seed=0, habits=Habits(0.0, 0.0), max_turns=20)
    assert task
    assert turns


@given(st.text(max_size=200))
def test_no_answer_crashes_the_engine(games, text):
    world = Household.load(games[0])
    seen = world.step(text)
    assert seen.text == NOTHING or text.strip() in world.reset().admissible


BROKEN = {
    "not JSON": lambda d: "{",
    "need an object": lambda d: "[]",
    "needs a text under 'grammar'": lambda d: {**d, "grammar": None},
    "its grammar has no": lambda d: {**d, "grammar": "hello"},
    "is not one our engine implements": lambda d: {**d, "grammar": d["grammar"].replace("You open", "You try to open")},
    "its pddl_domain (hash": lambda d: {**d, "pddl_domain": d["pddl_domain"].replace("(coolable ?o)", "")},
    "ends inside a parenthesis": lambda d: {**d, "pddl_problem": d["pddl_problem"][:-40]},
    "no (:goal ...) section": lambda d: {**d, "pddl_problem": d["pddl_problem"].replace("(:goal", "(:gaol")},
    "none of the six task types": lambda d: {**d, "pddl_problem": d["pddl_problem"].replace("(holds", "(sings")},
    ":objects does not declare": lambda d: {**d, "pddl_problem": d["pddl_problem"].replace("agent1 - agent", "")},
    "names no thing": lambda d: {**d, "pddl_problem": d["pddl_problem"].replace("_bar_", "_x_")},
    "'walkthrough' must be a list": lambda d: {**d, "walkthrough": "go"},
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_malformed_file_is_named_with_its_fault(fault, tmp_path):
    good = make_game("train", 1, 0, "easy", "look_at_obj_in_light")[1]
    broken = BROKEN[fault](good)
    path = tmp_path / "game.tw-pddl"
    path.write_text(broken if isinstance(broken, str) else json.dumps(broken))
    with pytest.raises(GameFileError) as error:
        load_game(str(path))
    assert str(path) in str(error.value)
    assert fault in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(GameFileError, match=r"absent\.tw-pddl: cannot be read"):
        load_game(str(tmp_path / "absent.tw-pddl"))
