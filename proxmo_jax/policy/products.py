"""Matrix products of the decoder, whose gradients are written out because XLA's CPU compiler loses time on its own."""

import math

import jax
import jax.numpy as jnp


@jax.custom_vjp
def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x w, accumulated and returned in float32; its gradient's products have factors of the dtypes of x and w.

    A bfloat16 product that returns float32 is the one that CPUs have instructions for: with those of AVX-512 it is
    twice as fast as float32, while one that returns bfloat16 is slower.

    Args:
        x: float [..., n].
        w: float [n, m].

    Returns:
        float32 [..., m].
    """
    return jnp.matmul(x, w, preferred_element_type=jnp.float32)


def _product_forward(x, w):
    return product(x, w), (x, w)


def _product_backward(saved, gradient):
    x, w = saved
    narrow = gradient.astype(x.dtype)
    rows, flat = x.reshape(-1, x.shape[-1]), narrow.reshape(-1, narrow.shape[-1])
    return _rounded(narrow, w.T), _rounded(rows.T, flat).astype(w.dtype)


product.defvjp(_product_forward, _product_backward)


def dot_general(x: jax.Array, kernel: jax.Array, dimensions, precision=None, **_) -> jax.Array:
    """`jax.lax.dot_general` of a linear layer by `product`: the last axes of x with the first of the kernel."""
    (axes, _), _ = dimensions
    inputs, outputs = kernel.shape[: len(axes)], kernel.shape[len(axes) :]
    rows = x.shape[: x.ndim - len(axes)]
    w = kernel.reshape(math.prod(inputs), -1)
    return product(x.reshape(*rows, len(w)), w).reshape(*rows, *outputs).astype(x.dtype)


@jax.custom_vjp
def low_rank(x: jax.Array, down: jax.Array, up: jax.Array) -> jax.Array:
    """(x A) B, with the products of its gradient kept apart from what surrounds them.

    Left to itself, XLA's CPU compiler fuses the MLP's gradient with a transpose for these narrow products, which then
    take longer than the layer's wide ones.

    Args:
        x: float [N, inputs].
        down: A, float [inputs, r].
        up: B, float [r, outputs].

    Returns:
        float [N, outputs].
    """
    return _low_rank_forward(x, down, up)[0]


def _low_rank_forward(x, down, up):
    narrow = _rounded(x, down)
    return _rounded(narrow, up), (x, narrow, down, up)


def _low_rank_backward(saved, gradient):
    x, narrow, down, up = saved
    x, gradient = jax.lax.optimization_barrier((x, gradient))
    back = _rounded(gradient, up.T)
    return _rounded(back, down.T), _rounded(x.T, back), _rounded(narrow.T, gradient)


def _rounded(a, b):
    """a b, accumulated in float32 and rounded to the dtype of a."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype)


low_rank.defvjp(_low_rank_forward, _low_rank_backward)
