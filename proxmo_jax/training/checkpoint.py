"""Checkpoints of a run with Orbax: parameters, optimiser state and progress."""

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from proxmo_jax.errors import UserError
from proxmo_jax.paths import LINK, linked, plain_path

STATE, PROGRESS = "state", "progress"
_STATUS = re.compile(r"[A-Z_]+: ")  # prefix of TensorStore's errors: NOT_FOUND, RESOURCE_EXHAUSTED, ...


class Checkpoints:
    """The checkpoints of one run folder; the newest two are kept. Saves are atomic."""

    def __init__(self, folder: Path):
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._holder = linked(self._folder)
        self._plain = Path(self._holder.name) / LINK
        self._manager = ocp.CheckpointManager(
            self._plain, options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        )

    def save(self, iteration: int, state: Any, progress: dict) -> None:
        """Save the run after an iteration; nothing happens if there is a checkpoint of it.

        Args:
            iteration: number of the iteration.
            state: pytree of arrays.
            progress: plain JSON.

        Raises:
            UserError: if it cannot be written or read back; no checkpoint of this iteration is left.
        """
        if iteration in self._manager.all_steps():
            return
        arguments = {STATE: ocp.args.StandardSave(state), PROGRESS: ocp.args.JsonSave(progress)}
        with _writing(self._folder):
            self._manager.save(iteration, args=ocp.args.Composite(**arguments))
            self._manager.wait_until_finished()
        try:
            _verify(self._plain / str(iteration) / STATE, state, self._folder / str(iteration))
        except UserError:
            self._manager.delete(iteration)
            raise

    def latest(self) -> int | None:
        """The newest saved iteration, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The saved iterations, in order."""
        return sorted(self._manager.all_steps())

    def restore(self, like: Any, iteration: int | None = None) -> tuple[Any, dict]:
        """Restore a checkpoint.

        Args:
            like: pytree with the structure, shapes and shardings of the state.
            iteration: default: the newest.

        Returns:
            (state, progress).

        Raises:
            UserError: if there is no such state.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arguments = {STATE: ocp.args.StandardRestore(target), PROGRESS: ocp.args.JsonRestore()}
        iteration = iteration or self.latest()
        with _reading(self._folder / str(iteration)):
            restored = self._manager.restore(iteration, args=ocp.args.Composite(**arguments))
        return restored[STATE], restored[PROGRESS]

    def close(self) -> None:
        """Release Orbax's resources."""
        self._manager.close()
        self._holder.cleanup()


def save_params(folder: Path, params: Any, config: dict) -> None:
    """Save a policy: its parameters, and `config.json` once they have been read back.

    Args:
        folder: the target; made if it does not exist.
        params: pytree of arrays.
        config: plain JSON.

    Raises:
        UserError: if they cannot be written or read back.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with plain_path(folder) as plain, ocp.StandardCheckpointer() as checkpointer:
        path = plain / "params"
        with _writing(folder):
            checkpointer.save(path, params, force=True)
            checkpointer.wait_until_finished()
        _verify(path, params, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def load_params(folder: Path, like: Any) -> Any:
    """Load parameters written by `save_params`.

    Args:
        folder: of the policy.
        like: pytree with the structure, shapes and shardings of the parameters.

    Returns:
        The parameters.

    Raises:
        UserError: if there are none to be read.
    """
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with plain_path(folder) as plain, ocp.StandardCheckpointer() as checkpointer, _reading(Path(folder)):
        return checkpointer.restore(plain / "params", target)


def _verify(path: Path, like: Any, named: Path) -> None:
    """Check shape and dtype of every array of a checkpoint on disk. Raises UserError if one is missing or differs."""
    with ocp.StandardCheckpointer() as checkpointer, _reading(named):
        found: Any = checkpointer.metadata(path)
    found = jax.tree.leaves(getattr(found.item_metadata, "tree", None), is_leaf=lambda leaf: hasattr(leaf, "shape"))
    there, wanted = (sorted((x.shape, str(x.dtype)) for x in leaves) for leaves in (found, jax.tree.leaves(like)))
    if there != wanted:
        raise UserError(f"{named}: what was written is not what was to be saved; need a disk that keeps it")


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Convert errors of the disk to UserError, and silence Orbax's log."""
    try:
        with _unlogged():
            yield
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and not _STATUS.match(str(error)):
            raise
        raise UserError(f"{folder}: a checkpoint cannot be written there ({_brief(error)})") from error


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Silence Orbax's log."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Convert missing, damaged and unfitting checkpoints to UserError, and silence Orbax's log."""
    try:
        with _unlogged():
            yield
    except Exception as error:
        # Orbax raises a bare Exception if data are missing behind a complete index.
        if type(error) is not Exception and not isinstance(error, (OSError, ValueError, KeyError)):
            raise
        raise UserError(f"{folder}: holds no checkpoint that can be read as this policy's ({_brief(error)})") from error


def _brief(error: Exception) -> str:
    """The system's message in an error, or its first 200 characters."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    system = re.search(r": ([^:]+) \[os_error_code=", text)
    return system.group(1) if system else text[:200]
