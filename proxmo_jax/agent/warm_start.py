"""Where reinforcement learning starts: a pretrained language model, or a policy cloned from demonstrations."""

import contextlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console

from envs_bridge.played import read_episodes
from envs_bridge.turn import Game
from proxmo_jax.agent import hosts
from proxmo_jax.agent.batches import batches
from proxmo_jax.agent.demonstrations import Example, demonstration_buffer, demonstrations
from proxmo_jax.agent.make_player import (
    WARM_START,
    holds_tokenizer,
    holds_warm_start,
    new_state,
    untrained_params,
    warm_params,
)
from proxmo_jax.agent.nonfinite import check_losses
from proxmo_jax.agent.player import Player
from proxmo_jax.agent.report import progress_bar, watched
from proxmo_jax.agent.saves import CHECKPOINTS, Saves
from proxmo_jax.agent.settings import Config, has_warm_start, micro_batches, warm_steps
from proxmo_jax.agent.stop import StopOnSignal, Stopped
from proxmo_jax.agent.tasks import demonstrated, environment, memory_of
from proxmo_jax.errors import UserError
from proxmo_jax.policy import adapters
from proxmo_jax.policy.sharding import replicate
from proxmo_jax.training.checkpoint import Checkpoints, save_params
from proxmo_jax.training.rows import Rows
from proxmo_jax.training.update import cloning_step, make_optimizer


def needs_demonstrations(config: Config) -> bool:
    """Whether a run reads demonstrations: for a warm start or a small policy's tokenizer that it has to make."""
    if config.warm_start.from_run is not None:
        return False
    if not (config.model.path or holds_tokenizer(config.output.dir)):
        return True
    return warm_steps(config) > 0 and not holds_warm_start(config.output.dir)


def refuse_missing_demonstrations(config: Config) -> None:
    """Raise UserError where a warm start has nothing to clone, or a file of episodes that cannot be cloned."""
    if not needs_demonstrations(config):
        return
    file = config.warm_start.demonstrations
    if file is not None:
        read_episodes(file, config.env.name)
    elif environment(config).demonstrations is None:
        raise UserError(
            f"--env {config.env.name} has no demonstrations for a warm start; need a --model and --warm-start.steps 0,"
            " or --warm-start.demonstrations FILE (proxmo play --keep FILE)"
        )


def careful_and_careless(config: Config, games: list[Game], console: Console) -> list[list[Example]]:
    """Demonstrations of both habits, of the games that our engine plays, each with the episodes of
    --warm-start.demonstrations. Raises UserError if there are none."""
    file = config.warm_start.demonstrations
    played = demonstrations(read_episodes(file, config.env.name), memory_of(config)) if file else []
    if environment(config).demonstrations is None:
        return [played, played]
    return [played + _demonstrate(config, games, rate, console) for rate in (0.0, config.warm_start.mistake_rate)]


def _demonstrate(config: Config, games: list[Game], mistake_rate: float, console: Console) -> list[Example]:
    episodes = watched(demonstrated(config, games, mistake_rate), "demonstrations", console, len(games))
    examples = demonstrations(episodes, memory_of(config))
    if not examples:
        raise UserError("warm start: there is no demonstration; our engine plays none of the training games")
    return examples


def starting_point(
    config: Config,
    player: Player,
    demos: list[list[Example]],
    key: jax.Array,
    console: Console,
    watch: Callable[[str], None],
    stop: StopOnSignal,
) -> Any:
    """The parameters that reinforcement learning starts from, which are also the reference of the KL.

    A warm start is made once; what it trains is kept in the run's folder.

    Raises:
        Stopped: in a warm start, which is saved.
    """
    untrained = untrained_params(config, player, key)
    if not has_warm_start(config):
        return untrained
    if not hosts.of_first("the warm start", holds_warm_start(config.output.dir)):
        if config.warm_start.from_run:
            params = warm_params(config.warm_start.from_run, untrained)
        else:
            params = warm_start(config, player, demos, untrained, console, watch, stop)
        save_params(config.output.dir / WARM_START, adapters.split(params)[1], player.config.to_dict())
    if jax.process_index() == 0:
        shutil.rmtree(config.output.dir / WARM_START / CHECKPOINTS, ignore_errors=True)  # no longer needed
    return warm_params(config.output.dir, untrained)


