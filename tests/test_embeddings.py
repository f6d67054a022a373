import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxmo_jax.embeddings import Vocabulary, WordCounts, tfidf

sklearn_text = pytest.importorskip("sklearn.feature_extraction.text", reason="scikit-learn is the reference here")

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


def test_sharded_over_devices_equals_one_device():
    """Only corpus frequency, document frequency and N cross devices."""
    texts = [f"{room} thing{i % 3}" for i in range(8) for room in ROOMS]
    words = Vocabulary().counts(texts)
    whole = tfidf(words, jnp.ones(len(texts), bool), max_features=8)[0]
    split = jax.tree.map(lambda x: x.reshape(8, -1, x.shape[-1]), (words.ids, words.counts))
    mapped = jax.pmap(
        lambda ids, counts: tfidf(
            WordCounts(ids, counts, words.alphabetical), jnp.ones(len(ids), bool), max_features=8, axis_name="data"
        )[0],
        axis_name="data",
    )(*split)
    np.testing.assert_allclose(mapped.reshape(whole.shape), whole, atol=1e-6)
