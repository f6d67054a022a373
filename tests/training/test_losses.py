import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxmo_jax.training.losses import (
    AGGREGATIONS,
    KL,
    LossSettings,
    clipped_surrogate,
    low_var_kl,
    policy_loss,
    token_log_probs,
    token_mean,
    token_weights,
    was_clipped,
)


def test_surrogate_by_hand():
    ratio = jnp.log(jnp.array([1.5, 0.5, 1.5, 0.5, 10.0]))
    advantage = jnp.array([1.0, 1.0, -1.0, -1.0, -1.0])
    np.testing.assert_allclose(clipped_surrogate(ratio, advantage), [-1.2, -0.5, 1.5, 0.8, 3.0], rtol=1e-6)


def test_kl_is_zero_at_the_reference_and_clamped_far_away():
    x = jnp.array([-1.0, -2.0])
    np.testing.assert_allclose(low_var_kl(x, x), 0.0, atol=1e-7)
    assert float(low_var_kl(jnp.array(-30.0), jnp.array(-1.0))) == 10.0


def test_micro_batches_add_up_to_the_token_mean():
    values, mask = jnp.arange(6.0), jnp.array([1, 1, 0, 1, 0, 0], bool)
    parts = sum(token_mean(values[i : i + 3], mask[i : i + 3], mask.sum()) for i in (0, 3))
    np.testing.assert_allclose(parts, token_mean(values, mask))


def test_tokens_outside_the_mask_are_inert_in_value_and_gradient():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(4, 7)), jnp.float32)
    tokens, mask = jnp.array([1, 2, 3, 4]), jnp.array([True, True, False, False])
    advantage, old = jnp.ones(4), token_log_probs(logits, tokens)[0]
    settings = LossSettings(kl_coef=0.1, entropy_coef=0.01)

    def loss(logits, old, reference):
        return policy_loss(logits, tokens, mask, advantage, old, reference, settings).loss

    dirty = old.at[2:].set(jnp.array([-1e4, jnp.inf]))
    assert float(loss(logits, old, old)) == float(loss(logits, dirty, dirty))
    gradient = jax.grad(loss)(logits, dirty, dirty)
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient[2:]).any()


def weights_of(data, aggregation):
    mask = data["response_mask"].astype(bool)
    return token_weights(mask, np.repeat(mask.sum(1, keepdims=True), mask.shape[1], 1), aggregation, mask.shape[1])


VERL = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
AGGREGATION_NAMES = dict(zip(AGGREGATIONS, VERL, strict=True))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("low", "high", "dual"), [(0.2, 0.2, 3.0), (0.2, 0.28, 3.0), (0.2, 0.2, 10.0)])
def test_surrogate_and_its_gradient_equal_the_official_ones(official, aggregation, low, high, dual):
    data = np.load(official / "93_policy_loss.npz")
    weight = weights_of(data, aggregation)

    def loss(log_prob):
        log_ratio = log_prob - data["old_log_prob"]
        values = clipped_surrogate(log_ratio, data["advantages"], clip=low, clip_high=high, dual_clip=dual)
        return (weight * values).sum()

    name = f"{AGGREGATION_NAMES[aggregation]}|{low}|{high}|{dual}"
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(data["log_prob"]))
    np.testing.assert_allclose(value, data[f"pg_loss|{name}"], rtol=1e-5)
    np.testing.assert_allclose(gradient, data[f"pg_grad|{name}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", KL)
def test_kl_and_its_gradient_equal_the_official_ones(official, kind, aggregation):
    data = np.load(official / "93_policy_loss.npz")
    weight = weights_of(data, aggregation)

    def loss(log_prob):
        return (weight * KL[kind](log_prob, data["ref_log_prob"])).sum()

    name = f"{kind}|{AGGREGATION_NAMES[aggregation]}"
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(data["log_prob"]))
    np.testing.assert_allclose(value, data[f"kl_loss|{name}"], rtol=1e-5)
    np.testing.assert_allclose(gradient, data[f"kl_grad|{name}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("high", [0.2, 0.28])
def test_diagnostics_equal_the_official_ones(official, high):
    data = np.load(official / "93_policy_loss.npz")
    mask = data["response_mask"].astype(bool)
    log_ratio = data["log_prob"] - data["old_log_prob"]
    surrogate = clipped_surrogate(log_ratio, data["advantages"], clip=0.2, clip_high=high)
    fraction = token_mean(was_clipped(surrogate, log_ratio, data["advantages"]), mask)
    np.testing.assert_allclose(fraction, data[f"clipfrac|token-mean|0.2|{high}|3.0"], rtol=1e-5)
    np.testing.assert_allclose(token_mean(-log_ratio, mask), data[f"ppo_kl|token-mean|0.2|{high}|3.0"], rtol=1e-4)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_are_those_of_plain_loops(aggregation):
    """Tokens of turns that share rows, against sums over turns one by one."""
    rng = np.random.default_rng(0)
    turn = np.array([[0, 0, 1, -1], [2, 2, 2, 3]])
    values = rng.normal(size=turn.shape)
    counts = {t: (turn == t).sum() for t in range(4)}
    sums = [values[turn == t].sum() for t in range(4)]
    expected = {
        "token_mean": sum(sums) / 7,
        "turn_mean_token_sum": np.mean(sums),
        "turn_mean_token_mean": np.mean([s / counts[t] for t, s in enumerate(sums)]),
        "turn_sum_over_length": sum(sums) / 5,
    }[aggregation]
    tokens = np.vectorize(lambda t: counts.get(t, 0))(turn)
    weight = token_weights(jnp.asarray(turn >= 0), jnp.asarray(tokens), aggregation, 5)
    np.testing.assert_allclose((weight * values).sum(), expected, rtol=1e-5)


def test_the_ratio_of_a_whole_action():
    """Two turns in a row: every token has the mean log-ratio of its turn, and the gradient reaches all of them."""
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(1, 6, 5)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 5, (1, 6)))
    mask, turn = jnp.array([[1, 1, 1, 1, 1, 0]], bool), jnp.array([[1, 1, 1, 2, 2, 0]])
    log_prob, _ = token_log_probs(logits, tokens)
    old = log_prob - jnp.asarray(rng.uniform(-0.1, 0.1, (1, 6)), jnp.float32)
    settings = LossSettings(kl_coef=0.0, entropy_coef=0.0, importance_sampling_level="sequence")

    def of(logits):
        return policy_loss(logits, tokens, mask, jnp.ones((1, 6)), old, old, settings, turn=turn)

    ratio = np.asarray(log_prob - old)[0]
    means = np.exp([*[ratio[:3].mean()] * 3, *[ratio[3:5].mean()] * 2])
    np.testing.assert_allclose(float(of(logits).policy), -means.mean(), rtol=1e-5)
    np.testing.assert_allclose(float(of(logits).approx_kl), -ratio[:5].mean(), rtol=1e-5)
    gradient = np.abs(np.asarray(jax.grad(lambda x: of(x).loss)(logits)))[0].sum(-1)
    assert (gradient[:5] > 0).all()
    assert gradient[5] == 0
