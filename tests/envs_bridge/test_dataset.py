"""Finding ALFWorld's games in a data folder, and saying what was found."""

import json
import shutil
from pathlib import Path

import pytest

from envs_bridge.environments import evenly
from envs_bridge.household.dataset import data_folder, survey
from envs_bridge.household.game import TASK_TYPES, read_game_file
from envs_bridge.household.generate import generate_games
from envs_bridge.household.tasks import task_type
from envs_bridge.shop.tasks import kind
from envs_bridge.turn import Goal


@pytest.fixture
def data(tmp_path):
    """Twelve training and six held-out games, laid out as ALFWorld's data are."""
    generate_games(tmp_path / "json_2.1.1", split="train", count=12, seed=1)
    generate_games(tmp_path / "json_2.1.1", split="valid_seen", count=6, seed=1)
    return tmp_path


def change(path: str | Path, **values) -> None:
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    Path(path).write_text(json.dumps({**content, **values}))


def test_games_are_found_by_split(data):
    found = survey(data)
    assert {split: len(games) for split, games in found.games.items()} == {
        "train": 12,
        "valid_seen": 6,
        "valid_unseen": 0,
    }
    assert found.wordings == {"move": 18}
    assert not found.foreign
    assert not found.left_out
    assert "train 12, valid_seen 6" in str(found)
    assert "'move X to Y'" in str(found)
    assert survey(data / "json_2.1.1").games == found.games
    only = survey(data, ["train"], task_types=TASK_TYPES[:2])
    assert len(only.games["train"]) == 4
    assert {task_type(game) for game in only.games["train"]} == {"pick_and_place_simple", "look_at_obj_in_light"}


def test_what_alfworld_leaves_out_is_left_out(data):
    games = survey(data).games["train"]
    change(games[0], solvable=False)
    Path(games[1]).write_text("{")
    change(
        games[2],
        grammar=json.loads(Path(games[2]).read_text(encoding="utf-8"))["grammar"].replace(
            "You open", "You try to open"
        ),
    )
    trial = Path(games[3]).parent
    moved = trial.parent.with_name("pick_and_place_with_movable_recep-Pen-Bowl-Desk-3") / trial.name
    moved.parent.mkdir()
    shutil.move(trial, moved)
    told = []
    found = survey(data, on_game=told.append)
    assert told == list(range(1, 19))
    assert len(found.games["train"]) == 9  # the foreign one is left to ALFWorld's own engine, not left out
    assert len(found.foreign) == 1
    assert "its grammar (hash" in found.foreign[0]
    assert sum(found.left_out.values()) == 3
    assert "left out: 1 not solvable" in str(found)
    assert "movable" in str(found)
    assert "not JSON" in str(found)


def test_a_folder_without_a_playable_game_says_why(data):
    """Every reason with its count, and the first of the files that cannot be read."""
    games = survey(data).games["train"]
    for game in games[:7]:
        content = json.loads(Path(game).read_text(encoding="utf-8"))
        del content["solvable"]
        Path(game).write_text(json.dumps(content), encoding="utf-8")
    for game in games[7:10]:
        Path(game).write_bytes(b"\xff")
    for game in games[10:]:
        change(game, solvable=False)
    with pytest.raises(ValueError, match="holds no playable game in train: ") as raised:
        survey(data, ["train"])
    said = str(raised.value)
    assert "7 without 'solvable'" in said
    assert "2 not solvable" in said
    assert f"3 unreadable; the first: {games[7]}: cannot be read" in said


def test_half_a_character_in_a_game_is_replaced(data):
    game = survey(data).games["train"][0]
    change(game, walkthrough=["look \ud83d"])
    assert read_game_file(game)["walkthrough"] == ["look ?"]


def test_a_folders_name_does_not_change_a_games_kind(tmp_path):
    files = generate_games(tmp_path / "run#1" / "a#b#c", split="train", count=2, seed=0)
    assert [task_type(str(file)) for file in files] == list(TASK_TYPES[:2])
    assert kind(Goal("runs/shop#2", 3, "garden # home")) == "garden # home"


def test_wordings_are_told_apart(upstream_games):
    current = survey(upstream_games[0].parents[4])
    assert current.wordings == {"move": 8}
    assert {split: len(games) for split, games in current.games.items()} == {
        "train": 6,
        "valid_seen": 1,
        "valid_unseen": 1,
    }
    earlier = survey(Path(str(upstream_games[0].parents[4]).replace("current", "earlier")))
    assert earlier.wordings == {"put": 8}
    assert "before December 2024" in str(earlier)


def test_mixed_wordings_are_warned_of(upstream_games, tmp_path):
    for source in (upstream_games[0], Path(str(upstream_games[1]).replace("current", "earlier"))):
        shutil.copytree(source.parents[1], tmp_path / "train" / source.parts[-3])
    assert "mixes two wordings" in str(survey(tmp_path))


def test_bad_folders_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    with pytest.raises(ValueError, match="set \\$ALFWORLD_DATA"):
        data_folder(None)
    with pytest.raises(ValueError, match="holds none of the folders train, valid_seen, valid_unseen"):
        data_folder(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"holds no playable game in train: there is no SPLIT/TASK/TRIAL/game.tw-pddl"):
        survey(tmp_path, ["train"])
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    assert data_folder(None) == tmp_path


def test_evenly_spread():
    games = [str(i) for i in range(10)]
    assert evenly(games, 3) == ["0", "4", "9"]
    assert evenly(games, 20) == games
    assert evenly([], 3) == []