def warm_start(
    config: Config,
    player: Player,
    demos: list[list[Example]],
    params: Any,
    console: Console,
    watch: Callable[[str], None],
    stop: StopOnSignal,
) -> Any:
    """Behaviour cloning: first of careful demonstrations, at the end of careless ones.

    One that was interrupted goes on from its newest checkpoint, with the mini-batches that were still to come.

    Args:
        config: the run's settings.
        player: the policy.
        demos: careful and careless demonstrations.
        params: the policy's parameters; adapters alone are trained if there are any.
        console: where progress is shown.
        watch: is told what begins.
        stop: ends it early.

    Returns:
        The cloned parameters.

    Raises:
        Stopped: it was ended early, and is saved.
        UserError: for a loss that is not finite, or a checkpoint that cannot be written.
    """
    thoughts = bool(config.model.path) and config.warm_start.thoughts
    rollouts = [demonstration_buffer(player, examples, thoughts=thoughts) for examples in demos]
    for rollout in rollouts:
        rollout.buffer = replicate(player.mesh, rollout.buffer)
    steps = warm_steps(config)
    turning_point = steps - round(config.warm_start.careless_share * steps)
    optimizer = make_optimizer(
        config.warm_start.learning_rate,
        config.optimizer.weight_decay,
        config.optimizer.max_grad_norm,
        warmup=min(20, steps // 20),
        decay_steps=steps,
    )
    frozen, _ = adapters.split(params)
    state = new_state(player, params, optimizer)
    rng = np.random.default_rng(config.seed)
    step, skip = 0, 0  # steps done, and mini-batches done of the pass over the demonstrations that `rng` begins
    unchecked: list[tuple[jax.Array, Rows]] = []  # losses and their mini-batches, since the last wait for the device
    shown_every = max(steps // 40, 1)

    def check() -> None:
        losses, rows = [loss for loss, _ in unchecked], [rows for _, rows in unchecked]
        part = f"warm start steps {step - len(unchecked) + 1} to {step}"
        check_losses(config.output.dir, part, jax.device_get(losses), rows)
        unchecked.clear()

    asked_every = 1 if hosts.count() == 1 else shown_every  # to save or stop: the other hosts answer, too
    folder = config.output.dir / WARM_START / CHECKPOINTS
    with contextlib.closing(Checkpoints(folder)) as checkpoints, progress_bar(console) as bar:
        saves = Saves(config, checkpoints, stop)
        if found := saves.newest(state, console):
            step, state, progress = found
            rng.bit_generator.state, skip = progress["rng"], progress["batches"]
            console.print(f"The warm start goes on after step {step}.")
        task = bar.add_task("warm start", total=steps, completed=step, note="")
        while step < steps:
            rollout, until = (rollouts[0], turning_point) if step < turning_point else (rollouts[1], steps)
            zero = np.zeros(rollout.prompt_lengths.shape, np.float32)
            order, passed = rng.bit_generator.state, skip
            for rows in batches(config, player.mesh, rollout, rollout.prompt_lengths > 0, zero, rng, skip):
                watch(f"warm start, step {step + 1}")
                with jax.set_mesh(player.mesh):
                    state, loss = cloning_step(
                        state,
                        rows,
                        frozen,
                        config=player.config,
                        optimizer=optimizer,
                        micro_batches=micro_batches(config),
                    )
                step += 1
                passed += 1
                unchecked.append((loss, rows))
                over = step == until
                if over:
                    order, passed = rng.bit_generator.state, 0
                if step % shown_every == 0 or step == steps:
                    check()
                    bar.update(task, completed=step, note=f"loss {float(loss):.3f}")
                if step % asked_every == 0 and saves.due() and step < steps:
                    check()
                    saves.save(step, state, {"rng": order, "batches": passed})
                if saves.stopping and step < steps:
                    raise Stopped
                if over:
                    break
            skip = 0
    return adapters.join(frozen, state.params)
