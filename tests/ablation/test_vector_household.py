"""The array household against the text engine, step for step on the same houses."""

import random

import jax
import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer

from envs_bridge.household.engine import Household
from envs_bridge.household.expert import Habits, demonstrate
from envs_bridge.household.game import TASK_TYPES, build_game, load_game
from envs_bridge.household.generate import make_game
from proxmo_jax.ablation import vector_household as vh

STEP = jax.jit(vh.step)
ADMISSIBLE = jax.jit(vh.admissible)


def games(level: str, count: int, seed: int = 0):
    kinds = [TASK_TYPES[i % 6] for i in range(count)]
    return [build_game(make_game("train", i, seed, level, kind)[1]) for i, kind in enumerate(kinds)]


@pytest.mark.parametrize(("level", "count"), [("easy", 36), ("medium", 18), ("hard", 12)])
def test_step_for_step_as_the_text_engine(level, count):
    """Texts to the letter, sets of admissible commands, wins; guided, random and impossible commands."""
    played = games(level, count)
    houses, texts = vh.build(played)
    rng = random.Random(level)
    steps, wins, verbs = 0, 0, set()
    for h, game in enumerate(played):
        world, house = Household(game), vh.pick(houses, h)
        expert = [turn.command for turn in demonstrate(world, rng, Habits(0.5, 0.3), max_turns=30)]
        for episode in range(2):
            seen, state = world.reset(), vh.reset(house)
            assert vh.say(texts, house.start) == seen.text
            for turn in range(40):
                names = vh.command_texts(game, houses.receptacle.shape[1], houses.object.shape[1], state)
                possible = np.asarray(ADMISSIBLE(house, state))
                assert sorted(n for n, p in zip(names, possible, strict=True) if p) == list(seen.admissible)
                if episode == 0 and turn < len(expert) and expert[turn] in names:
                    number = names.index(expert[turn])
                elif rng.random() < 0.2:
                    number = rng.randrange(len(names))
                else:
                    verb = np.asarray(vh.split(house, np.arange(len(names)))[0])
                    number = rng.choice(
                        np.flatnonzero(possible & (verb == rng.choice(sorted({*verb[possible].tolist()})))).tolist()
                    )
                verbs.add(int(vh.split(house, number)[0]) if possible[number] else -1)
                seen = world.step(names[number] or "dance")
                state, row, won = STEP(house, state, number)
                assert vh.say(texts, row) == seen.text, names[number]
                assert bool(won) == seen.won
                steps += 1
                if seen.done:
                    wins += 1
                    break
    assert steps > 20 * count
    assert wins >= count // 3
    assert verbs >= set(range(len(vh.VERBS))) - {vh.SLICE}


def test_sliced_and_cooled_things_are_said_as_the_engine_says_them():
    """A house with a knife and bread in it, played so that every state is looked at."""
    for seed in range(40):
        game = games("hard", 6, seed)[4]
        cold = [o for o, flags in enumerate(game.flags) if {"sliceable", "coolable", "pickupable"} <= flags]
        knife = [o for o, kind in enumerate(game.object_type) if "knife" in kind]
        if cold and knife:
            break
    houses, texts = vh.build([game])
    world, house = Household(game), vh.pick(houses, 0)
    seen, state = world.reset(), vh.reset(house)
    thing, tool, fridge = game.objects[cold[0]], game.objects[knife[0]], "fridge 1"
    home, tools = (game.receptacles[game.inside[o][0]] for o in (cold[0], knife[0]))
    table = "countertop 1"
    plan = [f"go to {tools}", f"open {tools}", f"take {tool} from {tools}", f"go to {home}", f"open {home}",
            f"slice {thing} with {tool}", f"go to {table}", f"move {tool} to {table}", f"go to {home}",
            f"take {thing} from {home}", f"examine {thing}", f"go to {fridge}", f"cool {thing} with {fridge}",
            f"examine {thing}", "go to sinkbasin 1", f"clean {thing} with sinkbasin 1", f"examine {thing}",
            "inventory", "look", "go to microwave 1", f"heat {thing} with microwave 1", f"examine {thing}"]  # fmt: skip
    said = []
    for command in plan:
        names = vh.command_texts(game, houses.receptacle.shape[1], houses.object.shape[1], state)
        if command not in names:
            continue
        state, row, _ = STEP(house, state, names.index(command))
        seen = world.step(command)
        assert vh.say(texts, row) == seen.text
        said.append(seen.text)
    assert any("sliced" in text and "cool" in text for text in said), said


def test_words_of_the_pieces_are_scikit_learns_words_of_the_text():
    played = games("medium", 6)
    houses, texts = vh.build(played)
    count = CountVectorizer(vocabulary=texts.vocabulary)
    rng, state = np.random.default_rng(0), [vh.reset(vh.pick(houses, h)) for h in range(6)]
    for h in range(6):
        house = vh.pick(houses, h)
        np.testing.assert_array_equal(
            texts.words[houses.start[h]].sum(0), count.transform([vh.say(texts, houses.start[h])]).toarray()[0]
        )
        for _ in range(20):
            number = rng.choice(np.flatnonzero(ADMISSIBLE(house, state[h])))
            state[h], row, _ = STEP(house, state[h], number)
            expected = count.transform([vh.say(texts, row)]).toarray()[0]
            np.testing.assert_array_equal(texts.words[np.asarray(row)].sum(0), expected)


def test_houses_that_are_not_the_generators_are_refused(upstream_games):
    game = load_game(str(upstream_games[0]))
    with pytest.raises(ValueError, match=r"has .*, which the array household does not know"):
        vh.build([game])
    _, data, _ = make_game("train", 0, 0, "easy", TASK_TYPES[0])
    facts = data["pddl_problem"]
    held = facts[facts.index("(inReceptacle ") :].split(")")[0].split()[1]
    data["pddl_problem"] = facts.replace("(atLocation agent1", f"(holds agent1 {held})\n  (atLocation agent1")
    with pytest.raises(ValueError, match="has something in hand at the start"):
        vh.build([build_game(data)])
