import re
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from envs_bridge.worker import WORD
from proxmo_jax.estimator.words import Vocabulary


def as_words(vocabulary, row_ids, row_counts):
    names = vocabulary._ids.words
    return {names[i]: int(n) for i, n in zip(row_ids, row_counts, strict=True) if n}


@given(st.lists(st.lists(st.text(max_size=30), max_size=6), max_size=4))
def test_counts_are_those_of_the_regular_expression(batches):
    vocabulary = Vocabulary()
    for texts in batches:
        words = vocabulary.counts(texts)
        for text, ids, counts in zip(texts, words.ids, words.counts, strict=True):
            assert as_words(vocabulary, ids, counts) == Counter(re.findall(r"\b\w\w+\b", text.lower()))


def test_every_ascii_character_splits_as_the_regular_expression_does():
    vocabulary = Vocabulary()
    texts = [f"ab{chr(c)}cd{chr(c)}{chr(c)}E" for c in range(128)]
    words = vocabulary.counts(texts)
    for text, ids, counts in zip(texts, words.ids, words.counts, strict=True):
        assert as_words(vocabulary, ids, counts) == Counter(re.findall(r"\b\w\w+\b", text.lower()))


def test_equal_rows_are_equal_texts_and_a_text_is_counted_once():
    vocabulary = Vocabulary()
    assert vocabulary.rows(["a b", "cd", "a b"]).tolist() == [0, 1, 0]
    held = len(vocabulary._flat_ids)
    assert vocabulary.rows(["cd", "a b"]).tolist() == [1, 0]
    assert len(vocabulary._flat_ids) == held


def test_the_memo_is_emptied_when_full():
    vocabulary = Vocabulary(memo=3)
    for i in range(5):
        words = vocabulary.counts([f"word{i} word{i}", "other"])
        assert words.counts[0].max() == 2
    assert len(vocabulary._memo) <= 5
    assert len(vocabulary) == 6  # ids stay what they were


def test_missing_rows_have_no_words():
    vocabulary = Vocabulary()
    vocabulary.rows(["some words"])
    words = vocabulary.gather(np.array([[0, -1]]))
    assert words.counts.sum(-1).tolist() == [[2, 0]]


def test_of_too_many_words_the_commonest_are_kept():
    """Ties go to the smaller word, whenever it was first seen; shorter texts of the same batch keep all of theirs."""
    vocabulary = Vocabulary()
    rows = vocabulary.rows(["zz", "zz yy dd dd cc cc cc bb aa", "only three words", ""])
    assert vocabulary.longest(rows) == 6
    words = vocabulary.gather(rows, width=3)
    assert words.ids.shape == (4, 3)
    found = [as_words(vocabulary, ids, counts) for ids, counts in zip(words.ids, words.counts, strict=True)]
    assert found == [{"zz": 1}, {"cc": 3, "dd": 2, "aa": 1}, {"only": 1, "three": 1, "words": 1}, {}]


@given(st.lists(st.lists(st.sampled_from("ab ba cc dd ef gh".split()), max_size=20), max_size=5), st.integers(1, 5))
def test_what_is_kept_is_what_counting_says(texts, width):
    vocabulary = Vocabulary()
    words = vocabulary.gather(vocabulary.rows([" ".join(text) for text in texts]), width)
    for text, ids, counts in zip(texts, words.ids, words.counts, strict=True):
        ordered = sorted(Counter(text).items(), key=lambda item: (-item[1], item[0]))
        assert as_words(vocabulary, ids, counts) == dict(ordered[:width])


def test_a_cut_keeps_the_words_that_are_commonest_in_the_batch():
    """Ties go to the smaller word; a text that is seen twice counts twice; other texts of the memo count nowhere."""
    vocabulary = Vocabulary()
    vocabulary.rows(["zz zz zz zz"])
    rows = vocabulary.rows(["bb aa cc dd", "dd ee", "dd ee", "cc aa", ""])
    cut = vocabulary.cut(rows, 3)
    words = cut.gather(rows)
    kept = [as_words(cut, ids, counts) for ids, counts in zip(words.ids, words.counts, strict=True)]
    assert kept == [{"aa": 1, "cc": 1, "dd": 1}, {"dd": 1}, {"dd": 1}, {"aa": 1, "cc": 1}, {}]
    assert vocabulary.cut(rows, 4) is vocabulary
    whole = vocabulary.gather(rows)
    assert as_words(vocabulary, whole.ids[0], whole.counts[0]) == {"aa": 1, "bb": 1, "cc": 1, "dd": 1}


@given(st.lists(st.lists(st.text(max_size=30), max_size=6), max_size=4), st.booleans())
def test_counts_of_a_worker_serve_as_well_as_ours(batches, some_missing):
    """What a worker process counts, which may not import this package, is what we would have counted."""
    ours, theirs = Vocabulary(), Vocabulary()
    for texts in batches:
        given_words = [Counter(WORD.findall(text.lower())) for text in texts]
        if some_missing:
            given_words[::2] = [None] * len(given_words[::2])
        a, b = ours.counts(texts), theirs.counts(texts, words=given_words)
        for row in range(len(texts)):
            assert as_words(ours, a.ids[row], a.counts[row]) == as_words(theirs, b.ids[row], b.counts[row])


def test_many_small_additions_keep_what_was_there():
    vocabulary = Vocabulary()
    texts = [f"word{i} " * (i % 7 + 1) + "all" for i in range(300)]
    for text in texts:
        vocabulary.rows([text])
    words = vocabulary.counts(texts)
    for i in range(300):
        assert as_words(vocabulary, words.ids[i], words.counts[i]) == {f"word{i}": i % 7 + 1, "all": 1}
