"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups without spread give way to groups drawn anew."""

from collections.abc import Callable

import numpy as np

from envs_bridge.turn import Game
from proxmo_jax.agent import hosts
from proxmo_jax.agent.rollout import Rollout
from proxmo_jax.agent.settings import Config
from proxmo_jax.agent.stop import Stopped


def without_spread(outcome: np.ndarray, finished: np.ndarray, members: int) -> np.ndarray:
    """Groups whose finished episodes all have the same outcome, or that have none.

    Args:
        outcome: [E], success or score, group after group.
        finished: bool [E].
        members: episodes of a group.

    Returns:
        bool [G].
    """
    outcome, finished = (x.reshape(-1, members) for x in (outcome.astype(np.float64), finished))
    most, least = np.where(finished, outcome, -np.inf).max(1), np.where(finished, outcome, np.inf).min(1)
    return most <= least


class Draws:
    """The groups drawn in an iteration: what all of them say of success, and which ones are replaced.

    Attributes:
        won, finished: episodes of all groups played, the replaced ones too.
        rounds: how often groups were drawn anew.
        redrawn: groups drawn anew.
    """

    def __init__(
        self,
        config: Config,
        games: list[Game],
        chosen: np.ndarray,
        draw: Callable[[int, np.ndarray], np.ndarray],
        note_success: Callable[[np.ndarray, np.ndarray, np.ndarray], None],
    ):
        """Begin with the groups of the chosen games.

        Args:
            config: the run's settings.
            games: the training games.
            chosen: int [G], the game of each group.
            draw: draws other games, from their number and those played.
            note_success: is told of all groups played: their games, won and finished episodes, each [groups].
        """
        self.config, self.games, self.draw, self.note_success = config, games, draw, note_success
        self.chosen, self.played = chosen.copy(), chosen.copy()
        self.latest = np.arange(len(chosen))  # groups that have been played since the last call
        self.won = self.finished = self.rounds = self.redrawn = 0

    def __call__(self, rollout: Rollout) -> dict[int, Game] | None:
        """Count what has been played on all hosts, and draw games for the groups without spread.

        Args:
            rollout: this host's; every episode has ended.

        Returns:
            New games by the number of the group on this host; None if no host has any, as after
            `rollout.dynamic_sampling` rounds.

        Raises:
            Stopped: where another host was stopped before its episodes had ended.
        """
        members = self.config.rollout.group_size
        own = {"won": rollout.won, "finished": rollout.finished, "score": rollout.score}
        found = hosts.exchange("episodes", own)
        if any("stopped" in value for value in found):
            raise Stopped
        every = {name: np.concatenate([value[name] for value in found]) for name in own}
        won, finished = (
            x.reshape(-1, members).sum(1)[self.latest] for x in (every["won"] & every["finished"], every["finished"])
        )
        self.won, self.finished = self.won + int(won.sum()), self.finished + int(finished.sum())
        self.note_success(self.chosen[self.latest], won, finished)
        self.latest = np.zeros(0, int)
        if self.rounds < self.config.rollout.dynamic_sampling:
            outcome = every["score" if self.config.env.reward == "score" else "won"]
            self.latest = np.flatnonzero(without_spread(outcome, every["finished"], members))
        if len(self.latest):
            self.chosen[self.latest] = self.draw(len(self.latest), self.played)
            self.played = np.concatenate([self.played, self.chosen[self.latest]])
            self.rounds, self.redrawn = self.rounds + 1, self.redrawn + len(self.latest)
        else:
            return None
        part = hosts.share(len(self.chosen))
        return {int(g) - part.start: self.games[self.chosen[g]] for g in self.latest if part.start <= g < part.stop}

    def give_up(self) -> None:
        """Tell the other hosts that this one stops: it answers what they ask at the end of their episodes."""
        hosts.exchange("episodes", {"stopped": True})

    def row(self, batch: dict[str, float]) -> dict[str, float]:
        """Metrics: success of all episodes played, and with dynamic sampling of those that are trained on.

        Args:
            batch: the metrics of the episodes that are trained on.

        Returns:
            What replaces them or is added.
        """
        row = {"train/success_rate": self.won / self.finished}
        if self.config.rollout.dynamic_sampling:
            row["train/success_rate_filtered"] = batch["train/success_rate"]
            row["train/num_gen_batches"] = 1 + self.rounds
            row["train/redrawn_groups"] = self.redrawn
        return row
