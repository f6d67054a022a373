"""Published estimators as settings, by name."""

from proxmo_jax.estimator.types import Settings


def grpo(**knobs) -> Settings:
    """GRPO: episode advantage over the group's std, no modulation, no step advantage."""
    return Settings(**{"modulation_range": 0.0, "aggregation": "none", "episode_std": True, **knobs})


def dr_grpo(**knobs) -> Settings:
    """Dr. GRPO (arXiv 2503.20783): the group mean alone, no division by the std."""
    return Settings(**{"modulation_range": 0.0, "aggregation": "none", **knobs})


def rloo(**knobs) -> Settings:
    """RLOO (arXiv 2402.14740): each trajectory against the mean of the others."""
    loo = {"leave_one_out": True, "episode_over": "trajectories"}
    return Settings(**{"modulation_range": 0.0, "aggregation": "none", **loo, **knobs})


def gigpo(**knobs) -> Settings:
    """GiGPO (arXiv 2505.10978), its mean-norm form: episode advantage plus exact-match step groups."""
    return Settings(**{"modulation_range": 0.0, "aggregation": "hard", **knobs})


def gigpo_similarity(**knobs) -> Settings:
    """GiGPO whose step groups are of similar texts, not only of equal ones.

    They are told where anchors are numbered: `Group.from_steps(..., similarity_threshold=0.95)`.
    """
    return Settings(**{"modulation_range": 0.0, "aggregation": "similar", **knobs})


def proxmo(**knobs) -> Settings:
    """ProxMO (arXiv 2602.19225): modulated episode advantage plus proximity-weighted step baselines."""
    return Settings(**knobs)


def proxmo_without_modulation(**knobs) -> Settings:
    """ProxMO's ablation without success-rate-aware modulation."""
    return Settings(**{"modulation_range": 0.0, **knobs})


def proxmo_without_proximity(**knobs) -> Settings:
    """ProxMO's ablation without proximity: modulation over GiGPO's exact matching."""
    return Settings(**{"aggregation": "hard", **knobs})


def official(**knobs) -> Settings:
    """ProxMO by the official code's rules: p is the clamped mean penalised score over steps; a lone step keeps its
    score."""
    return Settings(**{"success_rate": "official", "lone_step": "official", **knobs})


PRESETS = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "gigpo": gigpo,
    "gigpo_similarity": gigpo_similarity,
    "proxmo": proxmo,
    "proxmo_without_modulation": proxmo_without_modulation,
    "proxmo_without_proximity": proxmo_without_proximity,
    "official": official,
}
