"""Train a tiny Qwen2 for two steps with Tunix's agentic GRPO and our learner, in an environment of several turns.

Run by tests/integrations/test_tunix.py where google-tunix is installed; to record the case for where it is not:

    PYTHONPATH=.:tests python tests/tunix_record.py tests/cases/tunix.json     # in an environment with google-tunix
"""

import dataclasses
import json
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen2.model import ModelConfig, Qwen2
from tunix.rl import rl_cluster as rl
from tunix.rl.agentic.agentic_grpo_learner import GRPOConfig
from tunix.rl.agentic.environments.base_environment import BaseTaskEnv, EnvStepResult
from tunix.rl.rollout.base_rollout import RolloutConfig

from proxmo_jax.estimator.presets import PRESETS
from proxmo_jax.integrations.tunix import Learner

MEMBERS, LENGTH, TASKS, RECORDED = 4, 96, 2, ("proxmo", "gigpo", "grpo", "graphgpo")
WORDS = (
    "<pad> <bos> <eos> <system> <user> <assistant> task you stand in the hall kitchen cellar attic a lamp is on door"
    " open closed and nothing happens north south look take"
).split()
ENDS = [WORDS.index(word) for word in ("<eos>", "north", "south", "look", "take", "on", "open", "lamp")]
ROOMS = ("hall", "kitchen", "cellar", "attic")


class Words:
    """A tokenizer of whole words."""

    def encode(self, text, **_):
        return [WORDS.index(word) for word in text.split()]

    def decode(self, ids, **_):
        return " ".join(WORDS[i] for i in ids)

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2

    def pad_id(self):
        return 0


class Parser:
    """Messages with a word for their role in front."""

    assistant_token = "<assistant>"

    def parse(self, messages, add_generation_prompt=False, is_first_msg=False):
        said = " ".join(f"<{message['role']}> {message['content']}" for message in messages)
        return f"{said} {self.assistant_token}" if add_generation_prompt else said


class House(BaseTaskEnv):
    """Every response walks on by its number of letters; the attic pays. `log` keeps what each turn saw and was paid."""

    log: dict = {}  # noqa: RUF012

    def __init__(self, example, **options):
        super().__init__(task=dict(example), max_steps=4, **options)
        self.room, self.turns = 0, []
        House.log[options["group_id"], options["pair_index"]] = self.turns

    def seen(self):
        return f"you stand in the {ROOMS[self.room]} and a door is open"

    def _initial_observation(self):
        self.before = self.seen()
        return self.before

    def _step_impl(self, action):
        letters = len(action)
        self.room = min(self.room + letters % 3, 3)
        won, valid = self.room == 3, letters % 2 == 0
        reward = 1.0 if won else 0.25 * (letters % 3 == 1)
        after = self.seen()
        answer = Parser().parse([{"role": "user", "content": after}], add_generation_prompt=True)
        self.turns.append({
            "texts": self.before, "next_texts": after, "reward": reward, "action_valid": valid,
            "tokens": len(action.split()), "env_tokens": 0 if won else len(answer.split()),
        })  # fmt: skip
        self.before = after
        return EnvStepResult(after, reward, won, {"action_valid": valid})


def make_cluster(steps):
    """Tunix's cluster of a tiny Qwen2, for so many steps."""
    shape = ModelConfig(
        num_layers=1, vocab_size=len(WORDS), embed_dim=16, hidden_dim=32, num_heads=2, head_dim=8, num_kv_heads=1,
        rope_theta=10_000, norm_eps=1e-6, use_tied_embedding=False, dtype=jnp.float32, param_dtype=jnp.float32,
    )  # fmt: skip
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    roles = (rl.Role.ACTOR, rl.Role.REFERENCE, rl.Role.ROLLOUT)
    cluster = rl.RLCluster(
        actor=Qwen2(shape, rngs=nnx.Rngs(0)),
        reference=Qwen2(shape, rngs=nnx.Rngs(0)),
        tokenizer=Words(),
        cluster_config=rl.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            rollout_engine="vanilla",
            offload_to_cpu=False,
            training_config=rl.RLTrainingConfig(
                actor_optimizer=optax.sgd(0.1), eval_every_n_steps=100, max_steps=steps, mini_batch_size=TASKS,
                train_micro_batch_size=1,
            ),
            rollout_config=RolloutConfig(
                max_prompt_length=128, max_tokens_to_generate=LENGTH, return_logprobs=True, kv_cache_size=256,
                temperature=1.0, eos_tokens=ENDS,
            ),
        ),
    )  # fmt: skip
    generate, seeds = cluster.rollout.generate, count()

    def generate_anew(prompts, rollout_config, **options):  # the engine's seed is the same for every call
        return generate(prompts, dataclasses.replace(rollout_config, seed=next(seeds)), **options)

    cluster.rollout.generate = generate_anew
    return cluster


def make_config():
    return GRPOConfig(num_generations=MEMBERS, max_response_length=LENGTH, max_concurrency=2, beta=0.0)


def dataset(steps):
    return iter([{"prompts": np.array([f"task {room}" for room in ROOMS[:TASKS]])}] * steps)


def train(settings, steps=2):
    """Train; whether the weights changed, what the environments logged, and for each call of `_process_results` its
    trajectories and train example."""
    cluster, batches = make_cluster(steps), []

    class Watched(Learner):
        def _process_results(self, trajectories, mode=rl.Mode.TRAIN, expected_step=None):
            examples = super()._process_results(trajectories, mode, expected_step)
            batches.append((trajectories, examples[0]))
            return examples

    House.log.clear()
    learner = Watched(cluster, make_config(), chat_parser=Parser(), env_class=House, settings=settings)
    before = jax.tree.map(np.asarray, nnx.state(cluster.actor_trainer.model, nnx.Param))
    learner.train(dataset(steps))
    after = jax.tree.map(np.asarray, nnx.state(cluster.actor_trainer.model, nnx.Param))
    changed = any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), before, after)))
    return SimpleNamespace(batches=batches, changed=changed, log=dict(House.log))


def main(target: str) -> None:
    """Record one group: its turns and rewards, and what the learner gave their tokens under some presets."""
    wanted = {}
    for name in RECORDED:
        done = train(PRESETS[name](), steps=1)
        trajectories, example = done.batches[0]
        wanted[name] = {
            "turns": [item.traj["turns"] for item in trajectories],
            "rewards": [item.traj["trajectory_reward"] for item in trajectories],
            "group": [item.group_id for item in trajectories],
            "length": LENGTH,
            "advantages": np.asarray(example.advantages).tolist(),
        }
    Path(target).write_text(json.dumps(wanted), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
