"""Checkpoints of a run with Orbax: parameters, optimiser state and progress.

Saves are asynchronous: the arrays are copied to the host, and written while training goes on. A folder gets its final
name when all is written, so that a process killed at any moment leaves whole checkpoints alone, and what is not whole
is removed by the next run that writes there.
"""

import contextlib
import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from proxmo_jax.errors import UserError
from proxmo_jax.paths import LINK, linked, plain_path, write_whole

STATE, PROGRESS = "state", "progress"
SCORES = "scores.json"  # of the evaluations, by iteration, beside the checkpoints
ASIDE = ".unreadable"  # suffix of a checkpoint that a resumed run could not use
UNFINISHED = "*.orbax-checkpoint-tmp*"
_STATUS = re.compile(r"[A-Z_]+: ")  # prefix of TensorStore's errors: NOT_FOUND, RESOURCE_EXHAUSTED, ...


class Checkpoints:
    """The checkpoints of one run folder: the newest ones, and the one that was best in evaluation.

    Several processes make the same calls in the same order, as Orbax requires.
    """

    def __init__(self, folder: Path, *, keep: int = 2, writes: bool = True):
        """Open the folder.

        Args:
            folder: of the checkpoints; made if it does not exist.
            keep: newest checkpoints that are kept.
            writes: whether saves are to come; what an interrupted save left is removed then.
        """
        self._folder, self._keep, self._writes = Path(folder), keep, writes
        self._folder.mkdir(parents=True, exist_ok=True)
        self._holder = linked(self._folder)
        self._plain = Path(self._holder.name) / LINK
        self._lock = threading.RLock()  # a rescue at the end of a grace period comes from another thread
        self._unverified: tuple[int, Any] | None = None  # a save that may still go on, and its shapes
        self._scores = self._read_scores()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self, create=True, cleanup_tmp_directories=writes, lightweight_initialize=True
        )
        self._quiet = contextlib.ExitStack()  # a failing save logs from its own thread
        self._quiet.enter_context(_unlogged())
        with _writing(self._folder):
            self._manager = ocp.CheckpointManager(self._plain, options=options)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's question which checkpoints stay, in order of their iterations."""
        steps = [info.step for info in checkpoints]
        kept = {*steps[-self._keep :], self._best(steps)}
        return [step in kept for step in steps]

    def save(self, iteration: int, state: Any, progress: dict) -> None:
        """Begin to save the run after an iteration; nothing happens if there is a checkpoint of it.

        Returns when the arrays are on the host, so that `state` may be donated.

        Args:
            iteration: number of the iteration.
            state: pytree of arrays.
            progress: plain JSON.

        Raises:
            UserError: if this or an earlier checkpoint cannot be written or read back; none of that iteration is left.
        """
        with self._lock:
            self.wait()
            if iteration in self._manager.all_steps():
                return
            progress = {**progress, "checksums": checksums(state)}
            arguments = {STATE: ocp.args.StandardSave(state), PROGRESS: ocp.args.JsonSave(progress)}
            self._unverified = iteration, jax.eval_shape(lambda x: x, state)
            with self._given_up_if_it_fails():
                self._manager.save(iteration, args=ocp.args.Composite(**arguments))

    def poll(self) -> None:
        """Raise UserError if the last save has failed meanwhile; does not wait for it.

        Several processes, which do not end it at the same moment, hear of it at the next save.
        """
        if self._unverified and jax.process_count() == 1 and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait for the end of a save. Raises UserError if it failed; no checkpoint of its iteration is left then."""
        with self._lock:
            if not self._unverified:
                return
            iteration, like = self._unverified
            with self._given_up_if_it_fails():
                self._manager.wait_until_finished()
            self._unverified = None
            try:
                _verify(self._plain / str(iteration) / STATE, like, self._folder / str(iteration))
            except UserError:
                self._manager.delete(iteration)
                raise

    @contextlib.contextmanager
    def _given_up_if_it_fails(self) -> Iterator[None]:
        """Remove what a failed save has written: on a full disk nothing else could be."""
        try:
            with _writing(self._folder):
                yield
        except UserError:
            self._unverified = None
            for path in self._folder.glob(UNFINISHED):
                shutil.rmtree(path, ignore_errors=True)
            raise

    def note_score(self, iteration: int, score: float) -> bool:
        """Record the evaluation of an iteration, before its checkpoint is saved: the best one's stays.

        Args:
            iteration: its number.
            score: more is better.

        Returns:
            Whether no saved checkpoint has one as good.
        """
        known = {step: self._scores[step] for step in self.steps() if step in self._scores and step != iteration}
        self._scores = {**known, iteration: score}
        if jax.process_index() == 0:
            write_whole(self._folder / SCORES, json.dumps(self._scores))
        return score > max(known.values(), default=-float("inf"))

    def _read_scores(self) -> dict[int, float]:
        try:
            found = json.loads((self._folder / SCORES).read_text(encoding="utf-8"))
            return {int(iteration): float(score) for iteration, score in found.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def best(self) -> int | None:
        """The saved iteration with the best evaluation, the newest of equals; None if none was evaluated."""
        return self._best(self.steps())

    def _best(self, steps: Sequence[int]) -> int | None:
        return max((step for step in steps if step in self._scores), key=lambda i: (self._scores[i], i), default=None)

    def latest(self) -> int | None:
        """The newest saved iteration, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The saved iterations, in order."""
        return sorted(self._manager.all_steps())

    def restore(self, like: Any, iteration: int) -> tuple[Any, dict]:
        """Restore a checkpoint, onto whatever devices there are now.

        Args:
            like: pytree with the structure, shapes and shardings of the state.
            iteration: of the checkpoint.

        Returns:
            (state, progress).

        Raises:
            UserError: if there is no such state, or it is not what was saved.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arguments = {STATE: ocp.args.StandardRestore(target), PROGRESS: ocp.args.JsonRestore()}
        named = self._folder / str(iteration)
        with _reading(named):
            restored = self._manager.restore(iteration, args=ocp.args.Composite(**arguments))
        state, progress = restored[STATE], restored[PROGRESS]
        saved = progress.pop("checksums", None)  # checkpoints of version 0.1 have none
        if saved is not None and saved != checksums(state):
            raise UserError(f"{named}: is damaged (its arrays do not have the checksums that were saved with them)")
        return state, progress

    def restore_newest(
        self, like: Any, say: Callable[[str], None], refuse: Callable[[dict], str] = lambda progress: ""
    ) -> tuple[int, Any, dict] | None:
        """Restore the newest checkpoint that can be used. Newer ones that cannot are renamed, if `writes`.

        Args:
            like: as in `restore`.
            say: receives a sentence about each that cannot be used.
            refuse: why a checkpoint with this progress is not of this run, "" if it is.

        Returns:
            (iteration, state, progress), or None if there is no checkpoint.

        Raises:
            UserError: if there are checkpoints, but none can be used.
        """
        reasons: dict[int, str] = {}
        for iteration in reversed(self.steps()):
            try:
                state, progress = self.restore(like, iteration)
                reason = refuse(progress)
                if reason:
                    raise UserError(f"{self._folder / str(iteration)}: is of another run ({reason})")
            except UserError as error:
                reasons[iteration] = str(error)
                continue
            for bad, reason in reasons.items():
                say(f"{reason}; skipped, {iteration} is used")
                self._set_aside(bad)
            return iteration, state, progress
        if reasons:
            others = f", nor can the {len(reasons) - 1} older ones be used" if len(reasons) > 1 else ""
            raise UserError(f"{next(iter(reasons.values()))}{others}; need one that can, or the folder removed")
        return None

    def _set_aside(self, iteration: int) -> None:
        """Rename a checkpoint, so that another one of its iteration can be written."""
        if not self._writes:
            return
        if jax.process_index() == 0:
            target = self._folder / f"{iteration}{ASIDE}"
            shutil.rmtree(target, ignore_errors=True)
            (self._folder / str(iteration)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoint {iteration} set aside")
        self._manager.reload()

    def close(self) -> None:
        """Wait for the end of a save and release Orbax's resources. Raises UserError if the save failed."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # it raises what `wait` has raised
                self._manager.close()
            self._quiet.close()
            self._holder.cleanup()


def checksums(state: Any) -> list[int]:
    """A checksum of each array, the same on every mesh: sums of its bits, weighted by position, modulo 2**32.

    Args:
        state: pytree of arrays.

    Returns:
        One number for each leaf.
    """
    found = _checksums(state)
    if not found.is_fully_addressable:
        found = multihost_utils.process_allgather(found, tiled=True)
    return [int(x) for x in np.asarray(found)]


@jax.jit
def _checksums(state: Any) -> jax.Array:
    def of(x: jax.Array) -> jax.Array:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
        weight, stride = jnp.ones(x.shape, jnp.uint32), 2  # odd weights: no bit is lost
        for axis in reversed(range(x.ndim)):
            weight += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % (1 << 32))
            stride *= x.shape[axis]
        return (bits * weight).sum(dtype=jnp.uint32)

    return jnp.stack([of(x) for x in jax.tree.leaves(state)])


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
