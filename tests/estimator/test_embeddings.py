import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxmo_jax.estimator.embeddings import tfidf as eager_tfidf
from proxmo_jax.estimator.embeddings import token_counts
from proxmo_jax.estimator.words import Vocabulary

sklearn_text = pytest.importorskip("sklearn.feature_extraction.text", reason="scikit-learn is the reference here")

tfidf = jax.jit(eager_tfidf, static_argnames="max_features")  # one program a shape; eagerly, one for each operation
ROOMS = ["You arrive at desk 1. On the desk 1, you see a pen 2.", "Nothing happens.", "You open the fridge 1."]


def ours(texts, max_features=1024):
    words = Vocabulary().counts(texts)
    return np.asarray(tfidf(words, jnp.ones(len(texts), bool), max_features=max_features)[0])


def cosine(x):
    return np.asarray(x, np.float64) @ np.asarray(x, np.float64).T


@given(st.lists(st.text(max_size=60), min_size=1, max_size=12))
def test_equals_scikit_learn_on_any_text(texts):
    try:
        theirs = sklearn_text.TfidfVectorizer().fit_transform(texts).toarray()
    except ValueError:  # no text has a word
        assert not ours(texts).any()
        return
    np.testing.assert_allclose(cosine(ours(texts)), cosine(theirs), atol=2e-6)


def columns(texts, vocabulary):
    """Our matrix with scikit-learn's column order, which is the words' own."""
    words = vocabulary.counts(texts)
    unit = np.asarray(tfidf(words, jnp.ones(len(texts), bool), max_features=10**6)[0])
    return unit[:, np.argsort(words.alphabetical[: len(vocabulary)])]


@given(st.lists(st.text(alphabet="aBÇßſΣσς١2_-'. \n\0\u0301İıŉ中文ab", max_size=40), min_size=1, max_size=12))
def test_equals_scikit_learn_entry_by_entry_on_awkward_letters(texts):
    vectorizer = sklearn_text.TfidfVectorizer()
    try:
        theirs = vectorizer.fit_transform(texts).toarray()
    except ValueError:
        return
    np.testing.assert_allclose(columns(texts, Vocabulary()), theirs, atol=1e-6)


def test_equals_scikit_learn_entry_by_entry_on_plain_text():
    rng = np.random.default_rng(1)
    texts = [" ".join(f"Word{i}" if i % 3 else f"x{i}," for i in rng.zipf(1.6, 30) % 900) for _ in range(200)]
    theirs = sklearn_text.TfidfVectorizer().fit_transform(texts).toarray()
    np.testing.assert_allclose(columns(texts, Vocabulary()), theirs, atol=1e-6)


def test_keeps_the_most_frequent_words():
    rng = np.random.default_rng(0)
    names = [f"word{i}" for i in range(400)]
    weight = rng.permutation(400) + 1.0  # all corpus frequencies differ: no tie at the cut
    texts = [" ".join(np.repeat(names, rng.binomial(3, weight / 500))) for _ in range(300)]
    frequency = {n: sum(t.split().count(n) for t in texts) for n in names}
    cut = sorted(frequency.values(), reverse=True)
    size = next(k for k in range(100, 300) if cut[k - 1] != cut[k])
    theirs = sklearn_text.TfidfVectorizer(max_features=size).fit_transform(texts).toarray()
    np.testing.assert_allclose(cosine(ours(texts, size)), cosine(theirs), atol=2e-6)


def test_ties_at_the_cut_go_to_the_smaller_word():
    alone = ours(["zebra", "apple", "mango"], max_features=2)
    assert alone[0].sum() == 0
    assert alone[1].any()
    assert alone[2].any()


def test_padding_rows_count_nowhere():
    words = Vocabulary().counts([*ROOMS, "secret words that must not count"])
    mask = jnp.array([True, True, True, False])
    padded = np.asarray(tfidf(words, mask)[0])
    np.testing.assert_allclose(cosine(padded[:3]), cosine(ours(ROOMS)), atol=1e-6)
    assert not padded[3].any()


def test_growing_vocabulary_changes_no_result():
    fresh, used = Vocabulary(), Vocabulary()
    used.counts([f"other{i} things{i}" for i in range(700)])
    a, b = (np.asarray(tfidf(v.counts(ROOMS), jnp.ones(3, bool))[0]) for v in (fresh, used))
    np.testing.assert_allclose(cosine(a), cosine(b), atol=1e-6)


def test_digits_can_be_kept():
    texts = ["go to drawer 1", "go to drawer 2"]
    plain, digits = (Vocabulary(keep_digits=keep).counts(texts) for keep in (False, True))
    similarity = [cosine(tfidf(w, jnp.ones(2, bool))[0])[0, 1] for w in (plain, digits)]
    assert similarity[0] == pytest.approx(1.0)
    assert similarity[1] < 0.9


def test_token_counts_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(0, 7, (5, 4, 9)), rng.random((5, 4, 9)) < 0.7
    words = token_counts(jnp.asarray(tokens), jnp.asarray(mask), 7)
    dense = np.zeros((5, 4, 7))
    for at in np.ndindex(5, 4):
        for token, inside in zip(tokens[at], mask[at], strict=True):
            dense[at][token] += inside
    ours_dense = np.zeros_like(dense)
    ids, counts = np.asarray(words.ids), np.asarray(words.counts)
    for at in np.ndindex(5, 4):
        np.add.at(ours_dense[at], ids[at], counts[at])
        assert len(set(ids[at][counts[at] > 0])) == (counts[at] > 0).sum()
    np.testing.assert_array_equal(ours_dense, dense)
