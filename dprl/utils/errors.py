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


Bound = float | None


def check_numbers(
    prefix: str, *, least: Bound = None, above: Bound = None, most: Bound = None, below: Bound = None, **values: Any
) -> None:
    """Check that settings are null or numbers within bounds. NaN is never within bounds.

    Args:
        prefix: Path of the section that holds the settings, for example `train.`.
        least: Inclusive lower bound.
        above: Exclusive lower bound.
        most: Inclusive upper bound.
        below: Exclusive upper bound.
        **values: The settings, by name.

    Raises:
        UserError: If a setting is out of range.
    """
    bounds = {"at least": least, "more than": above, "at most": most, "less than": below}
    words = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
    for key, value in values.items():
        good = isinstance(value, int | float) and not isinstance(value, bool)
        good = good and (least is None or value >= least) and (above is None or value > above)
        if value is not None and not (good and (most is None or value <= most) and (below is None or value < below)):
            raise UserError(
                f"{prefix}{key} is out of range",
                expected=f"a number, {words}",
                got=value,
                fix=f"{prefix}{key}=<a number, {words}>",
            )
