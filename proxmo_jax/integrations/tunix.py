"""ProxMO, and every other preset, for Tunix's agentic GRPO (google-tunix 0.1.7).

    from proxmo_jax.integrations.tunix import Learner
    learner = Learner(cluster, algo_config, settings=pj.gigpo(), agent_class=..., env_class=...)

Tunix's registered advantage estimators see the rewards and the size of a group alone. Its loss takes an advantage for
each token as well, so the learner here keeps what each turn saw and was paid, and registers an estimator that turns
those into [episode, token] advantages; rollout, masks, log-probs and loss stay Tunix's.
"""

import dataclasses
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numpy as np
from tunix.rl import function_registry
from tunix.rl.agentic import utils
from tunix.rl.agentic.agentic_grpo_learner import GRPOLearner
from tunix.rl.agentic.trajectory.trajectory_collect_engine import TrajectoryCollectEngine
from tunix.rl.rl_cluster import Mode

from proxmo_jax.errors import UserError
from proxmo_jax.estimator.presets import proxmo
from proxmo_jax.estimator.types import Settings
from proxmo_jax.integrations.episodes import token_advantages

ESTIMATOR = "proxmo_jax"
# Set while a group is processed: Tunix gives an estimator no trajectories.
_of_rewards: ContextVar[Callable[[np.ndarray], np.ndarray]] = ContextVar("of_rewards")


@function_registry.register_advantage_estimator(ESTIMATOR)
def _registered(rewards: np.ndarray, num_generations: int) -> np.ndarray:
    """Tunix's signature of an advantage estimator: rewards float [B]; advantages float32 [B, L]."""
    return _of_rewards.get()(rewards)


class Engine(TrajectoryCollectEngine):
    """Tunix's collection of an episode, which also keeps the observation of every turn."""

    async def _reset(self) -> None:
        await super()._reset()
        self._observations = [_after_the_last_response(self.agent)]

    async def _one_step(self) -> bool:
        done = await super()._one_step()
        if len(self.agent.trajectory.steps) == len(self._observations):  # a step was taken
            self._observations.append(_after_the_last_response(self.agent))
        return done

    async def collect(self, mode: str = "Conversation") -> Any:
        result = await super().collect(mode)
        if mode == "Token":
            seen = self._observations
            result["turns"] = [
                {
                    "observation": seen[i],
                    "next_observation": seen[i + 1],
                    "reward": float(step.reward),
                    "action_valid": bool((step.info or {}).get("action_valid", True)),
                    "tokens": _count(step.assistant_tokens),
                    "env_tokens": _count(step.env_tokens),
                }
                for i, step in enumerate(self.agent.trajectory.steps)
            ]
        return result


def _after_the_last_response(agent: Any) -> str:
    """What the environment has said since the agent's last response."""
    _, messages = utils.get_recent_assistant_user_messages(agent.chat_completions)
    return "\n".join(str(message.get("content") or "") for message in messages)


def _count(tokens: Any) -> int:
    """The number of tokens; 0 for None."""
    return 0 if tokens is None else len(tokens)


class Learner(GRPOLearner):
    """Tunix's agentic GRPO learner with advantages of turns.

    The reward of an episode is what Tunix's reward manager gives: that of the environment's steps, and of reward
    functions on the last one. A turn is invalid if the environment's `info` has `action_valid` False. TF-IDF is fitted
    on the groups that Tunix processes together: one at a time, or a micro-batch of them with
    `compute_logps_micro_batch_size` above 1. An episode that ended before its first action takes no part in the
    statistics of its group.
    """

    def __init__(
        self, rl_cluster: Any, algo_config: Any, *arguments: Any, settings: Settings | None = None,
        success_threshold: float = 1.0, **options: Any,
    ):  # fmt: skip
        """Make the learner.

        Args:
            rl_cluster: Tunix's cluster.
            algo_config: Tunix's GRPOConfig; its advantage_estimator is replaced.
            arguments: as GRPOLearner.
            settings: of the estimator; default: the preset proxmo.
            success_threshold: an episode with at least this reward has succeeded, which the modulation needs.
            options: as GRPOLearner.

        Raises:
            UserError: for settings that need the entropy of responses, which Tunix does not record, and for Tunix's
                sequence packing, which cuts episodes of several turns.
        """
        self.settings = proxmo() if settings is None else settings
        self.success_threshold = success_threshold
        if self.settings.entropy:
            raise UserError("settings: entropy (empg) needs the entropy of each response, which Tunix does not record")
        if rl_cluster.cluster_config.training_config.max_seq_token_per_tpu is not None:
            raise UserError(
                "max_seq_token_per_tpu: Tunix 0.1.7 cuts a packed response to as many tokens as the policy wrote, which"
                " loses the last turns of an episode; need None"
            )
        algo_config = dataclasses.replace(algo_config, advantage_estimator=ESTIMATOR)
        super().__init__(rl_cluster, algo_config, *arguments, **options)

    def _build_orchestrator(self) -> Any:
        orchestrator = super()._build_orchestrator()
        orchestrator.engine_cls = Engine
        return orchestrator

    def _process_results(self, trajectories: list, mode: Mode = Mode.TRAIN, expected_step: int | None = None) -> list:
        def of_rewards(rewards: np.ndarray) -> np.ndarray:
            return token_advantages(
                [item.traj for item in trajectories],
                [item.group_id for item in trajectories],
                np.asarray(rewards),
                length=self.algo_config.max_response_length,
                settings=self.settings,
                success_threshold=self.success_threshold,
            )

        token = _of_rewards.set(of_rewards)
        try:
            return super()._process_results(trajectories, mode, expected_step)
        finally:
            _of_rewards.reset(token)
