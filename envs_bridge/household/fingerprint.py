"""What identifies a household game: a hash of its rules, texts and problem, and a hash of what a player meets."""

from __future__ import annotations

from pathlib import Path

from envs_bridge.household.dialect import ForeignGame, domain_hash, grammar_hash
from envs_bridge.household.game import Game, build_game, read_game_file
from envs_bridge.text import digest


def fingerprint(path: str) -> dict[str, str]:
    """What a panel records of a game.

    Args:
        path: a game file.

    Returns:
        name: `SPLIT/TASK/TRIAL`, the last folders of the path. content: a hash of its domain, grammar and problem
        without white space and case where they mean nothing. world: `world_hash`; the content's for a game that our
        engine does not implement. instruction: the task in words, empty for such a game. wording: move or put, or
        foreign.

    Raises:
        GameFileError: the file is invalid.
    """
    data = read_game_file(path)
    content = content_hash(data)
    known = {"name": "/".join(Path(path).parts[-4:-1]), "content": content}
    try:
        game = build_game(data, path)
    except ForeignGame:
        return {**known, "world": content, "instruction": "", "wording": "foreign"}
    instruction = game.dialect.task.removeprefix("Your task is to: ")
    return {**known, "world": world_hash(game), "instruction": instruction, "wording": game.dialect.wording}


def content_hash(data: dict) -> str:
    """The hash of a game file's domain, grammar and problem."""
    problem = " ".join(data["pddl_problem"].lower().split())
    return digest([domain_hash(data["pddl_domain"]), grammar_hash(data["grammar"]), problem])


def world_hash(game: Game) -> str:
    """The hash of furniture, objects, where they are and what is asked for, whatever the wording of the texts.

    Two games of the same hash are the same problem up to the numbers in names. Ids and coordinates are left out, so
    that a generated house is recognised although its ids are drawn anew.
    """

    def thing(o: int) -> list:
        inside = sorted(name.rpartition(" ")[0] for name in game.contents[o])
        return [game.object_type[o], sorted(game.flags[o]), inside, o == game.held]

    places: dict[int, list] = {}
    for r, kind in enumerate(game.receptacle_type):
        things = sorted(thing(o) for o in range(len(game.objects)) if r in game.inside[o])
        places.setdefault(game.receptacle_location[r], []).append([kind, game.openable[r], game.opened[r], things])
    house = sorted([sorted(furniture), where == game.start] for where, furniture in places.items())
    loose = sorted(thing(o) for o in range(len(game.objects)) if not game.inside[o])
    return digest([house, loose, sorted(game.can_contain), vars(game.goal)])
