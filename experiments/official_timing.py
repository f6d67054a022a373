"""Time the official estimator on a file of steps: `python official_timing.py CHECKOUT STEPS.npz RESULT.npz`.

`proxmo bench estimator --official CHECKOUT` runs it in an interpreter that has torch and scikit-learn; it imports
nothing of this project. The checkout's module is imported unmodified. If its framework is not installed, a stub
provides the one name that the module imports from it.
"""

import contextlib
import importlib.util
import io
import math
import statistics
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch

INVALID_PENALTY, ALPHA, MODULATION_RANGE = 0.1, 4.0, 0.05


def load(checkout: str):
    """The checkout's module `proxmo/core_proxmo.py`."""
    if importlib.util.find_spec("verl") is None:
        stub = types.ModuleType("verl")
        stub.DataProto = types.SimpleNamespace  # type: ignore[attr-defined]
        sys.modules["verl"] = stub
    spec = importlib.util.spec_from_file_location("core_proxmo", Path(checkout) / "proxmo" / "core_proxmo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def estimate(module, steps: dict[str, np.ndarray]) -> np.ndarray:
    """Joint advantages as its trainer computes them: returns, penalties, soft grouping with modulation."""
    count = len(steps["reward"])
    mask = torch.ones(count, 1)
    penalty = torch.tensor(INVALID_PENALTY * ~steps["action_valid"])
    batch = types.SimpleNamespace(
        batch={"input_ids": mask},
        non_tensor_batch={
            "rewards": steps["reward"].astype(object),
            "traj_uid": steps["trajectory"],
            "active_masks": np.ones(count, object),
        },
    )
    score = module.compute_step_discounted_returns(batch, 0.95) - penalty
    episode = torch.tensor(steps["episode_return"]) - penalty
    beta = MODULATION_RANGE / (1 / (1 + math.exp(-1)) - 0.5)
    joint, _ = module.compute_proxmo_outcome_advantage(
        token_level_rewards=episode[:, None].float(),
        step_rewards=score.float(),
        response_mask=mask,
        anchor_obs=steps["texts"],
        index=steps["group"],
        traj_index=steps["trajectory"],
        mode="soft_grouping",
        enable_psc=True,
        psc_alpha=ALPHA,
        psc_beta=beta,
    )
    return joint[:, 0].numpy()


REPEAT = 3


def main(checkout: str, source: str, target: str) -> None:
    """Write the advantages and the median seconds of `REPEAT` runs after a first one."""
    module = load(checkout)
    with np.load(source) as data:
        # Ids and texts are arrays of Python objects, as in its trainer.
        steps = {name: v.astype(object) if v.dtype.kind == "U" else v for name, v in data.items()}
    _, which = np.unique(steps["trajectory"].astype(str), return_inverse=True)
    steps["episode_return"] = np.bincount(which, steps["reward"])[which]
    times = []
    for _ in range(REPEAT + 1):
        with contextlib.redirect_stdout(io.StringIO()):
            began = time.perf_counter()
            advantage = estimate(module, steps)
            times.append(time.perf_counter() - began)
    np.savez(target, advantage=advantage, seconds=statistics.median(times[1:]))


if __name__ == "__main__":
    main(*sys.argv[1:])
