"""ProxMO for multi-turn language-model agents, natively in JAX: the public door."""

from proxmo_jax.advantages import (
    PRESETS,
    advantages,
    discounted_returns,
    dr_grpo,
    gigpo,
    grpo,
    modulation_weight,
    official,
    proxmo,
    proxmo_without_modulation,
    proxmo_without_proximity,
    rloo,
)
from proxmo_jax.embeddings import Vocabulary, WordCounts, tfidf
from proxmo_jax.proximity import proximity_weights, similar_anchors
from proxmo_jax.types import Advantages, Group, Packing, Settings

__all__ = [
    "PRESETS",
    "Advantages",
    "Group",
    "Packing",
    "Settings",
    "Vocabulary",
    "WordCounts",
    "advantages",
    "discounted_returns",
    "dr_grpo",
    "gigpo",
    "grpo",
    "modulation_weight",
    "official",
    "proximity_weights",
    "proxmo",
    "proxmo_without_modulation",
    "proxmo_without_proximity",
    "rloo",
    "similar_anchors",
    "tfidf",
]
