"""The one exception that the command line shows as a sentence; everything else keeps its traceback."""


class UserError(ValueError):
    """Something the user gave cannot be used. The message is one sentence: the thing, what was found, what is needed.

    A `ValueError` to callers of the library. (`envs_bridge.errors` has its own: its workers cannot import JAX.)
    """
