"""The games of an ALFWorld data folder: which are playable, which are excluded, and their wording.

The folder is what `alfworld-download` fills (`$ALFWORLD_DATA`): `json_2.1.1/SPLIT/TASK.../trial.../game.tw-pddl`.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from envs_bridge.errors import UserError
from envs_bridge.household.dialect import ForeignGame, read_dialect
from envs_bridge.household.game import TASK_TYPES, GameFileError, read_game_file
from envs_bridge.household.generate import SPLITS

GENERATION = {"move": "'move X to Y', as since December 2024", "put": "'put X in/on Y', as before December 2024"}

UNREADABLE = "unreadable"


@dataclass
class Survey:
    """The content of a data folder.

    games: game files by split, sorted. wordings: number of games by wording. foreign: one sentence for each game that
    only ALFWorld's engine can play. left_out: number of excluded games by reason. unreadable: one sentence for each
    file that is not a valid game.
    """

    folder: Path
    games: dict[str, list[str]] = field(default_factory=dict)
    wordings: Counter = field(default_factory=Counter)
    foreign: list[str] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{split} {len(games)}" for split, games in self.games.items())
        lines = [f"ALFWorld games in {self.folder}: {counts}"]
        lines += [f"wording {GENERATION[wording]}: {count} games" for wording, count in sorted(self.wordings.items())]
        if len(self.wordings) > 1:
            lines.append("The data mixes two wordings: an agent trained on one will fail at the other.")
        lines += [f"left out: {reason}" for reason in self.reasons()]
        if self.foreign:
            lines.append(f"{len(self.foreign)} games are left to ALFWorld's own engine; the first: {self.foreign[0]}")
        return "\n".join(lines)

    def reasons(self) -> list[str]:
        """How many games were excluded, and why."""
        first = f"; the first: {self.unreadable[0]}" if self.unreadable else ""
        return [
            f"{count} {reason}{first if reason == UNREADABLE else ''}"
            for reason, count in sorted(self.left_out.items())
        ]


def data_folder(data: Path | None) -> Path:
    """The given folder, or `$ALFWORLD_DATA`. Raises UserError if it has no split."""
    if data is None and not os.environ.get("ALFWORLD_DATA"):
        raise UserError("--data: name ALFWorld's data folder, or set $ALFWORLD_DATA (alfworld-download fills it)")
    folder = Path(data or os.environ["ALFWORLD_DATA"])
    for inner in (folder, folder / "json_2.1.1"):
        if any((inner / split).is_dir() for split in SPLITS):
            return inner
    raise UserError(f"--data: {folder} holds none of the folders {', '.join(SPLITS)} (nor does its json_2.1.1)")


def survey(
    data: Path | None,
    splits: Sequence[str] = SPLITS,
    *,
    task_types: Sequence[str] = TASK_TYPES,
    on_game: Callable[[int], None] | None = None,
) -> Survey:
    """Read every game file of the splits and select games by the rules of ALFWorld's loader.

    Games with movable receptacles or sliced objects, of other task types, unsolvable or unreadable are excluded.

    Args:
        data: the folder; None: `$ALFWORLD_DATA`.
        splits: folders of games to read.
        task_types: the task types to keep.
        on_game: called with the number of files read so far.

    Raises:
        UserError: the folder has no playable game.
    """
    found = Survey(data_folder(data))
    count = 0
    for split in splits:
        games = found.games[split] = []
        for path in sorted((found.folder / split).glob("*/*/game.tw-pddl")):
            count += 1
            if on_game:
                on_game(count)
            reason = _why_left_out(path, task_types, found)
            if reason:
                found.left_out[reason] += 1
            else:
                games.append(str(path))
    if not any(found.games.values()):
        why = "; ".join(found.reasons()) or "there is no SPLIT/TASK/TRIAL/game.tw-pddl"
        raise UserError(f"--data: {found.folder} holds no playable game in {', '.join(splits)}: {why}")
    return found


def _why_left_out(path: Path, task_types: Sequence[str], found: Survey) -> str:
    """The reason for excluding a game; empty if it is kept, and then its wording is counted."""
    name = str(path.relative_to(found.folder))
    if "movable" in name or "Sliced" in name:
        return "with movable receptacles or sliced objects (ALFWorld excludes them, too)"
    if path.parts[-3].partition("-")[0] not in task_types:
        return "of other task types"
    try:
        data = read_game_file(str(path))
    except GameFileError as error:
        found.unreadable.append(str(error))
        return UNREADABLE
    if "solvable" not in data:
        return "without 'solvable', which ALFWorld asks for"
    if not data["solvable"]:
        return "not solvable"
    try:
        found.wordings[read_dialect(data["pddl_domain"], data["grammar"]).wording] += 1
    except ForeignGame as error:
        found.foreign.append(f"{path}: {error}")
    return ""
