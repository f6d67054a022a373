"""The estimator: step groups and rewards in, advantages out. Depends on JAX and NumPy only."""
