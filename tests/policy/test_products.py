"""The decoder's products: equal to the plain ones, with their gradients, and rounded once in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxmo_jax.policy.products import dot_general, low_rank, product

KEYS = jax.random.split(jax.random.key(0), 4)
X, W = jax.random.normal(KEYS[0], (3, 5, 12)), jax.random.normal(KEYS[1], (12, 7))
A, B = jax.random.normal(KEYS[2], (12, 2)), jax.random.normal(KEYS[3], (2, 7))


def close(found, wanted, eps: float, terms: int) -> None:
    """Sums of so many terms may differ by their rounding errors."""
    for x, y in zip(found, wanted, strict=True):
        scale = float(jnp.abs(y).max())
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), atol=eps * terms * scale)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_and_its_gradient(dtype):
    x, w = X.astype(dtype), W.astype(dtype)
    wide = x.astype("float32"), w.astype("float32")  # what rounding has left of them
    result, back = jax.vjp(product, x, w)
    expected, expected_back = jax.vjp(jnp.matmul, *wide)
    assert result.dtype == jnp.float32
    close([result], [expected], float(jnp.finfo("float32").eps), 12)
    gradient = jax.random.normal(KEYS[0], result.shape).astype(dtype).astype("float32")
    found = back(gradient)
    assert [g.dtype for g in found] == [x.dtype, w.dtype]
    close(found, expected_back(gradient), float(jnp.finfo(dtype).eps), 15)


@pytest.mark.parametrize(("shape", "axes"), [((12, 7), 1), ((12, 3, 5), 1), ((5, 12, 7), 2), ((5, 12, 2, 3), 2)])
def test_a_linear_layers_product(shape, axes):
    kernel = jax.random.normal(KEYS[2], shape)
    dimensions = (tuple(range(3 - axes, 3)), tuple(range(axes))), ((), ())
    expected = jax.lax.dot_general(X, kernel, dimensions)
    found = dot_general(X, kernel, dimensions)
    assert found.shape == expected.shape
    close([found], [expected], float(jnp.finfo("float32").eps), 60)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapters_products_and_their_gradient(dtype):
    x, a, b = (v.astype(dtype) for v in (X.reshape(15, 12), A, B))
    wide = tuple(v.astype("float32") for v in (x, a, b))
    result, back = jax.vjp(low_rank, x, a, b)
    expected, expected_back = jax.vjp(lambda x, a, b: (x @ a) @ b, *wide)
    eps = float(jnp.finfo(dtype).eps)
    close([result], [expected], eps, 14)
    gradient = jax.random.normal(KEYS[1], result.shape).astype(dtype)
    found = back(gradient)
    assert {g.dtype for g in found} == {jnp.dtype(dtype)}
    close(found, expected_back(gradient.astype("float32")), eps, 30)
