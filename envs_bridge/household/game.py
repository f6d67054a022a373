"""Read ALFWorld game files (`game.tw-pddl`) into plain tables, with clear errors for invalid files.

A game file is JSON with `pddl_domain`, `grammar`, `pddl_problem` and perhaps `walkthrough`. The file's text is
parsed, never evaluated. Names and their order follow ALFWorld: an entity `Mug_bar__plus_01...` is the n-th mug,
counted from the end of the sorted ids.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from envs_bridge.household.dialect import Dialect, ForeignGame, GameFileError, read_dialect
from envs_bridge.text import load_json

TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)

# PDDL predicates on one object, lower-cased, and the engine's names of them.
OBJECT_FLAGS = {
    "pickupable": "pickupable",
    "isreceptacleobject": "container",
    "cleanable": "cleanable",
    "heatable": "heatable",
    "coolable": "coolable",
    "toggleable": "toggleable",
    "sliceable": "sliceable",
    "isclean": "clean",
    "ishot": "hot",
    "iscool": "cool",
    "istoggled": "toggled",
    "issliced": "sliced",
}
GOAL_STATES = ("isclean", "ishot", "iscool", "issliced")
GOAL_ABILITIES = ("cleanable", "heatable", "coolable", "sliceable", "toggleable")


@dataclass(frozen=True)
class Goal:
    """What wins: `count` objects of `object_type`, in all `states`, in one `receptacle_type` receptacle; or, if
    `lamp_type` is set, such an object in hand beside a lamp that was used."""

    object_type: str
    receptacle_type: str = ""
    states: tuple[str, ...] = ()
    abilities: tuple[str, ...] = ()
    count: int = 1
    lamp_type: str = ""


@dataclass(frozen=True)
class Game:
    """A household before the first turn. Objects, receptacles and locations are indices of sorted tables.

    start, held: the agent's location, and the object in hand or -1.
    object_location, inside: initial location of each object (or -1) and the receptacles it lies in.
    contents: for each object that holds others, the names of those others.
    can_contain: pairs of a receptacle type and an object type that fits in it.
    """

    path: str
    dialect: Dialect
    walkthrough: tuple[str, ...]
    goal: Goal
    receptacles: tuple[str, ...]
    receptacle_type: tuple[str, ...]
    receptacle_location: tuple[int, ...]
    openable: tuple[bool, ...]
    opened: tuple[bool, ...]
    locations: tuple[str, ...]
    start: int
    held: int
    objects: tuple[str, ...]
    object_type: tuple[str, ...]
    object_location: tuple[int, ...]
    inside: tuple[tuple[int, ...], ...]
    flags: tuple[frozenset[str], ...]
    contents: tuple[tuple[str, ...], ...]
    can_contain: frozenset[tuple[str, str]]


@functools.lru_cache(maxsize=256)
def load_game(path: str) -> Game:
    """The game in the file, read once per process. Raises GameFileError, ForeignGame."""
    return build_game(read_game_file(path), path)


def read_game_file(path: str) -> dict:
    """The JSON of a game file, checked for its three texts. Raises GameFileError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GameFileError(f"{path}: cannot be read ({error})") from error
    try:
        data = load_json(text)
    except ValueError as error:
        raise GameFileError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise GameFileError(f"{path}: holds a JSON {type(data).__name__}, need an object")
    for key in ("pddl_domain", "grammar", "pddl_problem"):
        if not isinstance(data.get(key), str):
            raise GameFileError(f"{path}: needs a text under {key!r}")
    walkthrough = data.get("walkthrough") or []
    if not isinstance(walkthrough, list) or not all(isinstance(c, str) for c in walkthrough):
        raise GameFileError(f"{path}: 'walkthrough' must be a list of commands")
    return data


def build_game(data: dict, path: str = "game") -> Game:
    """Build a game from the JSON of its file.

    Args:
        data: the JSON.
        path: named in errors.

    Raises:
        GameFileError: the file is invalid.
        ForeignGame: the file is valid, but our engine does not implement its rules or texts.
    """
    try:
        dialect = read_dialect(data["pddl_domain"], data["grammar"])
        return _build(path, dialect, _sections(data["pddl_problem"]), tuple(data.get("walkthrough") or ()))
    except GameFileError as error:
        raise type(error)(f"{path}: {error}") from error


def _sections(problem: str) -> dict[str, list]:
    """`(define (problem x) (:objects ...) (:init ...) (:goal ...))` as {section: its items}."""
    tree = _parse_lists(problem.lower())
    sections = {}
    for item in tree[1:] if tree[:1] == ["define"] else []:
        if isinstance(item, list) and item and isinstance(item[0], str):
            sections[item[0]] = item[1:]
    for need in (":objects", ":init", ":goal"):
        if need not in sections:
            raise GameFileError(f"the PDDL problem has no ({need} ...) section")
    return sections


