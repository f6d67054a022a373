"""Rollouts of some iterations, kept in a run's folder as compressed files of steps with their prompts and responses."""

from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental.multihost_utils import process_allgather

from proxmo_jax.agent import hosts
from proxmo_jax.agent.join import join_texts
from proxmo_jax.agent.loop import steps_of
from proxmo_jax.agent.player import Player
from proxmo_jax.agent.rollout import Rollout
from proxmo_jax.estimator.steps_file import write_steps

FOLDER = "rollouts"


def is_kept(every: int, iteration: int, last: bool) -> bool:
    """Whether the rollout of an iteration is kept; every: iterations between them, 0: none is."""
    return every > 0 and (iteration % every == 0 or iteration == 1 or last)


def kept(run: Path) -> dict[int, Path]:
    """The files of a run's kept rollouts by iteration, in order."""
    files = {int(path.stem): path for path in (run / FOLDER).glob("*.npz") if path.stem.isdecimal()}
    return dict(sorted(files.items()))


def drop_after(run: Path, iteration: int) -> None:
    """Remove rollouts of later iterations, which a resumed run plays again."""
    for number, path in kept(run).items():
        if number > iteration:
            path.unlink()


def keep(run: Path, iteration: int, rollout: Rollout, player: Player, members: int) -> None:
    """Write a rollout's steps and texts to `rollouts/ITERATION.npz`, atomically; all hosts call it.

    Args:
        run: the run's folder.
        iteration: its number.
        rollout: with its buffer.
        player: whose tokenizer decodes the prompts and responses.
        members: episodes of a group.
    """
    rollout = join_texts(rollout)
    steps = {**steps_of(rollout, members), **texts_of(rollout, player)}
    if hosts.is_first():
        (run / FOLDER).mkdir(exist_ok=True)
        write_steps(run / FOLDER / f"{iteration:06d}.npz", steps, compressed=True)


def texts_of(rollout: Rollout, player: Player) -> dict[str, Any]:
    """The texts of a rollout's steps, in the order of `steps_of`.

    Args:
        rollout: with its buffer and the texts of all hosts.
        player: whose tokenizer decodes tokens; special tokens are shown.

    Returns:
        N strings each: task, prompt, response and command.
    """
    assert rollout.buffer is not None
    at = [(e, t) for e, turns in enumerate(rollout.transcripts) for t in range(len(turns))]
    prompts, responses = process_allgather((rollout.buffer.prompts, rollout.buffer.responses), tiled=True)
    lengths, answers = rollout.prompt_lengths, rollout.response_lengths

    def decoded(rows: list[np.ndarray]) -> list[str]:
        tokens = [row.tolist() for row in rows]
        return player.tokenizer.backend_tokenizer.decode_batch(tokens, skip_special_tokens=False)

    return {
        "task": [rollout.tasks[e] for e, _ in at],
        "prompt": decoded([prompts[e, t, prompts.shape[2] - lengths[e, t] :] for e, t in at]),
        "response": decoded([responses[e, t, : answers[e, t]] for e, t in at]),
        "command": [rollout.transcripts[e][t][1] for e, t in at],
    }
