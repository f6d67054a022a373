"""TRL's logged completions as a file of steps, for `proxmo advantages` and `proxmo ablate estimator`.

proxmo steps trl output/completions/completions_00010.parquet steps.jsonl

GRPOTrainer writes these files with `log_completions=True`. They have one reward for each episode and no success; a
turn's observation is what the tools returned, and without tools an episode is one turn.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from proxmo_jax.errors import UserError
from proxmo_jax.estimator.steps_file import read_steps, write_steps
from proxmo_jax.integrations.episodes import Episode, Turn, steps_of, with_total


@dataclass(frozen=True)
class Config:
    """What to read and what to write."""

    source: tyro.conf.Positional[Path]
    """.parquet file of TRL's completions (needs pip install 'proxmo-jax[trl]'), or a .jsonl file of its rows."""
    target: tyro.conf.Positional[Path]
    """.npz or .jsonl of steps to write."""
    rewards: tuple[str, ...] = ()
    """Columns of reward functions; default: all columns of numbers but step and advantage."""
    weights: tuple[float, ...] = ()
    """Their weights (TRL's reward_weights); default: 1."""
    success_threshold: float = 1.0
    """A trajectory with at least this reward has succeeded."""


def main(config: Config) -> None:
    """Read, map, write. Raises UserError naming the file for one that is none of TRL's."""
    rows = read_rows(config.source)
    try:
        rewards = config.rewards or reward_columns(rows)
        steps = steps_of_completions(rows, rewards, config.weights, config.success_threshold)
    except UserError as error:
        raise UserError(f"{config.source}: {error}") from error
    write_steps(config.target, steps)
    groups, trajectories = len(set(steps["group"])), len(set(steps["trajectory"]))
    without = len(rows) - trajectories
    print(
        f"{config.target}: {len(steps['step'])} turns of {trajectories} trajectories in {groups} groups; the reward is"
        f" {' + '.join(rewards)}" + (f"; {without} trajectories without a reward or a turn left out" if without else "")
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `.parquet` or `.jsonl` file. Raises UserError for one that cannot be read."""
    if path.suffix != ".parquet":
        columns = read_steps(path)
        return [{name: values[i] for name, values in columns.items()} for i in range(len(next(iter(columns.values()))))]
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: Parquet needs pyarrow (pip install 'proxmo-jax[trl]')") from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())})") from error


def reward_columns(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The columns of numbers, or of numbers and None, that are neither step nor advantage."""
    names = [name for name in (rows[0] if rows else {}) if name not in ("step", "prompt", "completion", "advantage")]
    found = tuple(
        name for name in names if all(_is_number(row[name]) or row[name] is None for row in rows)
        and any(row[name] is not None for row in rows)
    )  # fmt: skip
    if not found:
        raise UserError("rewards: no column of numbers beside step and advantage; need TRL's reward functions")
    return found


def steps_of_completions(
    rows: Sequence[Mapping[str, Any]], rewards: Sequence[str], weights: Sequence[float] = (),
    success_threshold: float = 1.0,
) -> dict[str, list]:  # fmt: skip
    """The steps of completions that TRL's GRPOTrainer has logged.

    Args:
        rows: with step, prompt, completion and the columns of reward functions. Rows of one step and prompt are a
            group. In a conversation each message of the assistant is a turn; one whose tool call failed (TRL logs an
            error in place of its result) is invalid. A row that no function has scored is left out.
        rewards: columns of reward functions; None and NaN count as 0, as in TRL.
        weights: of the reward functions; default: 1.
        success_threshold: a trajectory with at least this reward has succeeded.

    Returns:
        Lists [N] by name, as `steps_of`.

    Raises:
        UserError: naming the column and the row.
    """
    if weights and len(weights) != len(rewards):
        raise UserError(f"weights: got {len(weights)}, need {len(rewards)}, one for each of {', '.join(rewards)}")
    episodes: list[Episode] = []
    groups: dict[str, int] = {}
    for number, row in enumerate(rows):
        for name in ("step", "prompt", "completion", *rewards):
            if name not in row:
                raise UserError(f"{name}: row {number} has no such column, need step, prompt, completion and rewards")
        odd = next((n for n in rewards if row[n] is not None and not _is_number(row[n])), None)
        if odd is not None:
            raise UserError(f"{odd}: row {number} has {row[odd]!r:.60}, need a number")
        scored = [
            (weight, float(row[name]))
            for name, weight in zip(rewards, weights or [1.0] * len(rewards), strict=True)
            if row[name] is not None and not math.isnan(row[name])
        ]
        if scored:
            total = sum(weight * value for weight, value in scored)
            task = json.dumps([row["step"], row["prompt"]], sort_keys=True, default=str)
            turns = with_total(_turns(row["prompt"], row["completion"], number), total)
            episodes.append(Episode(groups.setdefault(task, len(groups)), total >= success_threshold, turns))
    if not episodes:
        raise UserError(f"{rewards[0]}: no row has a reward")
    return steps_of(episodes)


def _turns(prompt: Any, completion: Any, number: int) -> list[Turn]:
    """The turns of a completion: one, or one for each message of the assistant."""
    if isinstance(prompt, list) and not all(isinstance(message, dict) for message in prompt):
        raise UserError(f"prompt: row {number} has {prompt!r:.60}, need a string or a list of messages")
    seen = _said(prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}])
    if isinstance(completion, str):
        return [Turn(seen)]
    if not isinstance(completion, list) or not all(isinstance(message, dict) for message in completion):
        raise UserError(f"completion: row {number} has {completion!r:.60}, need a string or a list of messages")
    at = [i for i, message in enumerate(completion) if message.get("role") == "assistant"]
    turns = []
    for i, end in zip(at, [*at[1:], len(completion)], strict=True):
        answers = completion[i + 1 : end]
        after = _said(answers)
        turns.append(Turn(seen, after, action_valid=not any(map(_is_failure, answers))))
        seen = after
    return turns


def _said(messages: Sequence[Mapping[str, Any]]) -> str:
    """What others than the assistant and the system have said."""
    others = [message for message in messages if message.get("role") not in ("assistant", "system")]
    return "\n".join(_content(message) for message in others)


def _content(message: Mapping[str, Any]) -> str:
    """The text of a message; of a multimodal one its text parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(str(part.get("text")) for part in content if isinstance(part, dict) and part.get("text"))
    return "" if content is None else str(content)


def _is_failure(message: Mapping[str, Any]) -> bool:
    """Whether a tool's message is the error that TRL puts in the place of a result."""
    return message.get("role") == "tool" and _content(message).startswith("{'error': ")


def _is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:  # an integer of hundreds of digits
        return False
    return True
