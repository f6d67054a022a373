"""Search as Lucene in WebShop: BM25 over an inverted index on disk, shared by memory-mapping.

k1 0.9, b 0.4, Porter stems, Lucene's stop words, and document lengths in one byte (Anserini's defaults). Known
libraries support neither the lossy length nor the sharing. Any function from a query to rows, best first, can replace
it (`Catalogue`).
"""

import functools
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import Stemmer

K1, B, HITS = 0.9, 0.4, 50
TERMS_AT_MOST = 1024  # per query; Lucene rejects more
BLOCK = 256  # documents per block; the maxima of blocks preselect candidates
STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this"
    " to was will with".split()
)
# Letters and digits, an apostrophe, full stop or colon between letters, a comma or full stop between digits (UAX 29).
_TOKEN = re.compile(r"\w+(?:(?:(?<=[^\W\d_])['.:’·](?=[^\W\d_])|(?<=\d)[.,;'’](?=\d))\w+)*")
_STEMMER = Stemmer.Stemmer("porter")


@functools.lru_cache(1 << 18)
def stem(word: str) -> str:
    """Porter's stem as in his C program and Lucene: short words are unchanged, -bli and -logi are suffixes."""
    if len(word) <= 2:
        return word
    found = _STEMMER.stemWord(word)
    if found.endswith("bli"):
        return _STEMMER.stemWord(found[:-1] + "e")
    return found[:-1] if found.endswith("ologi") else found


def terms(text: str) -> list[str]:
    """The indexed terms of a text, in order."""
    words = (word.removesuffix("'s").removesuffix("’s") for word in _TOKEN.findall(text.lower()))
    return [stem(word) for word in words if word and word not in STOP_WORDS]


def lossy_length(length: np.ndarray) -> np.ndarray:
    """Document lengths as in Lucene's norms: exact below 40, four significant bits above."""
    excess = np.asarray(length, np.int64) - 24
    shift = np.maximum(np.floor(np.log2(np.maximum(excess, 1))).astype(np.int64) - 3, 0)
    return np.where(excess < 8, length, 24 + ((excess >> shift) << shift))


def build_index(folder: Path, texts: Iterable[str]) -> None:
    """Write the postings of the texts: for each term its documents and their BM25 values."""
    number: dict[str, int] = {}
    documents, words, counts, lengths = ([np.zeros(0, np.int32)] for _ in range(4))
    part: list[list[int]] = [[], [], [], []]

    def flush() -> None:
        for whole, some in zip((documents, words, counts, lengths), part, strict=True):
            whole.append(np.array(some, np.int32))
            some.clear()

    for row, text in enumerate(texts):
        found = Counter(terms(text))
        part[0] += [row] * len(found)
        part[1] += [number.setdefault(word, len(number)) for word in found]
        part[2] += found.values()
        part[3].append(found.total())
        if len(part[0]) > 1 << 20:
            flush()
    flush()
    document, word, count, length = (np.concatenate(x) for x in (documents, words, counts, lengths))
    vocabulary = sorted(number, key=lambda term: term.encode())
    place = np.zeros(len(vocabulary), np.int32)
    place[[number[term] for term in vocabulary]] = np.arange(len(vocabulary))
    order = np.argsort(place[word], kind="stable")
    document, count = document[order], count[order]
    frequency = np.bincount(place[word], minlength=len(vocabulary))
    idf = np.log(1 + (len(length) - frequency + 0.5) / (frequency + 0.5)).astype(np.float32)
    average = np.float32(length.sum() / max(len(length), 1))
    norm = np.float32(1) / (np.float32(K1) * (np.float32(1 - B) + np.float32(B) * lossy_length(length) / average))
    weight = np.repeat(idf, frequency)
    value = weight - weight / (np.float32(1) + count.astype(np.float32) * norm.astype(np.float32)[document])
    encoded = [term.encode() for term in vocabulary]
    (folder / "terms.bin").write_bytes(b"".join(encoded))
    arrays = {
        "term_starts": np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        "posting_starts": np.concatenate([[0], np.cumsum(frequency)]).astype(np.int64),
        "posting_documents": document, "posting_values": value.astype(np.float32),
        "document_count": np.array(len(length)),
    }  # fmt: skip
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def mapped(path: Path) -> np.ndarray:
    """Memory-map a file's array or bytes, as a plain array: slices of `np.memmap` are slower."""
    if path.suffix == ".npy":
        return np.asarray(np.load(path, mmap_mode="r"))
    # An empty file cannot be mapped.
    return np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.zeros(0, np.uint8)


class Lucene:
    """Searches a prepared folder: the rows of products for a query, best first. Ties are ordered by ASIN, as in
    Anserini."""

    def __init__(self, folder: Path):
        def array(name: str) -> np.ndarray:
            return mapped(folder / f"{name}.npy")

        self._terms, self._term_starts = mapped(folder / "terms.bin").data, array("term_starts")
        self._starts, self._documents = array("posting_starts"), array("posting_documents")
        self._values, self._rank = array("posting_values"), array("ranks")
        self._scores = np.zeros(-(-int(array("document_count")) // BLOCK) * BLOCK, np.float32)

    def __call__(self, query: str) -> list[int]:
        scores = self._scores
        scores[:] = 0
        for term, times in list(Counter(terms(query)).items())[:TERMS_AT_MOST]:
            number = self._number(term.encode())
            if number >= 0:
                span = slice(int(self._starts[number]), int(self._starts[number + 1]))
                values = self._values[span] if times == 1 else self._values[span] * np.float32(times)
                np.add.at(scores, self._documents[span], values)  # half the time of `scores[documents] += values`
        best = scores.reshape(-1, BLOCK).max(1)
        # The maximum of the 50th best block is at most the 50th best score.
        least = np.partition(best, -HITS)[-HITS] if len(best) > HITS else np.float32(0)
        candidates = np.flatnonzero((scores >= least) & (scores > 0))
        return candidates[np.lexsort((self._rank[candidates], -scores[candidates]))[:HITS]].tolist()

    def _number(self, term: bytes) -> int:
        """The index of a term among the sorted ones, or -1."""
        starts = self._term_starts

        def at(number: int) -> bytes:
            return bytes(self._terms[starts[number] : starts[number + 1]])

        found = bisect_left(range(len(starts) - 1), term, key=at)
        return found if found < len(starts) - 1 and at(found) == term else -1
