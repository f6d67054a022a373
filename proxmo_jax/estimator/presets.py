"""Published estimators as settings, by name. Keyword arguments override fields: `proxmo(temperature=0.2)`."""

from proxmo_jax.estimator.types import Settings


def grpo(**knobs) -> Settings:
    """GRPO (arXiv 2402.03300): episode advantage over the standard deviation of the group."""
    return Settings(**{"modulation_range": 0.0, "aggregation": "none", "episode_std": True, **knobs})


def dr_grpo(**knobs) -> Settings:
    """Dr. GRPO (arXiv 2503.20783): mean-centred episode advantage, no division by the standard deviation."""
    return Settings(**{"modulation_range": 0.0, "aggregation": "none", **knobs})


def rloo(**knobs) -> Settings:
    """RLOO (arXiv 2402.14740): each trajectory minus the mean of the others."""
    loo = {"leave_one_out": True, "episode_over": "trajectories"}
    return Settings(**{"modulation_range": 0.0, "aggregation": "none", **loo, **knobs})


def gigpo(**knobs) -> Settings:
    """GiGPO (arXiv 2505.10978), mean-norm form: episode advantage plus step groups of equal observations."""
    return Settings(**{"modulation_range": 0.0, "aggregation": "hard", **knobs})


def gigpo_similarity(**knobs) -> Settings:
    """GiGPO with step groups of similar texts, which `Group.from_steps(..., similarity_threshold=0.95)` forms."""
    return Settings(**{"modulation_range": 0.0, "aggregation": "similar", **knobs})


def proxmo(**knobs) -> Settings:
    """ProxMO (arXiv 2602.19225): modulated episode advantage plus proximity-weighted step baselines."""
    return Settings(**knobs)


def proxmo_without_modulation(**knobs) -> Settings:
    """Ablation of ProxMO without success-rate-aware modulation."""
    return Settings(**{"modulation_range": 0.0, **knobs})


def proxmo_without_proximity(**knobs) -> Settings:
    """Ablation of ProxMO without proximity: modulation and step groups of equal observations."""
    return Settings(**{"aggregation": "hard", **knobs})


def official(**knobs) -> Settings:
    """ProxMO by the rules of the official code.

    p is the mean penalised score over steps, clamped to [0, 1], and a group with a single step keeps its score.
    """
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