_PDDL_TOKEN = re.compile(r";[^\n]*|[()]|[^\s();]+")


def _parse_lists(text: str) -> list:
    """Nested lists from parentheses; PDDL comments are dropped."""
    stack: list[list] = [[]]
    for token in _PDDL_TOKEN.findall(text):
        if token == "(":
            stack.append([])
        elif token == ")":
            if len(stack) == 1:
                raise GameFileError("the PDDL problem closes a parenthesis that was not opened")
            done = stack.pop()
            stack[-1].append(done)
        elif not token.startswith(";"):
            stack[-1].append(token)
    if len(stack) > 1:
        raise GameFileError("the PDDL problem ends inside a parenthesis")
    if len(stack[0]) != 1 or not isinstance(stack[0][0], list):
        raise GameFileError("the PDDL problem is not one (define ...) form")
    return stack[0][0]


def _types_of_objects(items: list) -> dict[str, str]:
    """`a b - t c - u` as {a: t, b: t, c: u}."""
    types: dict[str, str] = {}
    waiting: list[str] = []
    tokens = iter(items)
    for token in tokens:
        if token == "-":
            kind = next(tokens, "")
            for name in waiting:
                types[name] = kind
            waiting = []
        else:
            waiting.append(token)
    return types


def _names(ids: list[str]) -> dict[str, str]:
    """ALFWorld's names: numbers count down along the sorted ids of one type, so the last is number 1."""
    left: dict[str, int] = {}
    kinds = {}
    for entity in ids:
        kind, bar, _ = entity.partition("_bar_")
        if not bar:
            continue
        kinds[entity] = kind + "basin" if "basin" in entity else kind
        left[kinds[entity]] = left.get(kinds[entity], 0) + 1
    names = {}
    for entity, kind in kinds.items():
        names[entity] = f"{kind} {left[kind]}"
        left[kind] -= 1
    return names


def _build(path: str, dialect: Dialect, sections: dict[str, list], walkthrough: tuple[str, ...]) -> Game:
    types = _types_of_objects(sections[":objects"])
    facts: dict[str, list[list[str]]] = {}
    known = set()
    for fact in sections[":init"]:
        if not isinstance(fact, list) or not fact:
            raise GameFileError(f"the PDDL problem's :init holds {fact!r}, need (predicate ...)")
        if not all(isinstance(part, str) for part in fact):
            continue  # (= (total-cost) 0) and the like
        for part in fact[1:]:
            if part not in types:
                raise GameFileError(f"the fact ({' '.join(fact)}) names {part!r}, which :objects does not declare")
        facts.setdefault(fact[0], []).append(fact[1:])
        known.update(fact[1:])
    names = _names(sorted(known))

    def table(predicate: str, arity: int) -> list[list[str]]:
        rows = facts.get(predicate, [])
        for row in rows:
            if len(row) != arity:
                raise GameFileError(f"the fact ({predicate} {' '.join(row)}) needs {arity} arguments")
        return rows

    receptacle_ids = sorted({r for r, _ in table("receptacleatlocation", 2)})
    object_ids = sorted({o for o in known if types[o] == "object" and o in names})
    location_ids = sorted({part for part in known if types[part] == "location"})
    receptacle = {r: i for i, r in enumerate(receptacle_ids)}
    location = {x: i for i, x in enumerate(location_ids)}

    def at(index: dict[str, int], key: str) -> int:
        if key not in index:
            raise GameFileError(f"a fact names {key!r}, which has no place in the house")
        return index[key]

    where = {r: at(location, x) for r, x in table("receptacleatlocation", 2)}
    object_where = {o: at(location, x) for o, x in table("objectatlocation", 2)}
    receptacle_kind = dict(table("receptacletype", 2))
    object_kind = dict(table("objecttype", 2))
    for r in receptacle_ids:
        if r not in receptacle_kind:
            raise GameFileError(f"receptacle {names.get(r, r)!r} has no (receptacleType ...) fact")
    held = [o for _, o in table("holds", 2)]
    if len(held) > 1:
        raise GameFileError(f"the agent holds {len(held)} things, need at most one (holds ...) fact")
    for thing in [*receptacle_ids, *(inner for inner, _ in table("inreceptacleobject", 2)), *held]:
        if thing not in names:
            raise GameFileError(f"the id {thing!r} names no thing, need one like 'Mug_bar_1'")
    openable = {r for (r,) in table("openable", 1)}
    opened = {r for (r,) in table("opened", 1)}
    inside: dict[str, list[int]] = {}
    for o, r in table("inreceptacle", 2):
        inside.setdefault(o, []).append(at(receptacle, r))
    contents: dict[str, list[str]] = {}
    for inner, outer in table("inreceptacleobject", 2):
        contents.setdefault(outer, []).append(inner)
    flags: dict[str, set[str]] = {}
    for predicate, flag in OBJECT_FLAGS.items():
        for (o,) in table(predicate, 1):
            flags.setdefault(o, set()).add(flag)
    starts = table("atlocation", 2)
    if len(starts) != 1:
        raise GameFileError(f"the agent stands at {len(starts)} locations, need exactly one (atLocation ...) fact")
    location_names = {x: names.get(x, x) for x in location_ids}

    return Game(
        path=path,
        dialect=dialect,
        walkthrough=walkthrough,
        goal=_read_goal(sections[":goal"]),
        receptacles=tuple(names[r] for r in receptacle_ids),
        receptacle_type=tuple(receptacle_kind[r] for r in receptacle_ids),
        receptacle_location=tuple(where[r] for r in receptacle_ids),
        openable=tuple(r in openable for r in receptacle_ids),
        opened=tuple(r in opened for r in receptacle_ids),
        locations=tuple(location_names[x] for x in location_ids),
        start=at(location, starts[0][1]),
        held=object_ids.index(held[0]) if held else -1,
        objects=tuple(names[o] for o in object_ids),
        object_type=tuple(object_kind.get(o, "") for o in object_ids),
        object_location=tuple(object_where.get(o, -1) for o in object_ids),
        inside=tuple(tuple(sorted(inside.get(o, ()))) for o in object_ids),
        flags=tuple(frozenset(flags.get(o, ())) for o in object_ids),
        contents=tuple(tuple(names[i] for i in sorted(contents.get(o, ()))) for o in object_ids),
        can_contain=frozenset((r, o) for r, o in table("cancontain", 2)),
    )


