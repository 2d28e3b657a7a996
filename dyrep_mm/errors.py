"""The exception for mistakes that the user can correct."""


class DyRepError(ValueError):
    """Bad input: one sentence that names the thing and the rule.

    The command line tools print the sentence alone; any other exception is a bug and keeps
    its traceback.
    """
