"""Generate solvable household games in ALFWorld's file format from a seed.

A scene (room, furniture) belongs to training or to `valid_unseen`; `valid_seen` has new games in training scenes. Game
`index` of a split depends on (seed, split, level, index) only. Before a game is written, its walkthrough is played and
must win.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from envs_bridge.errors import UserError
from envs_bridge.household import lexicon
from envs_bridge.household.engine import Household
from envs_bridge.household.expert import demonstrate
from envs_bridge.household.game import TASK_TYPES, build_game

SPLITS = ("train", "valid_seen", "valid_unseen")
SCENES = {"train": range(1, 81), "valid_seen": range(1, 81), "valid_unseen": range(81, 100)}
ROOM_NUMBERS = {"kitchen": 0, "livingroom": 200, "bedroom": 300, "bathroom": 400}
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Level:
    """Ranges of the size of a house: receptacles, objects, and copies of the goal's object."""

    receptacles: tuple[int, int]
    objects: tuple[int, int]
    copies: tuple[int, int]


LEVELS = {
    "easy": Level(receptacles=(4, 5), objects=(3, 5), copies=(1, 1)),
    "medium": Level(receptacles=(8, 12), objects=(8, 14), copies=(1, 2)),
    "hard": Level(receptacles=(14, 24), objects=(20, 40), copies=(1, 3)),
}


