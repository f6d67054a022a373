import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxmo_jax.losses import clipped_surrogate, low_var_kl, policy_loss, token_log_probs, token_mean


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
    settings = {"clip": 0.2, "dual_clip": 3.0, "kl_weight": 0.1, "entropy_weight": 0.01}

    def loss(logits, old, reference):
        return policy_loss(logits, tokens, mask, advantage, old, reference, **settings).loss

    dirty = old.at[2:].set(jnp.array([-1e4, jnp.inf]))
    assert float(loss(logits, old, old)) == float(loss(logits, dirty, dirty))
    gradient = jax.grad(loss)(logits, dirty, dirty)
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient[2:]).any()


@pytest.mark.parametrize("dual_clip", [3.0, 10.0])
def test_surrogate_and_its_gradient_equal_the_official_ones(official, dual_clip):
    data = np.load(official / "93_policy_loss.npz")
    mask = data["response_mask"].astype(bool)
    name = f"token-mean|0.2|0.2|{dual_clip}"

    def loss(log_prob):
        log_ratio = log_prob - data["old_log_prob"]
        return token_mean(clipped_surrogate(log_ratio, data["advantages"], dual_clip=dual_clip), mask)

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(data["log_prob"]))
    np.testing.assert_allclose(value, data[f"pg_loss|{name}"], rtol=1e-5)
    np.testing.assert_allclose(gradient, data[f"pg_grad|{name}"], rtol=1e-4, atol=1e-6)


def test_kl_and_its_gradient_equal_the_official_ones(official):
    data = np.load(official / "93_policy_loss.npz")
    mask = data["response_mask"].astype(bool)

    def loss(log_prob):
        return token_mean(low_var_kl(log_prob, data["ref_log_prob"]), mask)

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(data["log_prob"]))
    np.testing.assert_allclose(value, data["kl_loss|low_var_kl|token-mean"], rtol=1e-5)
    np.testing.assert_allclose(gradient, data["kl_grad|low_var_kl|token-mean"], rtol=1e-4, atol=1e-6)
