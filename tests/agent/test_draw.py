"""Which tasks an iteration plays."""

from types import SimpleNamespace

import numpy as np
from nested import config_with
from rich.console import Console

from envs_bridge.environments import Spec
from envs_bridge.turn import Goal
from proxmo_jax.agent.loop import Loop
from proxmo_jax.agent.run_files import RECIPES, default
from proxmo_jax.agent.settings import Config, RolloutSettings
from proxmo_jax.agent.tasks import make_tasks


def drawn(task_sampling, solved, kinds, times=400):
    """The share of each kind among games that a loop draws, which has solved each kind so often."""
    config = Config(rollout=RolloutSettings(task_sampling=task_sampling))
    loop = SimpleNamespace(config=config, solved=np.array(solved), kinds=np.array(kinds), games=kinds)
    rng = np.random.default_rng(0)
    games = np.concatenate([Loop.draw(loop, rng, 4, np.zeros(0, int)) for _ in range(times)])
    return np.bincount(np.array(kinds)[games]) / len(games)


def test_tasks_of_middling_success_are_drawn_more_often():
    kinds = [0] * 40 + [1] * 80
    assert np.allclose(drawn("uniform", [0.5, 1.0], kinds), [1 / 3, 2 / 3], atol=0.05)
    # sqrt(0.25) + 0.1 against 0.1, however many games a kind has
    assert np.allclose(drawn("by_success", [0.5, 1.0], kinds), [6 / 7, 1 / 7], atol=0.05)


def test_published_recipes_draw_all_tasks_alike():
    for recipe in sorted(RECIPES.glob("*qwen2.5*.toml")):
        assert default(["--config", recipe.stem]).rollout.task_sampling == "uniform"


def test_the_training_split_is_the_first_one_whatever_it_is_called(tmp_path, monkeypatch):
    def tasks(request):
        return {split: [Goal("", i, "") for i in range(most)] for split, most in request.wanted.items()}

    spec = Spec("two splits", ("practice", "exam"), ("exam",), tasks, lambda task: "", lambda env: ("fast", 0.0))
    monkeypatch.setattr("proxmo_jax.agent.tasks.find", lambda name: spec)
    config = config_with(env__train_games=3, env__eval_games=2, output__dir=tmp_path)
    training, held_out = make_tasks(config, Console(quiet=True))
    assert (len(training), len(held_out)) == (3, 2)
