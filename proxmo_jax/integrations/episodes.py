"""Episodes of other trainers as steps, and advantages of turns as advantages of tokens. Needs no trainer."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from proxmo_jax.errors import UserError
from proxmo_jax.estimator.steps_file import steps_advantages
from proxmo_jax.estimator.types import Settings


class Turn(NamedTuple):
    """A turn of an episode.

    Attributes:
        text: the observation before the action.
        next_text: the observation after it; empty at the end of an episode.
        reward: of the turn.
        action_valid: whether the environment could use the action.
    """

    text: str
    next_text: str = ""
    reward: float = 0.0
    action_valid: bool = True


class Episode(NamedTuple):
    """One attempt at a task.

    Attributes:
        group: id of the task, equal for all attempts that are compared.
        success: whether the task was solved.
        turns: in their order.
    """

    group: int | str
    success: bool
    turns: Sequence[Turn]


def steps_of(episodes: Iterable[Episode]) -> dict[str, list]:
    """The steps of episodes, as `steps_advantages` and `proxmo advantages` read them.

    Args:
        episodes: in any order.

    Returns:
        Lists [N] by name, one entry for each turn. The trajectory is the number of the episode.

    Raises:
        UserError: if no episode has a turn.
    """
    rows = [
        (episode.group, number, step, turn.reward, episode.success, turn.action_valid, turn.text, turn.next_text)
        for number, episode in enumerate(episodes)
        for step, turn in enumerate(episode.turns)
    ]
    if not rows:
        raise UserError("episodes: none has a turn, need at least one")
    names = ("group", "trajectory", "step", "reward", "success", "action_valid", "texts", "next_texts")
    return {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def with_total(turns: Sequence[Turn], total: float) -> list[Turn]:
    """The turns with the last reward changed so that they add up to the reward of the episode.

    Args:
        turns: of one episode.
        total: reward of the episode, as the trainer computed it.

    Returns:
        The turns.
    """
    if not turns:
        return []
    missing = total - sum(turn.reward for turn in turns)
    return [*turns[:-1], turns[-1]._replace(reward=turns[-1].reward + missing)]


def token_advantages(
    trajectories: Sequence[dict[str, Any]],
    groups: Sequence[int | str],
    rewards: Sequence[float] | np.ndarray,
    *,
    length: int,
    settings: Settings,
    success_threshold: float,
) -> np.ndarray:
    """Advantages of the response tokens of whole episodes.

    Args:
        trajectories: B episodes, each with `turns`: dictionaries with `observation` and `next_observation` (strings),
            `reward`, `action_valid`, and `tokens` and `env_tokens`, the numbers of response tokens of the turn and of
            tokens of the environment that follow them.
        groups: [B] ids of the tasks.
        rewards: float [B], of the episodes; what the turns lack of it is added to the last one.
        length: L, tokens of a padded response; what is longer is cut.
        settings: of the estimator.
        success_threshold: an episode with at least this reward has succeeded.

    Returns:
        float32 [B, L]: the joint advantage of its turn on each response token, 0 elsewhere.

    Raises:
        UserError: as `steps_advantages`.
    """
    result = np.zeros((len(trajectories), length), np.float32)
    if not any(trajectory["turns"] for trajectory in trajectories):
        return result  # every response was cut before its first action
    episodes = [
        Episode(group, bool(reward >= success_threshold), with_total([_turn(t) for t in trajectory["turns"]], reward))
        for trajectory, group, reward in zip(trajectories, groups, map(float, rewards), strict=True)
    ]
    advantage = iter(steps_advantages(steps_of(episodes), settings)["advantage"])
    for row, trajectory in zip(result, trajectories, strict=True):
        at = 0
        for turn in trajectory["turns"]:
            row[at : at + turn["tokens"]] = next(advantage)
            at += turn["tokens"] + turn["env_tokens"]
    return result


def _turn(turn: dict[str, Any]) -> Turn:
    """A turn from its dictionary."""
    return Turn(turn["observation"], turn["next_observation"], float(turn["reward"]), bool(turn["action_valid"]))
