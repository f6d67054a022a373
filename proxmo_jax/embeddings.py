"""Step embeddings: anchor observations -> word counts (host) -> TF-IDF unit vectors (device).

Equal to scikit-learn's `TfidfVectorizer(max_features=...)` with its defaults, but for ties at the vocabulary's
cut, where scikit-learn follows an unstable sort and we take (higher corpus frequency, then the smaller word).
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TOKEN = re.compile(r"\b\w\w+\b")
TOKEN_WITH_DIGITS = re.compile(r"\b(?:\w\w+|\d)\b")
MAX_FEATURES = 1024


class WordCounts(NamedTuple):
    """Sparse word counts of `[...]` texts, `K` distinct words at most: ids int32 [..., K], counts float32 [..., K].

    Unused slots have count 0. `alphabetical` int32 [V]: rank of each word id among all words, for ties.
    """

    ids: Any
    counts: Any
    alphabetical: Any


def bucket(size: int, smallest: int = 16) -> int:
    """The next power of two: padded shapes come from few sizes, so that few programs are compiled."""
    return max(smallest, 1 << (max(size, 1) - 1).bit_length())


class Vocabulary:
    """Word ids, growing and free of collisions, and memoised counts of every text seen.

    `keep_digits` also counts single digits, so that 'drawer 1' and 'drawer 2' differ (scikit-learn drops single
    characters, and so does the method as published). The memo holds at most `memo` texts.
    """

    def __init__(self, keep_digits: bool = False, memo: int = 200_000):
        self._pattern = TOKEN_WITH_DIGITS if keep_digits else TOKEN
        self._memo_limit = memo
        self._ids: dict[str, int] = {}
        self._memo: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._alphabetical, self._ranked = np.zeros(0, np.int32), -1

    def __len__(self) -> int:
        return len(self._ids)

    def count(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(word ids, counts) of one text; new words get the next ids."""
        found = self._memo.get(text)
        if found is None:
            counter = Counter(self._pattern.findall(text.lower()))
            ids = np.fromiter((self._ids.setdefault(w, len(self._ids)) for w in counter), np.int32, len(counter))
            found = ids, np.fromiter(counter.values(), np.float32, len(counter))
            if len(self._memo) >= self._memo_limit:
                self._memo.clear()
            self._memo[text] = found
        return found

    def counts(self, texts: Iterable[str]) -> WordCounts:
        """Count many texts: `[N, K]` with K and V padded to powers of two."""
        rows = [self.count(text) for text in texts]
        width = bucket(max((len(ids) for ids, _ in rows), default=1))
        ids, counts = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.float32)
        for i, (row_ids, row_counts) in enumerate(rows):
            ids[i, : len(row_ids)] = row_ids
            counts[i, : len(row_ids)] = row_counts
        return WordCounts(ids, counts, self.alphabetical())

    def alphabetical(self) -> np.ndarray:
        """Rank of each word id in sorted order, padded to a bucket with ranks past every word."""
        if self._ranked != len(self._ids):
            size = bucket(len(self._ids), 256)
            rank = np.arange(size, dtype=np.int32)
            words = sorted(self._ids)
            rank[np.fromiter((self._ids[w] for w in words), np.int64, len(words))] = np.arange(len(words))
            self._alphabetical, self._ranked = rank, len(self._ids)
        return self._alphabetical


def tfidf(
    words: WordCounts, mask: jax.Array, *, max_features: int = MAX_FEATURES, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """TF-IDF of the whole batch: unit vectors, and whether any text has a feature at all.

    Vocabulary: the `max_features` words of highest corpus frequency (ties: the smaller word). idf =
    ln((1 + N) / (1 + df)) + 1 over the N texts under the mask; rows are count * idf, divided by their l2 norm;
    a text without a feature is a zero row. Padding rows are zero and count nowhere.
    ids, counts [..., K], mask [...] -> float32 [..., min(V, max_features)], and one bool per entry of
    the first axis, the same for all (`Group.comparable`).
    With `axis_name`, corpus frequency, df and N are summed over that mapped axis: nothing else crosses devices.
    Source: scikit-learn TfidfVectorizer; ProxMO's official code uses max_features=1024.
    """
    size = words.alphabetical.shape[0]
    columns = min(size, max_features)
    ids = words.ids.reshape(-1, words.ids.shape[-1])
    flat = mask.reshape(-1)
    counts = jnp.where(flat[:, None], words.counts.reshape(ids.shape), 0.0).astype(jnp.float32)

    def total(x):
        return jax.lax.psum(x, axis_name) if axis_name else x

    frequency = total(jnp.zeros(size, jnp.float32).at[ids].add(counts))
    if columns < size:
        order = jnp.lexsort((words.alphabetical, -frequency))
        column = jnp.full(size, columns, jnp.int32).at[order[:columns]].set(jnp.arange(columns, dtype=jnp.int32))
        ids = column[ids]  # dropped words point past the end, where the scatter below drops them
    documents = total(flat.sum().astype(jnp.float32))
    present = counts > 0
    df = total(jnp.zeros(columns, jnp.float32).at[ids].add(present.astype(jnp.float32), mode="drop"))
    idf = jnp.log((1.0 + documents) / (1.0 + df)) + 1.0
    rows = jnp.arange(ids.shape[0])[:, None]
    dense = jnp.zeros((ids.shape[0], columns), jnp.float32).at[rows, ids].add(counts, mode="drop") * idf
    norm = jnp.sqrt(jnp.square(dense).sum(axis=1, keepdims=True))
    unit = dense / jnp.where(norm > 0, norm, 1.0)
    return unit.reshape(*mask.shape, columns), jnp.broadcast_to((frequency > 0).any(), mask.shape[:1])
