"""TF-IDF step embeddings on the device: word counts (or token ids) -> unit vectors.

Equal to scikit-learn's `TfidfVectorizer(max_features=...)` with its defaults, except for ties at the vocabulary cut:
scikit-learn follows an unstable sort; here the order is higher corpus frequency, then the smaller word.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from proxmo_jax.estimator.types import pytree
from proxmo_jax.estimator.words import WordCounts

MAX_FEATURES = 1024


@pytree
@dataclass(frozen=True)
class Documents:
    """TF-IDF statistics of the whole batch.

    Attributes:
        column: int32 [V], feature of each word id; out of range for words beyond the vocabulary cut.
        idf: float32 [D], ln((1 + N) / (1 + df)) + 1 with D = min(V, max_features).
        any: bool [], some text has a feature.
    """

    column: jax.Array
    idf: jax.Array
    any: jax.Array


def documents(
    words: WordCounts, repeats: jax.Array, *, max_features: int = MAX_FEATURES, axis_name: str | None = None
) -> Documents:
    """Vocabulary and idf of the batch (source: scikit-learn's TfidfVectorizer).

    The vocabulary is the `max_features` words of highest corpus frequency (ties: the smaller word).
    idf = ln((1 + N) / (1 + df)) + 1 over N texts.

    Args:
        words: counts [..., K].
        repeats: [...], the number of texts that a row of counts represents; 0 for padding.
        max_features: size of the vocabulary; the official code of ProxMO uses 1024.
        axis_name: mapped axis over which corpus frequency, df and N are summed; nothing else is communicated.

    Returns:
        The statistics.
    """
    size = words.alphabetical.shape[0]
    columns = min(size, max_features)
    ids = words.ids.reshape(-1, words.ids.shape[-1])
    repeats = repeats.reshape(-1, 1).astype(jnp.float32)
    counts = words.counts.reshape(ids.shape).astype(jnp.float32)

    def total(x):
        return jax.lax.psum(x, axis_name) if axis_name else x

    # One scatter for both sums: it is the slow part on a CPU.
    both = jnp.stack([counts * repeats, (counts > 0) * repeats], axis=-1)
    frequency, df = total(jnp.zeros((size, 2), jnp.float32).at[ids].add(both)).T
    count = total(repeats.sum())
    column = jnp.arange(size, dtype=jnp.int32)
    if columns < size:
        order = jnp.lexsort((words.alphabetical, -frequency))
        column = jnp.full(size, columns, jnp.int32).at[order[:columns]].set(column[:columns])
        df = df[order[:columns]]
    idf = jnp.log((1.0 + count) / (1.0 + df)) + 1.0
    return Documents(column, idf, (frequency > 0).any())


def unit_vectors(words: WordCounts, corpus: Documents) -> jax.Array:
    """TF-IDF vectors: count * idf of each text, divided by its l2 norm.

    Args:
        words: counts [..., K].
        corpus: statistics of the batch.

    Returns:
        float32 [..., D]; a text without a feature, or padding, is a zero row.
    """
    columns = corpus.idf.shape[0]
    ids = words.ids.reshape(-1, words.ids.shape[-1])
    counts = words.counts.reshape(ids.shape).astype(jnp.float32)
    at = corpus.column[ids]
    # Columns of words beyond the cut are out of range, where the scatter drops them.
    value = counts * corpus.idf.at[at].get(mode="fill", fill_value=0.0)
    norm = jnp.sqrt(jnp.square(value).sum(axis=1, keepdims=True))
    rows = jnp.arange(ids.shape[0])[:, None]
    unit = jnp.zeros((ids.shape[0], columns), jnp.float32)
    unit = unit.at[rows, at].add(value / jnp.where(norm > 0, norm, 1.0), mode="drop")
    return unit.reshape(*words.ids.shape[:-1], columns)


def tfidf(
    words: WordCounts, mask: jax.Array, *, max_features: int = MAX_FEATURES, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """TF-IDF of the whole batch at once.

    Args:
        words: counts [..., K].
        mask: bool [...]; other rows count nowhere and are zero.
        max_features: size of the vocabulary.
        axis_name: as in `documents`.

    Returns:
        Unit vectors float32 [..., min(V, max_features)], and `Group.comparable`: bool, one for each entry of the first
        axis, whether any text has a feature.
    """
    corpus = documents(words, mask, max_features=max_features, axis_name=axis_name)
    unit = jnp.where(mask[..., None], unit_vectors(words, corpus), 0.0)
    return unit, jnp.broadcast_to(corpus.any, mask.shape[:1])


def token_counts(tokens: jax.Array, mask: jax.Array, vocab_size: int) -> WordCounts:
    """Counts of token ids on the device, without host or text; token ids break ties at the vocabulary cut.

    Args:
        tokens: int [..., L].
        mask: bool [..., L].
        vocab_size: V.

    Returns:
        Counts [..., L].
    """
    row = jnp.sort(jnp.where(mask, tokens, vocab_size), axis=-1)
    length = row.shape[-1]
    position = jnp.arange(length)
    first = jnp.concatenate([jnp.ones_like(row[..., :1], bool), row[..., 1:] != row[..., :-1]], axis=-1)
    # The next run starts at the smallest `first` position after this one.
    starts = jnp.where(first, position, length)
    following = jnp.flip(jax.lax.cummin(jnp.flip(starts, -1), axis=starts.ndim - 1), -1)
    after = jnp.concatenate([following[..., 1:], jnp.full_like(following[..., :1], length)], axis=-1)
    real = first & (row < vocab_size)
    return WordCounts(
        jnp.where(real, row, 0).astype(jnp.int32),
        jnp.where(real, after - position, 0).astype(jnp.float32),
        jnp.arange(vocab_size, dtype=jnp.int32),
    )
