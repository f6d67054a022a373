"""Saving and restoring a run with Orbax: parameters, optimiser state and where the run stands."""

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
_STATUS = re.compile(r"[A-Z_]+: ")  # how TensorStore's errors begin: NOT_FOUND, RESOURCE_EXHAUSTED, ...


class Checkpoints:
    """The checkpoints of one run folder; the newest two are kept. A save that is cut off leaves the last one whole."""

    def __init__(self, folder: Path):
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._holder = linked(self._folder)
        self._plain = Path(self._holder.name) / LINK
        self._manager = ocp.CheckpointManager(
            self._plain, options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        )

    def save(self, iteration: int, state: Any, progress: dict) -> None:
        """Write state (a pytree of arrays) and progress (plain JSON) as of after `iteration`.

        Raises UserError, and leaves no checkpoint of this iteration, if it cannot be written or read back.
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
        """The newest saved iteration."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The saved iterations, in order."""
        return sorted(self._manager.all_steps())

    def restore(self, like: Any, iteration: int | None = None) -> tuple[Any, dict]:
        """(state, progress) of a checkpoint (default: the newest); `like` gives structure, shapes and shardings.

        Raises UserError if there is no such state to be read.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arguments = {STATE: ocp.args.StandardRestore(target), PROGRESS: ocp.args.JsonRestore()}
        iteration = iteration or self.latest()
        with _reading(self._folder / str(iteration)):
            restored = self._manager.restore(iteration, args=ocp.args.Composite(**arguments))
        return restored[STATE], restored[PROGRESS]

    def close(self) -> None:
        self._manager.close()
        self._holder.cleanup()


def save_params(folder: Path, params: Any, config: dict) -> None:
    """Write a policy once: parameters, and its config as `config.json` beside them, when they can be read back.

    Raises UserError if they cannot be written or read back.
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
    """Parameters written by `save_params`; `like` gives structure, shapes and shardings.

    Raises UserError if there are none to be read.
    """
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with plain_path(folder) as plain, ocp.StandardCheckpointer() as checkpointer, _reading(Path(folder)):
        return checkpointer.restore(plain / "params", target)


def _verify(path: Path, like: Any, named: Path) -> None:
    """Look up every array of a checkpoint on disk. Raises UserError if one is missing or of another shape or type."""
    with ocp.StandardCheckpointer() as checkpointer, _reading(named):
        found: Any = checkpointer.metadata(path)
    found = jax.tree.leaves(getattr(found.item_metadata, "tree", None), is_leaf=lambda leaf: hasattr(leaf, "shape"))
    there, wanted = (sorted((x.shape, str(x.dtype)) for x in leaves) for leaves in (found, jax.tree.leaves(like)))
    if there != wanted:
        raise UserError(f"{named}: what was written is not what was to be saved; need a disk that keeps it")


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A disk's faults as a UserError; what Orbax logs of them is left out."""
    try:
        with _unlogged():
            yield
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and not _STATUS.match(str(error)):
            raise
        raise UserError(f"{folder}: a checkpoint cannot be written there ({_brief(error)})") from error


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Without Orbax's log."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """What is missing, damaged or of another policy as a UserError; Orbax logs nothing of it."""
    try:
        with _unlogged():
            yield
    except Exception as error:
        # Orbax raises a bare Exception where data are missing behind a whole index.
        if type(error) is not Exception and not isinstance(error, (OSError, ValueError, KeyError)):
            raise
        raise UserError(f"{folder}: holds no checkpoint that can be read as this policy's ({_brief(error)})") from error


def _brief(error: Exception) -> str:
    """The system's words in an error, or its first 200 characters."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    system = re.search(r": ([^:]+) \[os_error_code=", text)
    return system.group(1) if system else text[:200]
