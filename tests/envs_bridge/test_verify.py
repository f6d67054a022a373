"""Two engines side by side: ours against itself, against one that is wrong, and against ALFWorld's own where it is."""

import dataclasses
import importlib.util

import pytest

from envs_bridge.household.engine import Household
from envs_bridge.household.verify import lockstep
from envs_bridge.pool import Pool
from proxmo_jax.cli import main


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
    found = lockstep(games, other.reset, other.step, episodes=24, seed=1)
    assert found.difference is None
    assert found.episodes == 24
    assert found.steps > 200
    assert str(found) == f"24 episodes, {found.steps} steps, 0 differences"


@pytest.mark.parametrize(
    ("name", "value"), [("text", "Something else."), ("admissible", ("look", "fly")), ("won", True), ("reward", 0.5)]
)
def test_the_first_difference_is_shown(games, name, value):
    other = Other(lambda turn, seen: dataclasses.replace(seen, **{name: value}) if turn == 3 else seen)
    found = lockstep(games, other.reset, other.step, episodes=4, seed=1)
    assert found.steps == 3
    assert found.difference is not None
    assert len(found.difference.commands) == 3
    assert "differ after 3 commands" in str(found.difference)
    assert {"admissible": "fly"}.get(name, str(value)) in str(found.difference)
    assert str(found).endswith("1 differences")


def test_a_difference_at_the_last_step_counts(games):
    other = Other(lambda turn, seen: dataclasses.replace(seen, text="?") if turn == 3 else seen)
    assert lockstep(games, other.reset, other.step, episodes=1, seed=1, max_steps=3).difference is not None


def test_games_the_other_engine_cannot_start_are_counted(games):
    other = Other()
    found = lockstep(
        games[:2], lambda game: None if game == games[0] else other.reset(game), other.step, episodes=4, seed=1
    )
    assert found.episodes == 2
    assert found.unplayed == [games[0]] * 2


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
