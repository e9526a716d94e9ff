"""The exception for mistakes that a user can fix. Its message is all that the command line prints."""

from typing import Any

_ABSENT: Any = object()


class UserError(Exception):
    """Bad input.

    The message has four lines: what is wrong and where, the expected value, the value found, and the fix.

    Args:
        what: What is wrong, and in which file or setting.
        expected: A description of valid values.
        got: The value found.
        fix: What to change, for example an override to pass on the command line.
    """

    def __init__(self, what: str, *, expected: object = _ABSENT, got: object = _ABSENT, fix: object = _ABSENT):
        lines = {"expected": expected, "found": got, "fix": fix}
        details = [f"\n  {f'{name}:':<9} {value}" for name, value in lines.items() if value is not _ABSENT]
        super().__init__(what + "".join(details))


def require(condition: bool, what: str, *, expected: object, got: object, fix: object) -> None:
    """Raise a `UserError` unless a condition holds.

    Args:
        condition: The condition.
        what: What is wrong otherwise; this and the other arguments as in `UserError`.
        expected: A description of valid values.
        got: The value found.
        fix: What to change.
    """
    if not condition:
        raise UserError(what, expected=expected, got=got, fix=fix)