def _atoms(form: list | str) -> list[list[str]]:
    """Every predicate of a goal made of `and`, `exists` and `not (= ...)`."""
    if not isinstance(form, list) or not form:
        raise GameFileError(f"the goal holds {form!r}, need (predicate ...)")
    if form[0] == "and":
        return [atom for part in form[1:] for atom in _atoms(part)]
    if form[0] == "exists":
        if len(form) != 3:
            raise GameFileError("the goal has an 'exists' without one variable list and one condition")
        return _atoms(form[2])
    if form[0] == "not" and len(form) == 2 and isinstance(form[1], list) and form[1][:1] == ["="]:
        return [["!=", *form[1][1:]]]
    if not all(isinstance(part, str) for part in form):
        raise ForeignGame(f"the goal uses {form[0]!r}, which no ALFWorld task does")
    return [form]


def _read_goal(goal: list) -> Goal:
    """The goals of ALFWorld's six task types (sliced variants included) as a Goal."""
    atoms = [atom for part in goal for atom in _atoms(part)]
    kind = {
        (atom[0], atom[1]): atom[2] for atom in atoms if atom[0] in ("objecttype", "receptacletype") and len(atom) == 3
    }
    names = {atom[0] for atom in atoms}
    odd = names - set(GOAL_STATES) - set(GOAL_ABILITIES) - {
        "objecttype", "receptacletype", "inreceptacle", "holds", "istoggled", "atlocation", "receptacleatlocation", "!="
    }  # fmt: skip
    if odd:
        raise ForeignGame(f"the goal uses {', '.join(sorted(odd))}, which none of the six task types does")
    held = [atom[2] for atom in atoms if atom[0] == "holds" and len(atom) == 3]
    lamps = [atom[1] for atom in atoms if atom[0] == "istoggled"]
    if held and lamps:
        target, lamp = kind.get(("objecttype", held[0])), kind.get(("objecttype", lamps[0]))
        if target and lamp:
            states = tuple(sorted(a[0] for a in atoms if a[0] in GOAL_STATES))
            return Goal(object_type=target, lamp_type=lamp, states=tuple(OBJECT_FLAGS[s] for s in states))
    placed = [atom for atom in atoms if atom[0] == "inreceptacle" and len(atom) == 3]
    if placed and not held and not lamps:
        objects = sorted({atom[1] for atom in placed})
        targets = {kind.get(("objecttype", o), "") for o in objects}
        receptacles = {kind.get(("receptacletype", atom[2]), "") for atom in placed}
        if len(targets) == len(receptacles) == 1 and "" not in targets | receptacles and len(objects) <= 2:
            return Goal(
                object_type=targets.pop(),
                receptacle_type=receptacles.pop(),
                states=tuple(sorted({OBJECT_FLAGS[a[0]] for a in atoms if a[0] in GOAL_STATES})),
                abilities=tuple(sorted({a[0] for a in atoms if a[0] in GOAL_ABILITIES})),
                count=len(objects),
            )
    raise ForeignGame("the goal is none of ALFWorld's six task types")
