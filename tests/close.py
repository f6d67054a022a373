"""What two programs may differ in that compute the same: the order of their sums, hence the last digits.

A sum of n products of float32 numbers is within n * EPS of the exact one, relative to the norms of what is multiplied,
in whatever order and with whatever instructions it is made. Errors add up along a chain of such sums. These are worst
cases: rounding errors mostly cancel, so that a chain of a thousand terms is off by some thirty EPS. The rest is room
for sums that are smaller than their terms.
"""

import jax
import numpy as np

from proxmo_jax.policy.decoder import PolicyConfig
from proxmo_jax.policy.decoding import Samples

EPS = float(np.finfo(np.float32).eps)


def roundings(config: PolicyConfig, length: int) -> int:
    """Terms added one after the other from a token to its logit, in sequences of `length` tokens."""
    heads = config.num_attention_heads * config.head_dim
    layer = 4 * config.hidden_size + config.head_dim + length + heads + config.intermediate_size
    return config.num_hidden_layers * layer + 2 * config.hidden_size + config.vocab_size


def same_gradient(ours, theirs, terms: int, err_msg: str = "") -> None:
    """Every array of the tree is as theirs, to `terms` roundings of its norm: small entries are differences of large
    ones, and no closer than those."""

    def compare(path, a, b):
        norm = float(np.linalg.norm(np.asarray(b, np.float64)))
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=terms * EPS * norm, err_msg=f"{err_msg} {name}")

    jax.tree_util.tree_map_with_path(compare, jax.device_get(ours), jax.device_get(theirs))


def same_answers(ours: Samples, theirs: Samples, *, key=None, vocab_size: int = 0, atol: float) -> None:
    """Answers are equal, token for token; log-probs to `atol`. A row may part from its other where the two tokens are
    tied to within `atol`, and is compared up to there.

    key: what was sampled with at a temperature above 0; None: greedy.
    """
    assert ours.tokens.shape == theirs.tokens.shape
    for row, (a, b) in enumerate(zip(np.asarray(ours.tokens), np.asarray(theirs.tokens), strict=True)):
        parted = np.flatnonzero(a != b)
        until = int(parted[0]) if len(parted) else len(a)
        x, y = np.asarray(ours.log_probs[row]), np.asarray(theirs.log_probs[row])
        np.testing.assert_allclose(x[:until], y[:until], rtol=0, atol=atol, err_msg=f"row {row}")
        if len(parted):
            noise = np.zeros(vocab_size) if key is None else token_noise(key, row, until, vocab_size)
            tie = abs(float(x[until]) + noise[a[until]] - float(y[until]) - noise[b[until]])
            assert tie <= atol, f"row {row} has token {a[until]} at {until}, need {b[until]}"
        else:
            assert int(ours.lengths[row]) == int(theirs.lengths[row]), f"row {row}"


def token_noise(key, row: int, step: int, vocab_size: int) -> np.ndarray:
    """What is added to the log-probs [V] of a prompt's token when it is sampled: the largest sum is the token."""
    own = jax.random.fold_in(jax.random.fold_in(key, row), step)
    return np.asarray(jax.random.gumbel(own, (vocab_size,)), np.float64)
