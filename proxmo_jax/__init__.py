"""ProxMO for multi-turn language-model agents, natively in JAX: the public door."""

from proxmo_jax.estimator.batch import batch_advantages, pmapped_advantages, sharded_advantages
from proxmo_jax.estimator.embeddings import tfidf, token_counts
from proxmo_jax.estimator.estimator import (
    PRESETS,
    advantages,
    discounted_returns,
    dr_grpo,
    gigpo,
    gigpo_similarity,
    grpo,
    modulation_weight,
    official,
    proxmo,
    proxmo_without_modulation,
    proxmo_without_proximity,
    rloo,
)
from proxmo_jax.estimator.packing import Packing, similar_anchors
from proxmo_jax.estimator.proximity import proximity_weights
from proxmo_jax.estimator.types import Advantages, Group, Settings, sweep
from proxmo_jax.estimator.words import Vocabulary, WordCounts

__all__ = [
    "PRESETS",
    "Advantages",
    "Group",
    "Packing",
    "Settings",
    "Vocabulary",
    "WordCounts",
    "advantages",
    "batch_advantages",
    "discounted_returns",
    "dr_grpo",
    "gigpo",
    "gigpo_similarity",
    "grpo",
    "modulation_weight",
    "official",
    "pmapped_advantages",
    "proximity_weights",
    "proxmo",
    "proxmo_without_modulation",
    "proxmo_without_proximity",
    "rloo",
    "sharded_advantages",
    "similar_anchors",
    "sweep",
    "tfidf",
    "token_counts",
]
