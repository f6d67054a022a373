"""Step embeddings on the device: word counts (or token ids) -> TF-IDF unit vectors.

Equal to scikit-learn's `TfidfVectorizer(max_features=...)` with its defaults, but for ties at the vocabulary's
cut, where scikit-learn follows an unstable sort and we take (higher corpus frequency, then the smaller word).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from proxmo_jax.estimator.types import pytree
from proxmo_jax.estimator.words import WordCounts

MAX_FEATURES = 1024


@pytree
@dataclass(frozen=True)
class Documents:
    """What TF-IDF knows of the whole batch.

    column  int32 [V]     feature of each word id; past the end for a word that was cut
    idf     float32 [D]   ln((1 + N) / (1 + df)) + 1, D = min(V, max_features)
    any     bool []       some text has a feature
    """

    column: Any
    idf: Any
    any: Any


def documents(
    words: WordCounts, repeats: jax.Array, *, max_features: int = MAX_FEATURES, axis_name: str | None = None
) -> Documents:
    """Vocabulary and idf of the batch.

    Vocabulary: the `max_features` words of highest corpus frequency (ties: the smaller word). idf =
    ln((1 + N) / (1 + df)) + 1 over N texts. ids, counts [..., K]; repeats [...]: how many texts of the batch a
    row stands for, 0 for padding, which counts nowhere.
    With `axis_name`, corpus frequency, df and N are summed over that mapped axis: nothing else crosses devices.
    Source: scikit-learn TfidfVectorizer; ProxMO's official code uses max_features=1024.
    """
    size = words.alphabetical.shape[0]
    columns = min(size, max_features)
    ids = words.ids.reshape(-1, words.ids.shape[-1])
    repeats = repeats.reshape(-1, 1).astype(jnp.float32)
    counts = words.counts.reshape(ids.shape).astype(jnp.float32)

    def total(x):
        return jax.lax.psum(x, axis_name) if axis_name else x

    # Both sums in one scatter, the slow part on a CPU.
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
    """count * idf of each text, divided by its l2 norm: [..., K] counts -> float32 [..., D].

    A text without a feature, padding too, is a zero row.
    """
    columns = corpus.idf.shape[0]
    ids = words.ids.reshape(-1, words.ids.shape[-1])
    counts = words.counts.reshape(ids.shape).astype(jnp.float32)
    at = corpus.column[ids]
    # Words past the cut point past the end, where the scatter drops them.
    value = counts * corpus.idf.at[at].get(mode="fill", fill_value=0.0)
    norm = jnp.sqrt(jnp.square(value).sum(axis=1, keepdims=True))
    rows = jnp.arange(ids.shape[0])[:, None]
    unit = jnp.zeros((ids.shape[0], columns), jnp.float32)
    unit = unit.at[rows, at].add(value / jnp.where(norm > 0, norm, 1.0), mode="drop")
    return unit.reshape(*words.ids.shape[:-1], columns)


def tfidf(
    words: WordCounts, mask: jax.Array, *, max_features: int = MAX_FEATURES, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """TF-IDF of the whole batch at once: unit vectors, and whether any text has a feature at all.

    ids, counts [..., K], mask [...] -> float32 [..., min(V, max_features)], and one bool per entry of the first
    axis, the same for all (`Group.comparable`). Rows outside the mask count nowhere and are zero.
    """
    corpus = documents(words, mask, max_features=max_features, axis_name=axis_name)
    unit = jnp.where(mask[..., None], unit_vectors(words, corpus), 0.0)
    return unit, jnp.broadcast_to(corpus.any, mask.shape[:1])


def token_counts(tokens: jax.Array, mask: jax.Array, vocab_size: int) -> WordCounts:
    """Counts of token ids that are on the device anyway: no host, no text. tokens int, mask bool [..., L].

    TF-IDF of them compares observations by tokens in place of words; token ids break ties at the vocabulary's cut.
    """
    row = jnp.sort(jnp.where(mask, tokens, vocab_size), axis=-1)
    length = row.shape[-1]
    place = jnp.arange(length)
    first = jnp.concatenate([jnp.ones_like(row[..., :1], bool), row[..., 1:] != row[..., :-1]], axis=-1)
    # The next run starts at the smallest `first` place after this one.
    starts = jnp.where(first, place, length)
    following = jnp.flip(jax.lax.cummin(jnp.flip(starts, -1), axis=starts.ndim - 1), -1)
    after = jnp.concatenate([following[..., 1:], jnp.full_like(following[..., :1], length)], axis=-1)
    real = first & (row < vocab_size)
    return WordCounts(
        jnp.where(real, row, 0).astype(jnp.int32),
        jnp.where(real, after - place, 0).astype(jnp.float32),
        jnp.arange(vocab_size, dtype=jnp.int32),
    )
