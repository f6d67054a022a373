"""When a run is saved, and what a checkpoint holds beside its arrays."""

import json
import time
from functools import partial
from typing import Any

import jax
from rich.console import Console

from proxmo_jax.agent.run_files import flat, of_another_run
from proxmo_jax.agent.settings import Config
from proxmo_jax.agent.stop import StopOnSignal
from proxmo_jax.training.checkpoint import Checkpoints

CHECKPOINTS = "checkpoints"


class Saves:
    """The saves of a run's loop, or of its warm start.

    Random numbers have no state to be saved: their keys are made of the seed and the number of the iteration, and
    environments of their task alone. What has one (the order of demonstrations) puts it into `progress`.

    Attributes:
        checkpoints: where they go.
        stopping: whether the run was asked to stop, by the last answer of `due`.
        stall: seconds that saves have held up the run since this was last set to 0.
    """

    def __init__(self, config: Config, checkpoints: Checkpoints, stop: StopOnSignal):
        self.checkpoints, self.stopping, self.stall = checkpoints, False, 0.0
        self._config, self._stop, self._last = config, stop, time.monotonic()
        self._complete: tuple[int, Any, dict] | None = None
        stop.rescue = self.rescue

    def newest(self, like: Any, console: Console) -> tuple[int, Any, dict] | None:
        """Restore the newest checkpoint that is whole and of this run, saying which ones are not.

        Args:
            like: as in `Checkpoints.restore`.
            console: where it is said.

        Returns:
            (iteration, state, progress), or None if there is none.

        Raises:
            UserError: if there are checkpoints, but none can be used.
        """
        refuse = partial(of_another_run, self._config)
        return self.checkpoints.restore_newest(like, partial(console.print, soft_wrap=True), refuse)

    def due(self) -> bool:
        """Whether to save now, for the time that has passed or to stop. All processes ask at the same points.

        Raises:
            UserError: if the last save has failed meanwhile.
        """
        self.checkpoints.poll()
        minutes = (time.monotonic() - self._last) / 60
        late = self._stop.agree(0 < self._config.output.save_minutes <= minutes)
        self.stopping = bool(self._stop)
        return late or self.stopping

    def note(self, iteration: int, state: Any, progress: dict) -> None:
        """Keep what is complete, for a rescue at the end of the grace period; `state` may be donated meanwhile."""
        self._complete = iteration, state, progress

    def save(self, iteration: int, state: Any, progress: dict) -> None:
        """Begin to save; `progress` is plain JSON. Raises UserError as `Checkpoints.save` does."""
        began = time.monotonic()
        settings = json.loads(json.dumps(flat(self._config), default=str))
        where = {"devices": jax.device_count(), "processes": jax.process_count()}
        self.checkpoints.save(iteration, state, {"iteration": iteration, **progress, "settings": settings, **where})
        self._last = time.monotonic()
        self.stall += self._last - began

    def rescue(self) -> str:
        """Save what is complete from another thread than the run's, and say so; "" where there is nothing to save."""
        if self._complete is None or jax.process_count() > 1:  # processes would have to agree
            return ""
        iteration, state, progress = self._complete
        if not any(x.is_deleted() for x in jax.tree.leaves(state)):
            self.save(iteration, state, progress)
            self.checkpoints.wait()
        newest = self.checkpoints.latest()
        return f"iteration {newest} is the newest that is saved" if newest else ""
