"""The exception for what a user gave; the command line shows it as a sentence (`proxmo_jax.errors` has its twin)."""


class UserError(ValueError):
    """Something the user gave cannot be used. The message is a sentence: the thing, what was found, what is needed."""
