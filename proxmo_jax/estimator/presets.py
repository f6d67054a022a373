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


def hgpo(**knobs) -> Settings:
    """HGPO (arXiv 2602.22817): step groups of equal histories of 1 to history_length + 1 observations, no episode part.

    The weights are the paper's; history_weights="official" has those of verl-agent's code.
    """
    std = {"episode_std": True, "step_std": True, "biased_std": True}
    part = {"aggregation": "hard", "history_length": 2, "episode_over": "none"}
    return Settings(**{"modulation_range": 0.0, **std, **part, **knobs})


def graphgpo(**knobs) -> Settings:
    """GraphGPO (arXiv 2605.26684): distance to the goal in the graph of the group's observations; needs `next_texts`.

    The discounted path is the paper's; path="official" has that of verl-agent's code, "progress" its
    normalised distance. The discount is for each action of the path.
    """
    part = {"aggregation": "hard", "score": "distance", "discount": 0.1}
    return Settings(**{"modulation_range": 0.0, "episode_std": True, "step_std": True, **part, **knobs})


def g2po(**knobs) -> Settings:
    """G2PO (arXiv 2606.22995): values of states as nodes, and their gains as edges, beside the episode advantage."""
    part = {"aggregation": "hard", "score": "gain", "step_invalid_penalty": 0.1}
    return Settings(**{"modulation_range": 0.0, "episode_std": True, "step_std": True, **part, **knobs})


def gagpo(**knobs) -> Settings:
    """GAGPO (arXiv 2605.13217): generalised advantage estimation over values of states, standardised in the group.

    The values are the group's, as in the paper; values_over="batch" has the only public code's. No episode part.
    """
    part = {"aggregation": "hard", "score": "td", "step_std": True, "epsilon": 1e-4}
    none = {"episode_over": "none", "invalid_penalty": 0.0, "step_invalid_penalty": 0.0}
    return Settings(**{"modulation_range": 0.0, **part, **none, **knobs})


def empg(**knobs) -> Settings:
    """EMPG (arXiv 2509.09265): GRPO scaled by the entropy of responses, with a bonus; needs `entropy`."""
    return Settings(**{"modulation_range": 0.0, "aggregation": "none", "episode_std": True, "entropy": True, **knobs})


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
    "hgpo": hgpo,
    "graphgpo": graphgpo,
    "g2po": g2po,
    "gagpo": gagpo,
    "empg": empg,
}
