"""The exception for invalid user input; the command line prints its message (`proxmo_jax.errors` has the same)."""


class UserError(ValueError):
    """Invalid user input. The message is a sentence: the thing, what was found, what is needed."""