def generate_games(
    folder: Path,
    *,
    split: str,
    count: int,
    seed: int,
    level: str = "easy",
    on_game: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write games of the six task types in turn.

    Args:
        folder: where the folder of the split is created.
        split: train, valid_seen or valid_unseen.
        count: number of games.
        seed: of scenes and games.
        level: easy, medium or hard.
        on_game: called with the number of games written so far.

    Returns:
        The game files.

    Raises:
        UserError: an unknown split or level, or a count below 1.
    """
    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    if level not in LEVELS:
        raise UserError(f"level must be one of {', '.join(LEVELS)}; got {level!r}")
    if count < 1:
        raise UserError(f"the number of {split} games must be at least 1, got {count}")
    files = []
    for index in range(count):
        task_type = TASK_TYPES[index % len(TASK_TYPES)]
        name, game, trajectory = make_game(split, index, seed, level, task_type)
        target = Path(folder) / split / name / f"trial_{split}_{level}_{seed}_{index:05d}"
        target.mkdir(parents=True, exist_ok=True)
        (target / "traj_data.json").write_text(json.dumps(trajectory), encoding="utf-8")
        (target / "game.tw-pddl").write_text(json.dumps(game), encoding="utf-8")
        files.append(target / "game.tw-pddl")
        if on_game:
            on_game(index + 1)
    return files


def make_game(split: str, index: int, seed: int, level: str, task_type: str) -> tuple[str, dict, dict]:
    """(folder name, game file, traj_data) of one game. Houses that do not fit the task are redrawn."""
    rng = random.Random(f"{seed}/{split}/{level}/{index}")
    while True:
        scene = rng.choice(SCENES[split])
        room = rng.choice(lexicon.TASKS[task_type][0])
        house = _furnish(room, scene, seed, LEVELS[level])
        drawn = _draw_task(rng, task_type, room, house, LEVELS[level])
        if drawn is not None:
            break
    target, destination, placed, phrase = drawn
    problem = _problem(rng, house, placed, task_type, target, destination)
    game = {
        "pddl_domain": (HERE / "household.pddl").read_text(encoding="utf-8"),
        "grammar": (HERE / "household.twl2").read_text(encoding="utf-8").replace("UNKNOWN GOAL", phrase),
        "pddl_problem": problem,
        "solvable": True,
    }
    world = Household(build_game(game))
    game["walkthrough"] = [turn.command for turn in demonstrate(world, rng)]
    if not world.done:
        raise AssertionError(f"generated game {split}/{index} of seed {seed} is not won by its walkthrough")
    lamp = task_type == "look_at_obj_in_light"
    trajectory = {
        "task_id": f"trial_{split}_{level}_{seed}_{index:05d}",
        "task_type": task_type,
        "pddl_params": {
            "mrecep_target": "",
            "object_sliced": False,
            "object_target": target,
            "parent_target": "" if lamp else destination,
            "toggle_target": destination if lamp else "",
        },
        "turk_annotations": {"anns": [{"task_desc": phrase}]},
        "level": level,
    }
    return f"{task_type}-{target}-None-{destination}-{ROOM_NUMBERS[room] + scene}", game, trajectory


def _furnish(room: str, scene: int, seed: int, level: Level) -> list[str]:
    """The receptacle types of a scene, the same in all of its games."""
    rng = random.Random(f"{seed}/{room}/{scene}/{level}")
    always, more = lexicon.ROOMS[room]
    house, left = list(always), dict(more)
    size = rng.randint(*level.receptacles)
    while len(house) < size and left:
        kind = rng.choice(sorted(left))
        house.append(kind)
        left[kind] -= 1
        if left[kind] == 0:
            del left[kind]
    return house


def _draw_task(rng: random.Random, task_type: str, room: str, house: list[str], level: Level):
    """(target object, destination, [(object, receptacle index)], task phrase), or None if nothing fits."""
    _, ability, phrases = lexicon.TASKS[task_type]
    lamp = task_type == "look_at_obj_in_light"
    movable = lexicon.OBJECTS[room] - lexicon.FIXED
    targets = movable & lexicon.ABILITIES[ability] if ability else movable
    pairs = [
        (thing, kind)
        for thing in sorted(targets)
        for kind in (["DeskLamp"] if lamp else sorted(set(house)))
        if lamp or thing in lexicon.HOLDS[kind]
    ]
    if not pairs:
        return None
    target, destination = rng.choice(pairs)
    two = task_type == "pick_two_obj_and_place"

    def places(thing: str) -> list[int]:
        return [i for i, kind in enumerate(house) if thing in lexicon.HOLDS[kind]]

    # No goal object starts at its destination, so every game needs its walkthrough.
    starts = [i for i in places(target) if house[i] != destination]
    lamps = places("DeskLamp")
    if not starts or (lamp and not lamps):
        return None
    placed = [(target, rng.choice(starts)) for _ in range(rng.randint(*level.copies) + two)]
    if lamp:
        placed.append(("DeskLamp", rng.choice(lamps)))
    others = [thing for thing in sorted(movable - {target}) if places(thing)]
    for _ in range(rng.randint(*level.objects) - len(placed)):
        if others:
            thing = rng.choice(others)
            placed.append((thing, rng.choice(places(thing))))
    words = {"obj": target.lower(), "recep": destination.lower(), "toggle": destination.lower()}
    return target, destination, placed, rng.choice(phrases).format(**words)


def _identity(rng: random.Random, kind: str, used: set[str]) -> str:
    """An AI2-THOR id in PDDL spelling, `Mug_bar__minus_00_dot_98_bar_...`, not used yet."""
    while True:
        parts = [kind.removesuffix("Basin")]
        for _ in range(3):
            value = rng.randint(-499, 499)
            sign = "minus" if value < 0 else "plus"
            parts.append(f"_{sign}_{abs(value) // 100:02d}_dot_{abs(value) % 100:02d}")
        if kind.endswith("Basin"):
            parts.append(kind)
        name = "_bar_".join(parts)
        if name not in used:
            used.add(name)
            return name


def _problem(
    rng: random.Random, house: list[str], placed: list[tuple[str, int]], task_type: str, target: str, destination: str
) -> str:
    """The PDDL problem: objects, initial facts and the goal of the task type."""
    used: set[str] = set()
    receptacles = [_identity(rng, kind, used) for kind in house]
    locations = [f"loc_bar_{i}_bar_{rng.randint(0, 30)}_bar_{rng.randint(0, 3)}_bar_60" for i in range(len(house) + 1)]
    things = [_identity(rng, kind, used) for kind, _ in placed]
    kinds = sorted({kind for kind, _ in placed})
    objects = (
        ["agent1 - agent"]
        + [f"{kind}Type - otype" for kind in kinds]
        + [f"{kind}Type - rtype" for kind in sorted(set(house))]
        + [f"{name} - object" for name in things]
        + [f"{name} - receptacle" for name in receptacles]
        + [f"{name} - location" for name in locations]
    )
    facts = [f"receptacleType {name} {kind}Type" for name, kind in zip(receptacles, house, strict=True)]
    facts += [f"objectType {name} {kind}Type" for name, (kind, _) in zip(things, placed, strict=True)]
    facts += [f"canContain {r}Type {o}Type" for r in sorted(set(house)) for o in kinds if o in lexicon.HOLDS[r]]
    for name, (kind, _) in zip(things, placed, strict=True):
        if kind not in lexicon.FIXED:
            facts.append(f"pickupable {name}")
        facts += [f"{ability} {name}" for ability, able in lexicon.ABILITIES.items() if kind in able]
    facts += [f"openable {name}" for name, kind in zip(receptacles, house, strict=True) if kind in lexicon.OPENABLE]
    facts.append(f"atLocation agent1 {locations[-1]}")
    facts += [f"inReceptacle {name} {receptacles[r]}" for name, (_, r) in zip(things, placed, strict=True)]
    facts += [f"receptacleAtLocation {name} {locations[i]}" for i, name in enumerate(receptacles)]
    facts += [f"objectAtLocation {name} {locations[r]}" for name, (_, r) in zip(things, placed, strict=True)]
    return (
        "(define (problem household)\n(:domain alfred)\n(:objects\n"
        + "\n".join(f"  {line}" for line in objects)
        + "\n)\n(:init\n"
        + "\n".join(f"  ({fact})" for fact in facts)
        + f"\n)\n(:goal {_goal(task_type, target, destination)})\n)\n"
    )


def _goal(task_type: str, target: str, destination: str) -> str:
    if task_type == "look_at_obj_in_light":
        return (
            "(and (exists (?ot - object ?r - receptacle ?a - agent ?l - location) (and"
            f" (objectType ?ot {destination}Type) (toggleable ?ot) (isToggled ?ot) (receptacleAtLocation ?r ?l)"
            " (atLocation ?a ?l) (inReceptacle ?ot ?r)))"
            f" (exists (?o - object ?a - agent) (and (objectType ?o {target}Type) (holds ?a ?o))))"
        )
    place = f"(receptacleType ?r {destination}Type)"
    if task_type == "pick_two_obj_and_place":
        return (
            f"(and (exists (?r - receptacle) (exists (?o1 - object) (and (objectType ?o1 {target}Type) {place}"
            f" (inReceptacle ?o1 ?r) (exists (?o2 - object) (and (not (= ?o1 ?o2)) (objectType ?o2 {target}Type)"
            f" {place} (inReceptacle ?o2 ?r)))))))"
        )
    state = lexicon.STATE_OF_TASK.get(task_type)
    ability = lexicon.TASKS[task_type][1]
    extra = f" ({ability} ?o) ({state} ?o)" if state else ""
    return (
        f"(and (exists (?r - receptacle) (exists (?o - object) (and{extra} (objectType ?o {target}Type) {place}"
        " (inReceptacle ?o ?r)))))"
    )
