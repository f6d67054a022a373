"""Ours against what ALFWorld's own engine said: recorded on generated games, live where its packages are installed."""

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import household_record as record
import pytest

from envs_bridge.household import dialect
from envs_bridge.household.engine import Household
from envs_bridge.household.game import build_game
from envs_bridge.household.verify import lockstep
from envs_bridge.pool import Pool

ROOT = Path(__file__).parents[2]
installed = importlib.util.find_spec("alfworld") is not None and importlib.util.find_spec("textworld") is not None
alfworld = pytest.mark.skipif(
    not installed, reason="ALFWorld's own engine is not installed: pip install 'proxmo-jax[alfworld]'"
)


def test_equals_what_alfworlds_own_engine_said(monkeypatch):
    """90 games, all six task types, both wordings: text, admissible commands and win after every one of 4,196 steps."""
    games = record.recorded_games()
    recorded = json.loads(gzip.decompress(record.RECORD.read_bytes()))
    assert record.digest(games) == recorded["digest"], "the generator's games changed: record them anew"
    sinks, wordings = record.known_dialects(games)
    monkeypatch.setattr(dialect, "SINKS", {**dialect.SINKS, **sinks})
    monkeypatch.setattr(dialect, "WORDINGS", {**dialect.WORDINGS, **wordings})
    steps = 0
    for game, episode in zip(games, recorded["episodes"], strict=True):
        world = Household(build_game(game))
        assert world.task == episode["task"]
        seen = world.reset()
        for command, (text, admissible, won) in zip([None, *episode["commands"]], episode["said"], strict=True):
            if command is not None:
                seen = world.step(command)
                steps += 1
            assert (seen.text, list(seen.admissible), seen.won) == (text, admissible, won), command
    assert steps == 4196
    assert sum(episode["said"][-1][2] for episode in recorded["episodes"]) >= 10  # wins are among them


def live(games, episodes, max_steps):
    with Pool(1, engine="textworld", timeout=600) as pool:
        found = lockstep(
            games,
            lambda game: pool.reset([(0, game)])[0],
            lambda command: pool.step([(0, command)])[0],
            episodes=episodes,
            seed=0,
            max_steps=max_steps,
        )
    assert found.difference is None, str(found.difference)
    assert not found.unplayed, pool.fault
    return found


@alfworld
@pytest.mark.slow
def test_equals_the_engine_live_on_generated_games(games):
    assert live(games, 12, 15).steps > 60


@alfworld
@pytest.mark.slow
def test_equals_the_engine_live_on_upstream_games(upstream_games):
    both = [str(game) for game in upstream_games]
    both += [game.replace("/current/", "/earlier/") for game in both]
    assert live(both, len(both), 20).steps > 100


@alfworld
@pytest.mark.slow
def test_the_engine_says_the_same_with_its_work_remembered(games):
    """Stock and wrapped, each in a process of its own, on the same commands."""
    walkthroughs = [Household.load(game).game.walkthrough for game in games[:3]]
    between = ("look", "inventory", "nonsense", "help")  # before the command that wins, after which engines may differ
    episodes = [[game, (*w[:-1], *between, w[-1])] for game, w in zip(games, walkthroughs, strict=False)]
    said = []
    for engine in ("textworld-stock", "textworld", "fast"):
        request = json.dumps({"engine": engine, "episodes": episodes, "further": 0})
        done = subprocess.run(
            [sys.executable, "-m", "experiments.engine_timing"], input=request, capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        said.append(json.loads(done.stdout)["said"])
    assert said[0] == said[1] == said[2]


@alfworld
def test_another_release_of_textworld_is_left_as_it_is():
    """The guard: source that is not the known one is not touched."""
    code = (
        "from envs_bridge.household import textworld_patch; textworld_patch.KNOWN_SOURCE = 'other';"
        "from textworld.envs.pddl import textgen; before = textgen.deepcopy;"
        "print(textworld_patch.install()); assert textgen.deepcopy is before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "TextWorld, unmodified: its source" in done.stdout


def foreign(game: str, folder: Path) -> str:
    """The same game in words of its own."""
    data = json.loads(Path(game).read_text(encoding="utf-8"))
    data["grammar"] = data["grammar"].replace("You open the", "You carefully open the")
    path = folder / "game.tw-pddl"
    path.write_text(json.dumps(data))
    return str(path)


@alfworld
@pytest.mark.slow
def test_a_foreign_grammar_is_played_by_textworld(games, tmp_path):
    with Pool(1, timeout=120) as pool:
        started = pool.reset([(0, foreign(games[0], tmp_path)), (1, games[0])])
        assert None not in started, pool.fault
        (seen, _), (ours, _) = started
        assert seen == ours  # the first words are the same
        opening = next(command for command in Household.load(games[0]).game.walkthrough if "go to" in command)
        assert None not in pool.step([(0, opening), (1, opening)])


@pytest.mark.skipif(installed, reason="ALFWorld's own engine is installed")
def test_a_foreign_grammar_without_textworld_names_the_cure(games, tmp_path):
    with Pool(1) as pool:
        assert pool.reset([(0, foreign(games[0], tmp_path))]) == [None]
        assert "its grammar (hash" in pool.fault
        assert "pip install 'proxmo-jax[alfworld]'" in pool.fault
