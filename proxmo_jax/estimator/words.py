"""Word counts on the host: texts -> word ids and counts, by scikit-learn's default definition of a word.

Counting is the largest cost of the estimator. Many texts are split in one pass, and counts are memoised by text.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import jax

# Maximal runs of word characters; which of them count is decided once per word (`_Ids`).
RUN = re.compile(r"\w+|\0")
ASCII_RUN = bytes(c if chr(c).isalnum() or c in b"_\0" else 32 for c in range(128)).lower() + bytes(128)
END = "\0"  # separates joined texts; it is no word character


class WordCounts(NamedTuple):
    """Sparse word counts of texts `[...]`, with at most `K` distinct words each.

    Attributes:
        ids: int32 [..., K]; an id occurs once in a row.
        counts: float32 [..., K]; 0 in unused entries.
        alphabetical: int32 [V], rank of each word id in alphabetical order, for ties.
    """

    ids: "jax.Array | np.ndarray"
    counts: "jax.Array | np.ndarray"
    alphabetical: "jax.Array | np.ndarray"


def bucket(size: int, smallest: int = 16) -> int:
    """Round up to a power of two: few padded shapes, and hence few compiled programs.

    Args:
        size: at least 0.
        smallest: the smallest result, a power of two.

    Returns:
        The padded size.
    """
    return max(smallest, 1 << (max(size, 1) - 1).bit_length())


class _Ids(dict):
    """Word -> id. A new word gets the next id, or -1 if it is too short to count."""

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
    r"""Growing word ids without collisions, and memoised word counts of texts.

    A word is scikit-learn's default, `\b\w\w+\b` of the lower-cased text.
    """

    def __init__(self, keep_digits: bool = False, memo: int = 200_000):
        """An empty vocabulary.

        Args:
            keep_digits: also count single digits, so that 'drawer 1' and 'drawer 2' differ. scikit-learn drops single
                characters, and so does the published method.
            memo: the memo is emptied when it holds more texts than this.
        """
        self._ids = _Ids(keep_digits)
        self._memo_limit = memo
        self._alphabetical, self._ranked = np.zeros(0, np.int32), -1
        self._forget()

    def __len__(self) -> int:
        return len(self._ids.words)

    def words(self, start: int = 0) -> list[str]:
        """The words with ids from `start` on, in the order of their ids."""
        return self._ids.words[start:]

    def ids(self, words: Sequence[str]) -> np.ndarray:
        """Word ids; words that are new get the next ones.

        Args:
            words: V words, as `words` gives them.

        Returns:
            int32 [V].
        """
        return np.array([self._ids[word] for word in words], np.int32)

    def _forget(self) -> None:
        # Counts of all texts, concatenated; those of text i are at [_starts[i], _starts[i + 1]). The arrays have spare
        # capacity, so that appending is amortised.
        """Empty the memo."""
        self._memo: dict[str, int] = {}
        self._flat_ids, self._flat_counts = np.zeros(0, np.int32), np.zeros(0, np.float32)
        self._starts = np.zeros(1, np.int64)

    def rows(self, texts: Sequence[str], words: Sequence[Mapping[str, int] | None] | None = None) -> np.ndarray:
        """Number texts; equal numbers mean equal texts. Numbers are valid until the next call.

        Args:
            texts: N strings.
            words: word counts of the texts, by the same definition, where they are known already.

        Returns:
            int64 [N].
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
        """Count new texts, all split in one pass, and append the counts."""
        tokens = _runs(texts)
        self._ids[END] = -2
        ids = np.fromiter(map(self._ids.__getitem__, tokens), np.int64, len(tokens))
        size = max(len(self), 1)
        # Sorting one number per (text, word) sorts by both; equal neighbours are the same word of the same text.
        tokens_of = np.diff(np.flatnonzero(ids == -2), prepend=-1)
        both = ids + np.repeat(np.arange(len(texts)) * size, tokens_of)
        both = np.sort(both[ids >= 0])
        first = np.flatnonzero(np.concatenate([both[:1] >= 0, both[1:] != both[:-1]]))
        counts = np.diff(first, append=len(both))
        text, word = np.divmod(both[first], size)
        ends = np.cumsum(np.bincount(text, minlength=len(texts)))
        self._append(before, word.astype(np.int32), counts.astype(np.float32), ends)

    def _append(self, before: int, ids: np.ndarray, counts: np.ndarray, ends: np.ndarray) -> None:
        """Store ids and counts of the texts numbered `before` and up; `ends` [N] are the ends of their slices."""
        used = int(self._starts[before])
        self._starts = _put(self._starts, before + 1, used + ends)
        self._flat_ids, self._flat_counts = _put(self._flat_ids, used, ids), _put(self._flat_counts, used, counts)

    def longest(self, rows: np.ndarray) -> int:
        """The largest number of distinct words in a text.

        Args:
            rows: int64 [N], numbers of texts.
        """
        return int((self._starts[rows + 1] - self._starts[rows]).max(initial=0))

    def cut(self, rows: np.ndarray, most: int) -> "Vocabulary":
        """The vocabulary with only the most frequent words of some texts, which are the ones TF-IDF keeps.

        Args:
            rows: int64 [N], numbers of texts; repeated ones count repeatedly.
            most: how many words to keep (ties: the smaller word).

        Returns:
            A copy that has those texts only; the vocabulary itself if none of them has more distinct words than `most`.
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
        """Word counts of texts by number.

        Args:
            rows: int64 [...], numbers of texts; -1 for none.
            width: K; a text with more distinct words keeps its most frequent ones (ties: the smaller word). Default:
                the next power of two that fits all.

        Returns:
            Counts [..., K].
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
        """Word counts of texts.

        Args:
            texts: N strings.
            width: as in `gather`.
            words: as in `rows`.

        Returns:
            Counts [N, K].
        """
        return self.gather(self.rows(texts, words), width)

    def alphabetical(self) -> np.ndarray:
        """Rank of each word id in alphabetical order: int32 [V], V padded to a power of two."""
        if self._ranked != len(self):
            rank = np.arange(bucket(len(self), 256), dtype=np.int32)
            order = sorted(range(len(self)), key=self._ids.words.__getitem__)
            rank[np.array(order, np.int64)] = np.arange(len(self))
            self._alphabetical, self._ranked = rank, len(self)
        return self._alphabetical


def _put(array: np.ndarray, at: int, values: np.ndarray) -> np.ndarray:
    """Write `values` at `at`; an array that is too short grows to twice the size needed."""
    end = at + len(values)
    if end > len(array):
        array = np.concatenate([array, np.zeros(2 * end - len(array), array.dtype)])
    array[at:end] = values
    return array


def _runs(texts: list[str]) -> list[str]:
    """All runs of word characters of the lower-cased texts, in order, with an `END` after each text."""
    joined = f" {END} ".join([*texts, ""])
    if joined.count(END) > len(texts):
        joined = f" {END} ".join([*(text.replace(END, " ") for text in texts), ""])
    if joined.isascii():  # five times as fast as the regular expression
        return joined.encode("ascii").translate(ASCII_RUN).decode("ascii").split()
    return RUN.findall(joined.lower())
