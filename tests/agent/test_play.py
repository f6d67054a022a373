"""Games played by hand: through a real terminal, kept as demonstrations, and cloned."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nested import config_with, plain
from rich.console import Console

from envs_bridge.errors import UserError
from envs_bridge.household.engine import Household
from envs_bridge.household.expert import replay
from envs_bridge.household.game import TASK_TYPES, build_game
from envs_bridge.household.generate import make_game
from envs_bridge.played import append_episode, read_episodes
from envs_bridge.shop.generate import generate_catalogue
from envs_bridge.turn import Demonstrated, Observation
from proxmo_jax import cli
from proxmo_jax.agent.demonstrations import demonstrations
from proxmo_jax.agent.play import shown
from proxmo_jax.agent.warm_start import careful_and_careless, refuse_missing_demonstrations

ROOT = Path(__file__).parents[2]


def answers() -> list[str]:
    """What a player types who knows the walkthrough of the first game: numbers, a reason with the first of them."""
    _, game, _ = make_game("train", 0, 0, "easy", TASK_TYPES[0])
    world = Household(build_game(game))
    seen, typed = world.reset(), []
    for command in game["walkthrough"]:
        typed.append(str(seen.admissible.index(command) + 1))
        seen = world.step(command)
    typed[0] += " It may be there."
    return typed


def test_a_game_is_solved_in_a_terminal_and_kept(tmp_path):
    kept = tmp_path / "mine.jsonl"
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "proxmo_jax", "play", "--keep", str(kept)]
    player = subprocess.Popen(
        command, cwd=ROOT, stdin=follower, stdout=follower, stderr=follower, env={**os.environ, "COLUMNS": "100"}
    )
    os.close(follower)
    said, waiting, until = "", ["99", "", *answers()], time.monotonic() + 120
    while time.monotonic() < until:
        try:
            said += os.read(leader, 4096).decode()
        except OSError:  # the terminal is closed when the player has ended
            break
        if said.endswith("> ") and waiting:
            said += "|"
            os.write(leader, waiting.pop(0).encode() + b"\n")
    assert player.wait(timeout=10) == 0, said
    os.close(leader)
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said)  # colours
    assert "There is no 99; need 1 to" in said
    assert f"Solved in {len(answers())} turns; score 1." in said
    ((task, turns),) = read_episodes(kept, "household")
    assert task in said
    assert turns[0].thought == "It may be there."
    assert [turn.thought for turn in turns[1:]] == [""] * (len(turns) - 1)
    # A warm start reads what it would read of a demonstrator that gives the same commands.
    _, game, _ = make_game("train", 0, 0, "easy", TASK_TYPES[0])
    world = Household(build_game(game))
    shown_to_it = demonstrations([(world.task, replay(world, game["walkthrough"]))])
    cloned = demonstrations([(task, turns)])
    assert [(e.memory.prompt(), e.command) for e in cloned] == [(e.memory.prompt(), e.command) for e in shown_to_it]
    assert world.won()


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    return generate_catalogue(tmp_path_factory.mktemp("shop"), count=60, seed=2)


def typing(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_search_asks_for_its_words_and_the_end_of_input_leaves(shop, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PROXMO_CACHE", str(tmp_path / "cache"))
    typing(monkeypatch, "1", "bath [soap]", "click[next >]")
    kept = tmp_path / "mine.jsonl"
    assert cli.main(["play", "--env", "shop", "--data", str(shop), "--keep", str(kept)]) == 0
    out = plain(capsys.readouterr().out)
    assert "search for: " in out
    assert "Page 1 (Total results: " in out
    assert "Page 2 (Total results: " in out
    assert "Left after 2 turns, not solved. It is not kept" in out
    assert not kept.exists()


def test_the_turn_limit_ends_the_game(monkeypatch, capsys):
    typing(monkeypatch, "look", "dance", "look")
    assert cli.main(["play", "--turns", "2"]) == 0
    assert "Not solved in 2 turns; score 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "test"], "--split must be one of train, valid_seen, valid_unseen; got 'test'"),
        (["--split", "valid_seen", "--keep", "x"], "an episode of valid_seen is no demonstration"),
        (["--env", "alfworld", "--data", "/nowhere"], "--data: /nowhere holds none of the folders"),
        (["--env", "webshop"], "--env webshop needs --env.webshop DIR"),
        (["--keep", "/nowhere/x"], "--keep: /nowhere is no folder that can be written"),
        (["--game", "-1"], "--game and --turns must be at least 0"),
    ],
)
def test_what_cannot_be_played_is_refused(options, message, capsys):
    assert cli.main(["play", *options]) == 2
    assert message in plain(capsys.readouterr().err)


def test_a_terminal_is_not_obeyed():
    assert shown("a\x1b[2Jb\r\x07\u202e\nc") == "a?[2Jb???\nc"


def episode(*commands: str) -> list[Demonstrated]:
    return [Demonstrated(Observation("You see a door.", ("go", "stay")), c, "why") for c in commands]


def test_kept_episodes_are_cloned_beside_the_demonstrator_or_alone(games, tmp_path):
    file = tmp_path / "mine.jsonl"
    append_episode(file, "household", "leave", episode("go", "stay"))
    append_episode(file, "household", "leave \ud800", episode("go"))
    config = config_with(warm_start__demonstrations=file)
    both = careful_and_careless(config, games[:2], Console(quiet=True))
    wanted = [("go", "why"), ("stay", "why"), ("go", "why")]
    assert all([(e.command, e.thought) for e in part[:3]] == wanted for part in both)
    assert all(len(part) > 6 for part in both)
    file.unlink()
    append_episode(file, "webshop", "buy", episode("go"))
    alone = config_with(env__name="webshop", warm_start__demonstrations=file)
    refuse_missing_demonstrations(alone)
    assert [[e.command for e in part] for part in careful_and_careless(alone, [], Console(quiet=True))] == [["go"]] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no episode; proxmo play --keep adds solved ones"),
        ("{", "line 1: is no episode of proxmo play"),
        (json.dumps({"env": "household", "task": "t", "turns": []}), "turns must not be empty"),
        (json.dumps({"env": "household", "task": "t", "turns": [{"text": 1}]}), "is no episode of proxmo play"),
        (json.dumps({"env": "shop", "task": "t", "turns": [{"text": "a", "command": "b", "admissible": []}]}),
         "is an episode of 'shop', need household"),
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_refused(tmp_path, text, message):
    (tmp_path / "mine.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        refuse_missing_demonstrations(config_with(warm_start__demonstrations=tmp_path / "mine.jsonl"))
