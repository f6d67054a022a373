"""Advantages of another trainer's steps, from a file to a file.

proxmo advantages steps.jsonl advantages.jsonl --preset gigpo
proxmo advantages steps.npz advantages.npz --temperature 0.2
proxmo advantages steps.npz advantages.npz --case case.json
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from proxmo_jax.errors import UserError
from proxmo_jax.estimator.cases import read_case, settings_of_case
from proxmo_jax.estimator.presets import PRESETS, proxmo
from proxmo_jax.estimator.steps_file import advantages_of_file
from proxmo_jax.estimator.types import Settings


@dataclass(frozen=True)
class Config:
    """What to read, what to write, and the estimator. Where an option is not given, the preset's value holds."""

    source: tyro.conf.Positional[Path]
    """.npz or .jsonl with, per step: group, trajectory, step, reward, success, action_valid, texts, and response_mask
    (may be left out). graphgpo also reads next_texts, and empg reads entropy."""
    target: tyro.conf.Positional[Path]
    """.npz or .jsonl to write: discounted_return, episode_advantage, step_advantage, advantage, in the same order."""
    preset: str = "proxmo"
    """grpo, dr_grpo, rloo, gigpo, gigpo_similarity, proxmo, proxmo_without_modulation, proxmo_without_proximity,
    official, hgpo, graphgpo, g2po, gagpo or empg."""
    case: Path | None = None
    """JSON file with the parameters of hgpo, graphgpo, g2po, gagpo or empg by the names and the rules of public code,
    such as gamma and mode; of several cases, the one called as the file of steps."""
    similarity_threshold: float | None = None
    """Smallest difflib ratio of texts that share an anchor, with gigpo_similarity (default: 0.95), or a node, with
    graphgpo (default: equal texts share one)."""
    parts: bool = False
    """Also write what the advantages are made of, such as values of states."""
    estimator: Annotated[Settings, tyro.conf.OmitArgPrefixes] = field(default_factory=proxmo)


def default(arguments: list[str]) -> Config:
    """The settings of the preset and the case that the arguments name. Raises UserError for one there is not."""

    @dataclass(frozen=True)
    class Early:
        files: tyro.conf.Positional[tuple[Path, ...]] = ()
        preset: str = ""
        case: Path | None = None

    early, _ = tyro.cli(Early, args=arguments, return_unknown_args=True, add_help=False)
    if early.preset and early.preset not in PRESETS:
        raise UserError(f"--preset must be one of {', '.join(PRESETS)}; got {early.preset!r}")
    if early.case is None:
        preset = early.preset or "proxmo"
        return Config(tyro.MISSING, tyro.MISSING, preset, estimator=PRESETS[preset]())
    try:
        case = read_case(early.case, early.files[0] if early.files else Path())
        settings, threshold = settings_of_case(case, early.preset or None)
    except UserError as error:
        raise UserError(f"--case: {error}") from error
    preset = early.preset or case["method"]
    return Config(tyro.MISSING, tyro.MISSING, preset, early.case, threshold, estimator=settings)


def main(config: Config) -> None:
    """Read, estimate, write. Raises UserError naming the row for steps that cannot be used."""
    count = advantages_of_file(
        config.source, config.target, config.estimator, similarity_threshold=config.similarity_threshold,
        parts=config.parts,
    )  # fmt: skip
    print(f"{config.target}: advantages of {count} steps by {config.preset}")
