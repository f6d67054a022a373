"""Where reinforcement learning starts: a pretrained language model, or a small policy cloned from demonstrations."""

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from envs_bridge.turn import Game
from proxmo_jax.agent.batches import batches
from proxmo_jax.agent.player import fresh_params, new_state, pretrained_params
from proxmo_jax.agent.report import progress_bar, watched
from proxmo_jax.agent.rollout import Example, Player, demonstration_buffer, demonstrations
from proxmo_jax.agent.settings import Config, micro_batches
from proxmo_jax.agent.stop import StopOnSignal
from proxmo_jax.agent.tasks import demonstrated, memory_of
from proxmo_jax.errors import UserError
from proxmo_jax.policy.sharding import replicate
from proxmo_jax.training.checkpoint import load_params, save_params
from proxmo_jax.training.update import cloning_step, make_optimizer


def demonstrate(config: Config, games: list[Game], mistake_rate: float, console: Console) -> list[Example]:
    """Demonstrations of the games that our engine plays. Raises UserError if it plays none."""
    episodes = watched(demonstrated(config, games, mistake_rate), "demonstrations", console, len(games))
    examples = demonstrations(episodes, memory_of(config))
    if not examples:
        raise UserError("warm start: there is no demonstration; our engine plays none of the training games")
    return examples


def starting_point(config: Config, player: Player, demos: list[list[Example]], key: jax.Array, console, stop):
    """The parameters that reinforcement learning starts from, which are also the reference of the KL.

    They are a pretrained language model, or a warm start, which is made once and kept in the run's folder.
    """
    if config.model.path:
        return pretrained_params(config, player)
    fresh, warm = fresh_params(player, key), config.output.dir / "warm_start"
    if not (warm / "config.json").exists():
        if config.warm_start.from_run:
            params = load_params(config.warm_start.from_run / "warm_start", fresh)
        else:
            params = warm_start(config, player, demos, fresh, console, stop)
        if stop:
            return params
        save_params(warm, params, player.config.to_dict())
    return load_params(warm, fresh)


def warm_start(config: Config, player: Player, demos, params, console: Console, stop: StopOnSignal):
    """Behaviour cloning: first of careful demonstrations, at the end of careless ones.

    Returns:
        The cloned parameters.
    """
    rollouts = [demonstration_buffer(player, examples) for examples in demos]
    for rollout in rollouts:
        rollout.buffer = replicate(player.mesh, rollout.buffer)
    turning_point = config.warm_start.steps - round(config.warm_start.careless_share * config.warm_start.steps)
    optimizer = make_optimizer(
        config.warm_start.learning_rate,
        config.optimizer.weight_decay,
        config.optimizer.max_grad_norm,
        warmup=20,
        decay_steps=config.warm_start.steps,
    )
    state = new_state(player, params, optimizer)
    rng = np.random.default_rng(config.seed)
    step = 0
    with progress_bar(console) as bar:
        task = bar.add_task("warm start", total=config.warm_start.steps, note="")
        while step < config.warm_start.steps and not stop:
            rollout, until = rollouts[0], turning_point
            if step >= turning_point:
                rollout, until = rollouts[1], config.warm_start.steps
            zero = jnp.zeros(rollout.prompt_lengths.shape)
            for rows in batches(config, player.mesh, rollout, zero, rng):
                state, loss = cloning_step(
                    state, rows, config=player.config, optimizer=optimizer, micro_batches=micro_batches(config)
                )
                step += 1
                if step % 50 == 0 or step == config.warm_start.steps:
                    bar.update(task, completed=step, note=f"loss {float(loss):.3f}")
                if step == until or stop:
                    break
    return state.params
