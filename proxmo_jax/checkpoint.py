"""Saving and restoring a run with Orbax: parameters, optimiser state and where the run stands."""

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

STATE, PROGRESS = "state", "progress"


class Checkpoints:
    """The checkpoints of one run folder; the newest two are kept. A save that is cut off leaves the last one whole."""

    def __init__(self, folder: Path):
        self._manager = ocp.CheckpointManager(
            Path(folder).resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        )

    def save(self, iteration: int, state: Any, progress: dict) -> None:
        """Write state (a pytree of arrays) and progress (plain JSON) as of after `iteration`."""
        if iteration in self._manager.all_steps():
            return
        arguments = {STATE: ocp.args.StandardSave(state), PROGRESS: ocp.args.JsonSave(progress)}
        self._manager.save(iteration, args=ocp.args.Composite(**arguments))
        self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """The newest saved iteration."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The saved iterations, in order."""
        return sorted(self._manager.all_steps())

    def restore(self, like: Any, iteration: int | None = None) -> tuple[Any, dict]:
        """(state, progress) of a checkpoint (default: the newest); `like` gives structure, shapes and shardings."""
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arguments = {STATE: ocp.args.StandardRestore(target), PROGRESS: ocp.args.JsonRestore()}
        restored = self._manager.restore(iteration or self.latest(), args=ocp.args.Composite(**arguments))
        return restored[STATE], restored[PROGRESS]

    def close(self) -> None:
        self._manager.close()


def save_params(folder: Path, params: Any, config: dict) -> None:
    """Write a policy once: parameters, and its config as `config.json` beside them."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder).resolve() / "params", params, force=True)
    (Path(folder) / "config.json").write_text(json.dumps(config, indent=1))


def load_params(folder: Path, like: Any) -> Any:
    """Parameters written by `save_params`; `like` gives structure, shapes and shardings."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(
            Path(folder).resolve() / "params", jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        )
