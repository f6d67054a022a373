"""Parameters of recorded cases of public code, by the names they have there, as settings of the estimator."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxmo_jax.errors import UserError
from proxmo_jax.estimator.packing import shown
from proxmo_jax.estimator.presets import PRESETS
from proxmo_jax.estimator.types import Settings

OFFICIAL: dict[str, dict[str, Any]] = {
    "hgpo": {"history_weights": "official"},
    "graphgpo": {"path": "official"},
    "g2po": {},
    "gagpo": {"values_over": "batch"},
    "empg": {},
}
"""What the public code of each method does otherwise than the preset, beside a lone step's episode advantage."""
NAMES: dict[str, dict[str, str]] = {
    "hgpo": {"gamma": "discount", "history_length": "history_length", "length_weight_alpha": "length_weight_alpha"},
    "graphgpo": {
        "gamma": "discount", "success_reward": "success_reward", "step_advantage_w": "step_weight",
        "episode_advantage_w": "episode_weight", "similarity_thresh": "",
    },
    "g2po": {
        "value_discount": "discount", "success_reward": "success_reward", "step_advantage_w": "step_weight",
        "step_invalid_penalty": "step_invalid_penalty",
    },
    "gagpo": {"gamma": "discount", "lambda": "lam", "zero_std": ""},
    "empg": {"k": "entropy_scale", "k_f": "clarity_scale", "zeta": "clarity_bonus"},
}  # fmt: skip
"""Numbers of each method: the setting of each name, or none for those that are read apart."""
FLAGS = {
    "hgpo": ("base_group",), "graphgpo": ("normalize_distance", "enable_similarity"), "g2po": (),
    "gagpo": ("standardize",), "empg": ("norm_adv_by_std",),
}  # fmt: skip
WORDS = {"mode": ("mean_std_norm", "mean_norm"), "values_over": ("batch", "group")}
RECORDS = ("method", "seed", "n_steps", "n_trajectories", "n_groups", "finite", "float64_difference", "note")


def read_case(path: Path, steps: Path) -> dict[str, Any]:
    """A case's parameters from a JSON file: one case, or several by name, of which the file of steps has its own.

    Args:
        path: the JSON file.
        steps: the file of steps; its name without the ending is the name of the case.

    Returns:
        The parameters by name.

    Raises:
        UserError: for a file that holds no such case.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: is {type(found).__name__}, need an object of a case's parameters")
    if found and all(isinstance(case, dict) for case in found.values()):
        if steps.stem not in found:
            raise UserError(f"{path}: holds {len(found)} cases and none called {steps.stem!r}, as the file of steps is")
        return found[steps.stem]
    return found


def settings_of_case(case: Mapping[str, Any], method: str | None = None) -> tuple[Settings, float | None]:
    """The estimator by the rules of public code, with a case's parameters.

    Args:
        case: parameters by the names of `NAMES`, `FLAGS` and `WORDS`, epsilon and invalid_penalty; what is missing is
            as in the preset.
        method: a preset, which must be the case's own; default: the one the case names.

    Returns:
        The settings, and the difflib ratio from which on texts are one node of GraphGPO's graph, if they are compared.

    Raises:
        UserError: for another method, and a parameter that the method does not have or cannot have.
    """
    own = case.get("method", method)
    if own not in OFFICIAL:
        raise UserError(f"case: method must be one of {', '.join(OFFICIAL)}; got {own!r}")
    if method not in (None, own):
        raise UserError(f"case: it is of {own}, the preset is {method}; need the same")
    _check(case, own)
    knobs: dict[str, Any] = {"lone_step": "official", **OFFICIAL[own]}
    numbers = {**NAMES[own], "epsilon": "epsilon"} | ({} if own == "gagpo" else {"invalid_penalty": "invalid_penalty"})
    knobs |= {ours: case[name] for name, ours in numbers.items() if name in case and ours}
    if own == "empg":
        knobs["episode_std"] = case.get("norm_adv_by_std", True)
    elif own != "gagpo":
        knobs["episode_std"] = knobs["step_std"] = case.get("mode", "mean_std_norm") == "mean_std_norm"
    knobs |= {name: case[name] for name in ("base_group", "standardize", "values_over") if name in case}
    if case.get("normalize_distance"):
        knobs["path"] = "progress"
    return PRESETS[own](**knobs), case.get("similarity_thresh", 0.95) if case.get("enable_similarity") else None


def _check(case: Mapping[str, Any], method: str) -> None:
    """Raise UserError for a parameter that the method does not have, or of another kind."""
    words = ("values_over",) if method == "gagpo" else ("mode",) if method != "empg" else ()
    numbers = (*NAMES[method], "epsilon", *([] if method == "gagpo" else ["invalid_penalty"]))
    for name, value in case.items():
        if name in RECORDS:
            continue
        if name not in (*words, *numbers, *FLAGS[method]):
            raise UserError(f"case: {method} has no {name}; need {', '.join((*words, *numbers, *FLAGS[method]))}")
        if name in words and value not in WORDS[name]:
            raise UserError(f"case: {name} must be one of {', '.join(WORDS[name])}; got {shown(value)}")
        if name in FLAGS[method] and not isinstance(value, bool):
            raise UserError(f"case: {name} must be true or false; got {shown(value)}")
        if name in numbers and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"case: {name} must be a number; got {shown(value)}")
    if not isinstance(case.get("history_length", 0), int):
        raise UserError(f"case: history_length must be a whole number; got {shown(case['history_length'])}")
    if case.get("zero_std", 1e-6) != 1e-6:
        raise UserError(f"case: zero_std is fixed at 1e-06; got {shown(case['zero_std'])}")
