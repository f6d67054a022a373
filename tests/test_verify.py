"""Two engines side by side: ours against itself, against one that is wrong, and against ALFWorld's own where it is."""

import dataclasses
import importlib.util

import pytest

from envs_bridge.household.engine import Household
from envs_bridge.household.verify import lockstep
from envs_bridge.pool import Pool
from proxmo_jax.cli import main

alfworld = pytest.mark.skipif(
    importlib.util.find_spec("alfworld") is None or importlib.util.find_spec("textworld") is None,
    reason="ALFWorld's own engine is not installed: pip install 'proxmo-jax[alfworld]'",
)


class Other:
    """A second copy of our engine, changed at one turn."""

    def __init__(self, change=lambda turn, seen: seen):
        self.change, self.turn = change, 0

    def reset(self, game):
        self.world, self.turn = Household.load(game), 0
        return self.world.reset(), self.world.task

    def step(self, command):
        self.turn += 1
        return self.change(self.turn, self.world.step(command))


def test_an_engine_agrees_with_itself(games):
    other = Other()
    episodes, steps, difference = lockstep(games, other.reset, other.step, episodes=24, seed=1)
    assert difference is None
    assert episodes == 24
    assert steps > 200


@pytest.mark.parametrize(
    ("name", "value"), [("text", "Something else."), ("admissible", ("look", "fly")), ("won", True), ("reward", 0.5)]
)
def test_the_first_difference_is_shown(games, name, value):
    other = Other(lambda turn, seen: dataclasses.replace(seen, **{name: value}) if turn == 3 else seen)
    _, steps, difference = lockstep(games, other.reset, other.step, episodes=4, seed=1)
    assert steps == 3
    assert difference is not None
    assert len(difference.commands) == 3
    assert "differ after 3 commands" in str(difference)
    assert {"admissible": "fly"}.get(name, str(value)) in str(difference)


def test_guided_episodes_win(games):
    wins = []
    other = Other(lambda turn, seen: wins.append(seen.won) or seen)
    lockstep(games, other.reset, other.step, episodes=1, seed=0)
    assert wins[-1]


def test_the_command_refuses_a_folder_without_games(tmp_path, capsys):
    assert main(["verify-env", "household", "--games", str(tmp_path)]) == 2
    assert "holds no game.tw-pddl" in capsys.readouterr().err
    assert main(["verify-env", "spaceship"]) == 2


@pytest.mark.skipif(importlib.util.find_spec("alfworld") is not None, reason="ALFWorld's own engine is installed")
def test_a_missing_engine_names_the_cure(games):
    with Pool(1, engine="textworld") as pool:
        assert pool.reset([(0, games[0])]) == [None]
        assert "pip install 'proxmo-jax[alfworld]'" in pool.fault


@alfworld
@pytest.mark.slow
def test_equals_alfworlds_own_engine(games):
    with Pool(1, engine="textworld", timeout=600) as pool:
        _, steps, difference = lockstep(
            games, lambda game: pool.reset([(0, game)])[0], lambda command: pool.step([(0, command)])[0],
            episodes=12, seed=0, max_steps=15,
        )  # fmt: skip
    assert difference is None, str(difference)
    assert steps > 60
