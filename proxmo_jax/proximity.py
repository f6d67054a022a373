"""Step baselines from comparing the observations of one group: exact matching (GiGPO) and proximity (ProxMO)."""

import difflib

import jax
import jax.numpy as jnp
import numpy as np

from proxmo_jax.types import masked_mean


def similarity(embedding: jax.Array) -> jax.Array:
    """Cosine similarity of unit vectors: `[N, D] -> [N, N]` float32. A zero row has similarity 0 to everything.

    `HIGHEST`: on TPU the default rounds the product to bfloat16, which moved step advantages by up to 0.03.
    """
    embedding = embedding.astype(jnp.float32)
    return jnp.einsum("id,jd->ij", embedding, embedding, precision=jax.lax.Precision.HIGHEST)


def proximity_weights(
    embedding: jax.Array, mask: jax.Array, *, temperature: jax.Array | float, exclude_self: bool = False
) -> jax.Array:
    """Softmax over the steps j of the group of c_ij / tau (ProxMO, proximity-based soft aggregation).

    embedding [N, D], mask [N] -> weights [N, N] float32; columns of padding are 0, rows sum to 1 (0 where there
    is nothing to compare with: padding, or a lone step under `exclude_self`).
    """
    logits = similarity(embedding) / temperature
    allowed = mask[:, None] & mask[None, :]
    if exclude_self:
        allowed &= ~jnp.eye(mask.shape[0], dtype=bool)
    peak = jnp.max(jnp.where(allowed, logits, -jnp.inf), axis=1, keepdims=True)
    weight = jnp.where(allowed, jnp.exp(logits - jnp.where(jnp.isfinite(peak), peak, 0.0)), 0.0)
    total = weight.sum(axis=1, keepdims=True)
    return weight / jnp.where(total > 0, total, 1.0)


def soft_advantage(
    score: jax.Array,
    embedding: jax.Array,
    mask: jax.Array,
    *,
    temperature: jax.Array | float,
    exclude_self: bool = False,
) -> jax.Array:
    """A_i = Q_i - sum_j w_ij Q_j, w = `proximity_weights`. score [N], embedding [N, D], mask [N] -> [N] float32."""
    weight = proximity_weights(embedding, mask, temperature=temperature, exclude_self=exclude_self)
    # Centred first: the weights sum to 1, so only rounding changes, and that for the better.
    score = jnp.where(mask, score - masked_mean(score, mask), 0.0)
    baseline = jnp.einsum("ij,j->i", weight, score, precision=jax.lax.Precision.HIGHEST)
    has_baseline = weight.sum(axis=1) > 0
    return jnp.where(mask & has_baseline, score - baseline, 0.0)


def hard_advantage(
    score: jax.Array, anchor: jax.Array, mask: jax.Array, *, std: bool = False, epsilon: jax.Array | float = 1e-6
) -> jax.Array:
    """GiGPO: A_i = Q_i - mean of Q over the steps with the same anchor id; `std` divides by their unbiased std.

    score [N], anchor int [N], mask [N] -> [N] float32; a step alone with its anchor gets 0.
    """
    same = (anchor[:, None] == anchor[None, :]) & mask[:, None] & mask[None, :]
    count = jnp.maximum(same.sum(axis=1), 1).astype(jnp.float32)
    score = jnp.where(mask, score - masked_mean(score, mask), 0.0)
    mean = jnp.where(same, score[None, :], 0.0).sum(axis=1) / count
    advantage = score - mean
    if std:
        square = jnp.where(same, (score[None, :] - mean[:, None]) ** 2, 0.0).sum(axis=1)
        advantage = advantage / (jnp.sqrt(square / jnp.maximum(count - 1.0, 1.0)) + epsilon)
    return jnp.where(mask & (count > 1), advantage, 0.0)


def similar_anchors(texts: list[str], group: np.ndarray, threshold: float = 0.95) -> np.ndarray:
    """Anchor ids by similarity instead of identity (GiGPO's `similar` variant), on the host.

    First fit in file order inside each group: a step joins the first cluster whose first text has a difflib
    ratio >= threshold with its own, else founds one. texts N, group [N] -> int32 [N].
    """
    anchor = np.empty(len(texts), np.int32)
    clusters: dict[object, list[tuple[str, int]]] = {}
    founded = 0
    for i, (text, owner) in enumerate(zip(texts, np.asarray(group).tolist(), strict=True)):
        mine = clusters.setdefault(owner, [])
        for representative, cluster in mine:
            if difflib.SequenceMatcher(None, text, representative).ratio() >= threshold:
                anchor[i] = cluster
                break
        else:
            anchor[i] = founded
            mine.append((text, founded))
            founded += 1
    return anchor
