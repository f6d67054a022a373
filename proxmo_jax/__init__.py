"""ProxMO for multi-turn language-model agents, natively in JAX. `import proxmo_jax as pj` is the public interface.

Names are imported on first use, so that `proxmo --help` does not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proxmo_jax.estimator.batch import batch_advantages, pmapped_advantages, sharded_advantages
    from proxmo_jax.estimator.embeddings import tfidf, token_counts
    from proxmo_jax.estimator.estimator import advantages, discounted_returns, modulation_weight
    from proxmo_jax.estimator.packing import Packing, similar_anchors
    from proxmo_jax.estimator.presets import (
        PRESETS,
        dr_grpo,
        gigpo,
        gigpo_similarity,
        grpo,
        official,
        proxmo,
        proxmo_without_modulation,
        proxmo_without_proximity,
        rloo,
    )
    from proxmo_jax.estimator.proximity import proximity_weights
    from proxmo_jax.estimator.steps_file import steps_advantages
    from proxmo_jax.estimator.types import Advantages, Batch, Group, Settings, sweep
    from proxmo_jax.estimator.words import Vocabulary, WordCounts

_MODULES = ("types", "presets", "estimator", "batch", "embeddings", "packing", "proximity", "steps_file", "words")

__all__ = [
    "PRESETS",
    "Advantages",
    "Batch",
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
    "steps_advantages",
    "sweep",
    "tfidf",
    "token_counts",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            found = vars(importlib.import_module(f"proxmo_jax.estimator.{module}"))
            if name in found:
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
