"""Word counts on the host: texts -> word ids and counts, by scikit-learn's default rule of what a word is.

Knows texts and NumPy, not devices. Counting is the estimator's largest cost, so many texts are split in one pass and
every text is counted once, however often it is seen.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

# Maximal runs of word characters; which of them count is decided once per word (`_Ids`).
RUN = re.compile(r"\w+|\0")
ASCII_RUN = bytes(c if chr(c).isalnum() or c in b"_\0" else 32 for c in range(128)).lower() + bytes(128)
END = "\0"  # ends a text in a joined one; no word character, so it joins nothing


class WordCounts(NamedTuple):
    """Sparse word counts of `[...]` texts, `K` distinct words at most: ids int32 [..., K], counts float32 [..., K].

    Unused slots have count 0; an id stands once in a row. `alphabetical` int32 [V]: rank of each word id among all
    words, for ties.
    """

    ids: Any
    counts: Any
    alphabetical: Any


def bucket(size: int, smallest: int = 16) -> int:
    """The next power of two: padded shapes come from few sizes, so that few programs are compiled."""
    return max(smallest, 1 << (max(size, 1) - 1).bit_length())


class _Ids(dict):
    """Word -> id; an unseen word gets the next id, and one that does not count gets -1."""

    def __init__(self, keep_digits: bool):
        super().__init__()
        self.words: list[str] = []
        self._keep_digits = keep_digits

    def __missing__(self, word: str) -> int:
        counts = len(word) > 1 or (self._keep_digits and word.isdecimal())
        self[word] = number = len(self.words) if counts else -1
        if counts:
            self.words.append(word)
        return number


class Vocabulary:
    """Word ids, growing and free of collisions, and memoised counts of every text seen.

    A word is scikit-learn's default, `\\b\\w\\w+\\b` of the lower-cased text. `keep_digits` also counts single digits,
    so that 'drawer 1' and 'drawer 2' differ (scikit-learn drops single characters, and so does the method as
    published). The memo is emptied when it holds more than `memo` texts.
    """

    def __init__(self, keep_digits: bool = False, memo: int = 200_000):
        self._ids = _Ids(keep_digits)
        self._memo_limit = memo
        self._alphabetical, self._ranked = np.zeros(0, np.int32), -1
        self._forget()

    def __len__(self) -> int:
        return len(self._ids.words)

    def _forget(self) -> None:
        # Counts of all texts end to end; those of text i lie at [_starts[i], _starts[i + 1]). Longer than in use, so
        # that appending a few seldom copies all.
        self._memo: dict[str, int] = {}
        self._flat_ids, self._flat_counts = np.zeros(0, np.int32), np.zeros(0, np.float32)
        self._starts = np.zeros(1, np.int64)

    def rows(self, texts: Sequence[str], words: Sequence[Mapping[str, int] | None] | None = None) -> np.ndarray:
        """A number for each text, int64 [N]: equal numbers, equal texts. Valid until the next call.

        words: counts of the texts' words where somebody has counted them already, by the same rule.
        """
        if len(self._memo) > self._memo_limit:
            self._forget()
        memo, before = self._memo, len(self._memo)
        rows = np.fromiter((memo.setdefault(text, len(memo)) for text in texts), np.int64, len(texts))
        new = len(memo) - before
        if new:
            known = dict(zip(texts, words, strict=True)) if words is not None else {}
            fresh = list(islice(reversed(memo), new))[::-1]
            counted = [known.get(text) for text in fresh]
            if all(counts is not None for counts in counted):
                self._take(before, counted)  # type: ignore[arg-type]
            else:
                self._count(before, fresh)
        return rows

    def _take(self, before: int, counted: list[Mapping[str, int]]) -> None:
        """Append counts made elsewhere."""
        ids = np.array([self._ids[word] for counts in counted for word in counts], np.int32)
        counts = np.array([n for counts in counted for n in counts.values()], np.float32)
        self._append(before, ids, counts, np.cumsum([len(counts) for counts in counted]))

    def _count(self, before: int, texts: list[str]) -> None:
        """Append the counts of new texts, all split in one pass."""
        tokens = _runs(texts)
        self._ids[END] = -2
        ids = np.fromiter(map(self._ids.__getitem__, tokens), np.int64, len(tokens))
        text = np.cumsum(ids == -2)
        real = ids >= 0
        size = max(len(self), 1)
        # One number for (text, word) sorts both at once; equal neighbours are one word of one text.
        both = np.sort(text[real] * size + ids[real])
        first = np.flatnonzero(np.diff(both, prepend=-1))
        counts = np.diff(first, append=len(both))
        both = both[first]
        owner = both // size
        ends = np.searchsorted(owner, np.arange(len(texts)), side="right")
        self._append(before, (both - owner * size).astype(np.int32), counts.astype(np.float32), ends)

    def _append(self, before: int, ids: np.ndarray, counts: np.ndarray, ends: np.ndarray) -> None:
        """Put ids and counts of the texts numbered `before` and up, which end at `ends`, behind those of the others."""
        used = int(self._starts[before])
        self._starts = _put(self._starts, before + 1, used + ends)
        self._flat_ids, self._flat_counts = _put(self._flat_ids, used, ids), _put(self._flat_counts, used, counts)

    def longest(self, rows: np.ndarray) -> int:
        """The most distinct words of the texts numbered `rows`, int64 [N]."""
        return int((self._starts[rows + 1] - self._starts[rows]).max(initial=0))

    def cut(self, rows: np.ndarray, most: int) -> "Vocabulary":
        """The vocabulary with only the `most` commonest words of the texts numbered `rows`, int64 [N], in those texts.

        Those are the ones TF-IDF keeps (ties: the smaller word). Itself if no text has more than so many.
        """
        used, repeats = np.unique(rows, return_counts=True)
        length = self._starts[used + 1] - self._starts[used]
        if length.max(initial=0) <= most:
            return self
        text = np.repeat(np.arange(len(used)), length)
        source = np.arange(len(text)) + np.repeat(self._starts[used] - (np.cumsum(length) - length), length)
        ids, counts = self._flat_ids[source], self._flat_counts[source]
        frequency = np.bincount(ids, counts * repeats[text], len(self))
        order = np.lexsort((self.alphabetical()[: len(self)], -frequency))
        kept = np.isin(ids, order[:most])
        cut = copy.copy(self)
        cut._flat_ids, cut._flat_counts = ids[kept], counts[kept]
        lengths = np.zeros(used[-1] + 1, np.int64)
        lengths[used] = np.bincount(text[kept], minlength=len(used))
        cut._starts = np.concatenate([[0], np.cumsum(lengths)])
        return cut

    def gather(self, rows: np.ndarray, width: int | None = None) -> WordCounts:
        """Counts of the texts numbered `rows` [...] (-1: none) as `[..., K]`, K a power of two or `width`.

        Of a text with more distinct words than `width` the commonest are kept (ties: the smaller word).
        """
        rows = np.asarray(rows)
        flat = rows.reshape(-1)
        start = np.where(flat < 0, 0, self._starts[flat])
        length = np.where(flat < 0, 0, self._starts[flat + 1] - start)
        longest = int(length.max(initial=0))
        if width is None:
            width = bucket(longest)
        ids, counts = np.zeros((len(flat), width), np.int32), np.zeros((len(flat), width), np.float32)
        row = np.repeat(np.arange(len(flat)), length)
        slot = np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length)
        source = np.repeat(start, length) + slot
        if longest > width:
            order = np.lexsort((self.alphabetical()[self._flat_ids[source]], -self._flat_counts[source], row))
            kept = slot < width
            row, slot, source = row[kept], slot[kept], source[order][kept]
        ids[row, slot], counts[row, slot] = self._flat_ids[source], self._flat_counts[source]
        return WordCounts(ids.reshape(*rows.shape, width), counts.reshape(*rows.shape, width), self.alphabetical())

    def counts(
        self,
        texts: Sequence[str],
        width: int | None = None,
        words: Sequence[Mapping[str, int] | None] | None = None,
    ) -> WordCounts:
        """Counts of many texts, `[N, K]`; `words` as in `rows`."""
        return self.gather(self.rows(texts, words), width)

    def alphabetical(self) -> np.ndarray:
        """Rank of each word id in sorted order, int32, padded to a bucket with ranks past every word."""
        if self._ranked != len(self):
            rank = np.arange(bucket(len(self), 256), dtype=np.int32)
            order = sorted(range(len(self)), key=self._ids.words.__getitem__)
            rank[np.array(order, np.int64)] = np.arange(len(self))
            self._alphabetical, self._ranked = rank, len(self)
        return self._alphabetical


def _put(array: np.ndarray, at: int, values: np.ndarray) -> np.ndarray:
    """The array with `values` written at `at`, grown to twice the need where they do not fit."""
    end = at + len(values)
    if end > len(array):
        array = np.concatenate([array, np.zeros(2 * end - len(array), array.dtype)])
    array[at:end] = values
    return array


def _runs(texts: list[str]) -> list[str]:
    """All runs of word characters of the lower-cased texts, in order, and an `END` after each text."""
    if any(END in text for text in texts):
        texts = [text.replace(END, " ") for text in texts]
    joined = f" {END} ".join([*texts, ""])
    if joined.isascii():  # five times as fast as the regular expression
        return joined.encode("ascii").translate(ASCII_RUN).decode("ascii").split()
    return RUN.findall(joined.lower())
