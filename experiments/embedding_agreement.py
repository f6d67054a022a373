"""Agreement of TF-IDF over token ids, computed on the device only, with TF-IDF over words.

    python -m experiments.embedding_agreement                                # household observations, generated here
    python -m experiments.embedding_agreement --shop-traces traces.json      # and those of recorded WebShop episodes

Tokens are byte-level BPE, as in language models, trained on the texts (at most 2,000). Both embeddings are compared on
the distinct observations of each group (a household game, or all shop episodes of one mode): Spearman's rank
correlation of the similarities of all pairs, and the overlap of the five nearest neighbours of each observation.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from tokenizers import ByteLevelBPETokenizer

from experiments.bench_estimator import play
from proxmo_jax.estimator.embeddings import tfidf, token_counts
from proxmo_jax.estimator.words import Vocabulary, WordCounts

NEAREST = 5


@dataclass(frozen=True)
class Config:
    """What to compare."""

    groups: int = 32
    """Household games, 8 episodes each."""
    shop_traces: Path | None = None
    """Recorded episodes: a JSON list of {mode, initial: {observation}, steps: [{observation}]}."""
    seed: int = 0


def main(config: Config) -> None:
    """Print the result as a Markdown table."""
    steps = play(config.groups, config.seed, Console(stderr=True))
    worlds = {"household": (steps["texts"], steps["group"].tolist())}
    if config.shop_traces is not None:
        episodes = json.loads(config.shop_traces.read_text(encoding="utf-8"))
        seen = [
            (step["observation"], episode["mode"])
            for episode in episodes
            for step in [episode["initial"], *episode["steps"]]
        ]
        worlds["shop"] = ([text for text, _ in seen], [mode for _, mode in seen])
    print("| observations | groups | distinct texts | rank correlation | top-5 overlap |\n|---|---|---|---|---|")
    for world, (texts, group) in worlds.items():
        groups, distinct, correlation, overlap = agreement(texts, group)
        print(f"| {world} | {groups} | {distinct} | {correlation:.3f} | {overlap:.3f} |")


def agreement(texts: Sequence[str], group: Sequence) -> tuple[int, int, float, float]:
    """(groups, distinct texts, mean rank correlation, mean top-5 overlap) over groups of more than six texts."""
    by_words, by_tokens = word_vectors(texts), token_vectors(texts)
    of_group: dict[object, dict[str, int]] = {}
    for i, (text, name) in enumerate(zip(texts, group, strict=True)):
        of_group.setdefault(name, {}).setdefault(text, i)
    correlations, overlaps, distinct = [], [], 0
    for rows in of_group.values():
        at = list(rows.values())
        if len(at) <= NEAREST + 1:
            continue
        distinct += len(at)
        a, b = (vectors[at] @ vectors[at].T for vectors in (by_words, by_tokens))
        pairs = np.triu_indices(len(at), 1)
        correlations.append(float(np.corrcoef(ranks(a[pairs]), ranks(b[pairs]))[0, 1]))
        overlaps.append(nearest_in_common(a, b))
    return len(correlations), distinct, float(np.mean(correlations)), float(np.mean(overlaps))


def word_vectors(texts: Sequence[str]) -> np.ndarray:
    """TF-IDF unit vectors over words, [texts, words]."""
    words = Vocabulary().counts(texts)
    return np.asarray(tfidf(words, jnp.ones(len(texts), bool))[0])


def token_vectors(texts: Sequence[str]) -> np.ndarray:
    """TF-IDF unit vectors over BPE tokens, [texts, tokens]."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=2000, show_progress=False)
    rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    mask = np.arange(tokens.shape[1]) < np.array([[len(ids)] for ids in rows])
    words: WordCounts = token_counts(jnp.asarray(tokens), jnp.asarray(mask), tokenizer.get_vocab_size())
    return np.asarray(tfidf(words, jnp.ones(len(texts), bool), max_features=2000)[0])


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks of the values, rounded to six digits; ties get their mean rank."""
    _, which, count = np.unique(values.round(6), return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[which]


def nearest_in_common(a: np.ndarray, b: np.ndarray) -> float:
    """Mean overlap of the five nearest neighbours of each row under the similarities `a` and `b`."""
    nearest = [np.argsort(-(x - 9 * np.eye(len(x))).round(6), axis=1, kind="stable")[:, :NEAREST] for x in (a, b)]
    return float(np.mean([len(set(x) & set(y)) / NEAREST for x, y in zip(*nearest, strict=True)]))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
