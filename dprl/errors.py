"""The one exception for what a user can fix: its message is all that the command line prints."""

from typing import Any


class UserError(Exception):
    """Bad input. The message says what is wrong, where, what was found, what was expected and how to fix it."""


def found(what: str, expected: object, got: object, fix: str) -> UserError:
    """A ``UserError`` in the house form."""
    return UserError(f"{what}\n  expected: {expected}\n  found:    {got}\n  fix:      {fix}")


Bound = float | None


def check_numbers(where: str, *, least: Bound = None, above: Bound = None, most: Bound = None, below: Bound = None, **given: Any) -> None:
    """Raises a ``UserError`` unless each setting ``given`` under ``where`` is null or a number within the bounds; NaN is not."""
    bounds = {"at least": least, "more than": above, "at most": most, "less than": below}
    told = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
    for key, value in given.items():
        good = isinstance(value, int | float) and not isinstance(value, bool)
        good = good and (least is None or value >= least) and (above is None or value > above)
        if value is not None and not (good and (most is None or value <= most) and (below is None or value < below)):
            raise found(f"{where}{key} is out of range", f"a number, {told}", value, f"{where}{key}=<a number, {told}>")
