"""The one exception for what a user can fix: its message is all that the command line prints."""


class UserError(Exception):
    """Bad input. The message says what is wrong, where, what was found, what was expected and how to fix it."""


def found(what: str, expected: object, got: object, fix: str) -> UserError:
    """A ``UserError`` in the house form."""
    return UserError(f"{what}\n  expected: {expected}\n  found:    {got}\n  fix:      {fix}")
