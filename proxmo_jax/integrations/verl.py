"""verl's rollouts as a file of steps, for `proxmo advantages` and `proxmo ablate estimator`.

proxmo steps verl rollouts/120.jsonl steps.jsonl

A file of `trainer.rollout_data_dir` has no observations of turns: a conversation is one text without its special
tokens, so each line is one turn, which serves GRPO, RLOO and Dr. GRPO; only agent loops of several outputs (verl 0.9)
have a line for each turn. Neither file nor batch says which actions were valid, or what was solved. In Python,
`steps_of_batch` finds the turns of a batch by its response mask.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from proxmo_jax.errors import UserError
from proxmo_jax.estimator.steps_file import read_steps, write_steps
from proxmo_jax.integrations.episodes import Episode, Turn, steps_of, with_total

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Config:
    """What to read and what to write."""

    source: tyro.conf.Positional[Path]
    """.jsonl file of verl's trainer.rollout_data_dir or trainer.validation_data_dir."""
    target: tyro.conf.Positional[Path]
    """.npz or .jsonl of steps to write."""
    success_threshold: float = 1.0
    """A trajectory with at least this score has succeeded."""


def main(config: Config) -> None:
    """Read, map, write. Raises UserError naming the file for one that is none of verl's."""
    columns = read_steps(config.source)
    try:
        count = len(next(iter(columns.values())))
        steps = steps_of_dump(
            [{name: values[i] for name, values in columns.items()} for i in range(count)], config.success_threshold
        )
    except UserError as error:
        raise UserError(f"{config.source}: {error}") from error
    write_steps(config.target, steps)
    groups, trajectories = len(set(steps["group"])), len(set(steps["trajectory"]))
    print(f"{config.target}: {len(steps['step'])} turns of {trajectories} trajectories in {groups} groups")


def steps_of_dump(rows: Sequence[Mapping[str, Any]], success_threshold: float = 1.0) -> dict[str, list]:
    """The steps of lines that verl's trainer has written.

    Args:
        rows: with input, output, score and step; and uid, `{prompt}_{session}_{output}`, if verl has written it. Lines
            without one are trajectories of one turn, and those of equal input and step are a group.
        success_threshold: a trajectory with at least this score has succeeded.

    Returns:
        Lists [N] by name, as `steps_of`.

    Raises:
        UserError: naming the line and the field.
    """
    sessions: dict[tuple, list[tuple[int, Mapping[str, Any]]]] = {}
    for number, row in enumerate(rows):
        for name, kind in (("input", str), ("score", (int, float)), ("step", int)):
            if not isinstance(row.get(name), kind) or isinstance(row[name], bool):
                raise UserError(f"{name}: row {number} has {row.get(name)!r:.60}, need verl's input, score and step")
        key = re.fullmatch(r"(.+)_(\d+)_(\d+)", str(row.get("uid", "")), re.S)
        task, session, output = key.groups() if key else (row["input"], number, 0)
        sessions.setdefault((row["step"], task, session), []).append((int(output), row))
    groups: dict[tuple, int] = {}
    return steps_of(
        _episode(groups.setdefault(key[:2], len(groups)), [row for _, row in sorted(outputs, key=lambda x: x[0])],
                 success_threshold)
        for key, outputs in sessions.items()
    )  # fmt: skip


def _episode(group: int, rows: list[Mapping[str, Any]], success_threshold: float) -> Episode:
    """The outputs of one session; each has the score of the last one, which counts once."""
    texts, score = [row["input"] for row in rows], float(rows[-1]["score"])
    turns = [Turn(text, after) for text, after in zip(texts, [*texts[1:], ""], strict=True)]
    return Episode(group, score >= success_threshold, with_total(turns, score))


def steps_of_batch(batch: Mapping[str, Any], decode: Decode, success_threshold: float = 1.0) -> dict[str, list]:
    """The steps of a batch of verl's trainer, after its rewards are computed.

        data = {**{k: v.numpy() for k, v in batch.batch.items()}, **batch.non_tensor_batch}
        write_steps(Path("steps.jsonl"), steps_of_batch(data, tokenizer.decode))

    Args:
        batch: with prompts [B, P], responses and response_mask [B, L], attention_mask [B, P + L], token_level_scores
            (or rm_scores) [B, L] and uid [B]: each run of the response mask is a turn, what stands before it its
            observation. A batch of verl-agent has a row for each turn: uid, traj_uid, anchor_obs, rewards and
            is_action_valid [B], in the order of turns, and active_masks [B] if it is padded.
        decode: the tokenizer's, from ids to text; not called for verl-agent.
        success_threshold: a trajectory with at least this score has succeeded.

    Returns:
        Lists [N] by name, as `steps_of`.

    Raises:
        UserError: naming the array that is missing.
    """
    per_turn = "traj_uid" in batch
    needed = ("uid", "traj_uid", "anchor_obs", "rewards", "is_action_valid") if per_turn else (
        "uid", "prompts", "responses", "response_mask", "attention_mask"
    )  # fmt: skip
    for name in needed:
        if name not in batch:
            raise UserError(f"{name} is missing; need {', '.join(needed)}")
    return steps_of(_turn_rows(batch, success_threshold) if per_turn else _masked(batch, decode, success_threshold))


def _turn_rows(batch: Mapping[str, Any], success_threshold: float) -> Iterable[Episode]:
    """The episodes of a batch with a row for each turn."""
    trajectories: dict[Any, list[int]] = {}
    for row, name in enumerate(batch["traj_uid"]):
        if "active_masks" not in batch or batch["active_masks"][row]:
            trajectories.setdefault(str(name), []).append(row)
    for rows in trajectories.values():
        texts = [str(batch["anchor_obs"][row]) for row in rows]
        turns = [
            Turn(text, after, float(batch["rewards"][row]), bool(batch["is_action_valid"][row]))
            for row, text, after in zip(rows, texts, [*texts[1:], ""], strict=True)
        ]
        won = sum(turn.reward for turn in turns) >= success_threshold
        yield Episode(str(batch["uid"][rows[0]]), won, turns)


def _masked(batch: Mapping[str, Any], decode: Decode, success_threshold: float) -> Iterable[Episode]:
    """The episodes of a batch with a row for each conversation."""
    scores = next((batch[name] for name in ("token_level_scores", "rm_scores") if name in batch), None)
    if scores is None:
        raise UserError("token_level_scores is missing; need it, or rm_scores")
    prompts, responses, present = (np.asarray(batch[name]) for name in ("prompts", "responses", "attention_mask"))
    mask = np.asarray(batch["response_mask"]) != 0
    length = prompts.shape[1]
    for row, uid in enumerate(batch["uid"]):
        used = present[row] != 0
        before, texts = prompts[row][used[:length]].tolist(), []
        response = zip(responses[row][used[length:]].tolist(), mask[row][used[length:]], strict=True)
        for written, tokens in groupby(response, lambda token: token[1]):
            if written:
                texts.append(decode(before))
                before = []
            else:
                before = [token for token, _ in tokens]
        following = [*texts[1:], decode(before)] if texts else []  # a response without tokens has no turn
        score = float(np.asarray(scores[row], np.float32).sum())
        own = [Turn(text, after) for text, after in zip(texts, following, strict=True)]
        yield Episode(str(uid), score >= success_threshold, with_total(own, score))
