"""Tunix's agentic GRPO with our advantages: the installed package where it is there, a recorded run of it elsewhere."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import proxmo_jax as pj
from proxmo_jax.errors import UserError
from proxmo_jax.integrations.episodes import token_advantages

LENGTH = 96  # of a padded response, as in tunix_record
RECORDED = Path(__file__).parents[1] / "cases" / "tunix.json"


@pytest.mark.parametrize("preset", ["proxmo", "gigpo", "grpo", "graphgpo"])
def test_a_recorded_run(preset):
    case = json.loads(RECORDED.read_text(encoding="utf-8"))[preset]
    found = token_advantages(
        [{"turns": turns} for turns in case["turns"]], case["group"], case["rewards"], length=case["length"],
        settings=pj.PRESETS[preset](), success_threshold=1.0,
    )  # fmt: skip
    assert np.abs(found).max() > 0.01
    np.testing.assert_allclose(found, case["advantages"], atol=1e-5)


def test_an_episode_without_a_turn():
    turn = {"observation": "a", "next_observation": "", "reward": 0.0, "action_valid": True}
    turn |= {"tokens": 2, "env_tokens": 1}
    episodes = [{"turns": [turn]}, {"turns": []}, {"turns": [turn]}]
    options = {"length": 4, "settings": pj.dr_grpo(), "success_threshold": 1.0}
    found = token_advantages(episodes, [0, 0, 0], [1.0, 0.0, 0.0], **options)
    np.testing.assert_allclose(found, [[0.5, 0.5, 0, 0], [0, 0, 0, 0], [-0.5, -0.5, 0, 0]])
    assert not token_advantages([{"turns": []}], [0], [0.0], **options).any()


@pytest.mark.slow
class TestWithTunix:
    @pytest.fixture(scope="class")
    def record(self):
        pytest.importorskip("tunix")
        import tunix_record

        return tunix_record

    def expected(self, done, trajectories, settings):
        """Advantages [B, L] from what the environment has logged, and the response mask that they belong to."""
        names = ["texts", "reward", "action_valid", *(["next_texts"] if settings.score == "distance" else [])]
        rows = {name: [] for name in (*names, "group", "trajectory", "step", "success")}
        for item in trajectories:
            turns = done.log[item.group_id, item.pair_index]
            for step, turn in enumerate(turns):
                own = {"group": item.group_id, "trajectory": item.pair_index, "step": step}
                own |= {"success": sum(turn["reward"] for turn in turns) >= 1}
                for name in rows:
                    rows[name].append({**turn, **own}[name])
        batch, packing = pj.Group.from_steps(**rows)
        joint = iter(packing.unpack(jax.jit(pj.batch_advantages)(batch, settings).joint))
        advantage, mask = np.zeros((2, len(trajectories), LENGTH), np.float32)
        for i, item in enumerate(trajectories):
            at = 0
            for turn in done.log[item.group_id, item.pair_index]:
                span = slice(at, at + turn["tokens"])
                advantage[i, span], mask[i, span] = next(joint), 1
                at += turn["tokens"] + turn["env_tokens"]
        return advantage, mask

    @pytest.mark.parametrize("preset", ["proxmo", "gigpo", "graphgpo"])
    def test_a_tiny_model_is_trained_by_our_advantages(self, record, preset):
        settings = pj.PRESETS[preset]()
        done = record.train(settings)
        assert len(done.batches) == 4  # two steps of two tasks
        assert done.changed
        sizes = []
        for trajectories, example in done.batches:
            expected, mask = self.expected(done, trajectories, settings)
            np.testing.assert_array_equal(example.completion_mask, mask)
            np.testing.assert_allclose(example.advantages, expected, atol=1e-5)
            sizes.append(np.abs(expected).max())
        assert max(sizes) > 0.01
        assert max(len(turns) for turns in done.log.values()) > 1

    def test_without_steps_it_is_tunix_grpo(self, record):
        from tunix.rl.algo_core import compute_advantages

        done = record.train(pj.grpo(invalid_penalty=0.0, episode_over="trajectories", epsilon=1e-6), steps=1)
        for trajectories, example in done.batches:
            rewards = np.array([item.traj["trajectory_reward"] for item in trajectories])
            wanted = compute_advantages(rewards, record.MEMBERS)[:, None] * np.asarray(example.completion_mask)
            np.testing.assert_allclose(example.advantages, wanted, atol=1e-5)

    def test_what_it_refuses(self, record):
        cluster = record.make_cluster(1)
        with pytest.raises(UserError, match="entropy"):
            record.Learner(cluster, record.make_config(), settings=pj.PRESETS["empg"]())
        cluster.cluster_config.training_config.max_seq_token_per_tpu = 512
        with pytest.raises(UserError, match="max_seq_token_per_tpu"):
            record.Learner(cluster, record.make_config())
