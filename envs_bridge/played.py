"""Episodes that a person has solved, as JSON lines that a warm start reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from envs_bridge.environments import Episode
from envs_bridge.errors import UserError
from envs_bridge.text import load_json
from envs_bridge.turn import Demonstrated, Observation


def append_episode(path: Path, env: str, task: str, turns: Sequence[Demonstrated]) -> None:
    """Add a solved episode to a file, one line that is written at once.

    Args:
        path: the file; made if it is not there.
        env: name of the environment.
        task: the task in words.
        turns: what was seen, done and thought.
    """
    played = [
        {"text": turn.seen.text, "admissible": turn.seen.admissible, "command": turn.command, "thought": turn.thought}
        for turn in turns
    ]
    line = json.dumps({"env": env, "task": task, "turns": played})
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_episodes(path: Path, env: str) -> list[Episode]:
    """The episodes of a file.

    Args:
        path: of `append_episode`.
        env: the environment they must be of.

    Returns:
        The task and turns of each.

    Raises:
        UserError: a file that cannot be read, a line that is no episode or of another environment, or no line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    episodes = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = load_json(line)
            turns = [_turn(turn) for turn in found["turns"]]
            name, task = found["env"], found["task"]
            if not isinstance(task, str) or not turns:
                raise ValueError("task must be a text, and turns must not be empty")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: is no episode of proxmo play ({error!r:.100})") from error
        if name != env:
            raise UserError(f"{path}, line {number}: is an episode of {name!r:.40}, need {env}")
        episodes.append((task, turns))
    if not episodes:
        raise UserError(f"{path}: holds no episode; proxmo play --keep adds solved ones")
    return episodes


def _turn(turn: dict) -> Demonstrated:
    """A turn. Raises ValueError for texts that are none."""
    texts = [turn["text"], turn["command"], turn.get("thought", ""), *turn["admissible"]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("text, command, thought and admissible must be texts")
    return Demonstrated(Observation(turn["text"], tuple(turn["admissible"])), turn["command"], turn.get("thought", ""))
