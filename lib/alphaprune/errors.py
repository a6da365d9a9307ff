"""The one error that is meant for people: what is wrong, where, and the remedy, in one line."""


class UsageError(ValueError):
    """Something the user can mend. Command lines and notebooks print its text alone and exit with 2."""
