"""Types of settings, with their bounds, and the check of values against them.

The type of a setting holds its bounds: `gamma: Fraction`, `chunks: PositiveInt`, `value_clip: Positive | None`.
`Settings` checks its fields when it is constructed; `training.factory.construct` checks the arguments of everything
else that a config names.
"""

import dataclasses
import inspect
import math
import types
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from dprl.utils.configs import compose
from dprl.utils.errors import UserError

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
ProperFraction = Annotated[float, Ge(0), Lt(1)]
OpenFraction = Annotated[float, Gt(0), Lt(1)]

Betas = tuple[ProperFraction, ProperFraction]  # of Adam

WORDS = {Ge: "at least", Gt: "more than", Le: "at most", Lt: "less than"}
TESTS: dict[type, Callable[[float, float], bool]] = {
    Ge: lambda value, bound: value >= bound,
    Gt: lambda value, bound: value > bound,
    Le: lambda value, bound: value <= bound,
    Lt: lambda value, bound: value < bound,
}


def check_value(value: Any, hint: Any, path: str) -> None:
    """Check a setting against its type: numbers and their bounds, choices, booleans, and null where it is allowed.

    Other types are not checked.

    Args:
        value: The value of the setting.
        hint: Its type annotation.
        path: Its full path in the config, for example `algo.gamma`.

    Raises:
        UserError: If the value is not of the type or out of range.
    """
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return
    options = tuple(option for option in options if option is not type(None))
    if len(options) != 1:
        return
    kind, bounds = (
        (options[0], ())
        if get_origin(options[0]) is not Annotated
        else (options[0].__origin__, options[0].__metadata__)
    )
    if get_origin(kind) is tuple:
        _check_tuple(value, get_args(kind), path)
    elif get_origin(kind) is Literal:
        choices = get_args(kind)
        if value not in choices:
            raise UserError(
                f"{path} is unknown", expected=" or ".join(map(str, choices)), got=value, fix=f"{path}={choices[0]}"
            )
    elif kind is bool and not isinstance(value, bool):
        raise UserError(f"{path} is not a boolean", expected="true or false", got=value, fix=f"{path}=true")
    elif kind in (int, float):
        _check_number(value, kind, bounds, path)


def _check_tuple(value: Any, hints: tuple[Any, ...], path: str) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != len(hints):
        example = [_example(hint.__origin__, _limits(hint.__metadata__)) for hint in hints]
        fix = f"{path}={example}".replace(" ", "")
        raise UserError(f"{path} has the wrong length", expected=f"a list of {len(hints)}", got=value, fix=fix)
    for i, (part, hint) in enumerate(zip(value, hints, strict=True)):
        check_value(part, hint, f"{path}[{i}]")


def _check_number(value: Any, kind: type, bounds: tuple[Any, ...], path: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    whole = number and (isinstance(value, int) or value.is_integer())
    limits = _limits(bounds)
    if number and (whole or kind is float) and all(TESTS[test](value, limit) for test, limit in limits):
        return
    words = " and ".join(f"{WORDS[test]} {limit:g}" for test, limit in limits)
    expected = ("a whole number" if kind is int else "a number") + (f", {words}" if words else "")
    raise UserError(f"{path} is out of range", expected=expected, got=value, fix=f"{path}={_example(kind, limits)}")


def _limits(bounds: tuple[Any, ...]) -> list[tuple[type, float]]:
    return [(type(bound), next(iter(dataclasses.asdict(bound).values()))) for bound in bounds]


def _example(kind: type, limits: list[tuple[type, float]]) -> float:
    """Return a number within the limits."""
    low = next((limit for test, limit in limits if test in (Ge, Gt)), None)
    high = next((limit for test, limit in limits if test in (Le, Lt)), None)
    if kind is int:
        return 1 if low is None else max(1, int(low))
    if low is not None and high is not None:
        return (low + high) / 2
    return 1.0 if low is None else low + 1.0


def check_arguments(function: Callable[..., Any], arguments: dict[str, Any], path: str) -> None:
    """Check keyword arguments against the annotations of a function or of a class's constructor.

    A class with an attribute `settings_class` takes the fields of that class as well. A value that equals the default
    of its parameter is not checked. Whole numbers such as 1e5 become integers where integers are expected.

    Args:
        function: The function or class to be called.
        arguments: Its keyword arguments, by name; changed in place.
        path: Path of the config node that holds them.

    Raises:
        UserError: If an argument is not of its type or out of range; the message names `path.argument`.
    """
    try:
        hints = get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)
        defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    except (NameError, TypeError, AttributeError, ValueError):  # annotations that cannot be resolved: nothing to check
        return
    if settings := getattr(function, "settings_class", None):
        hints = get_type_hints(settings, include_extras=True) | hints
    for name, value in arguments.items():
        if name not in hints or isinstance(value, dict | list) or (name in defaults and value is defaults[name]):
            continue
        check_value(value, hints[name], f"{path}.{name}")
        if isinstance(value, float) and value.is_integer() and _is_int(hints[name]):
            arguments[name] = int(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Base class of settings: a frozen dataclass whose field types hold the bounds.

    Subclasses have no defaults, because the yaml files are the only place for them. Rules that involve several fields
    go into `__post_init__`, after `super().__post_init__()`.

    Raises:
        UserError: If a field is not of its type or out of range.
    """

    section: ClassVar[str] = "algo"  # of the config that holds the fields
    compose: ClassVar[tuple[str, ...]] = (
        "finetune",
    )  # the config of the program, and overrides that select the section

    def __post_init__(self) -> None:
        """Check every field, and make integers of whole numbers such as 1e5."""
        hints = get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            check_value(value, hint, f"{self.section}.{field.name}")
            if isinstance(value, float) and value.is_integer() and _is_int(hint):
                object.__setattr__(self, field.name, int(value))

    @classmethod
    def load(cls, **changes: Any) -> Self:
        """Return the settings of the yaml files, with some of them changed.

        Args:
            **changes: New values, by field.
        """
        from omegaconf import OmegaConf

        program, *overrides = cls.compose
        node = OmegaConf.select(compose(program, *overrides), cls.section)
        values = {field.name: node[field.name] for field in dataclasses.fields(cls)}
        plain = {
            key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value for key, value in values.items()
        }
        return cls(**plain | changes)


def _is_int(hint: Any) -> bool:
    """Return whether a type annotation is an integer, possibly bounded or optional."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return any(option is int or (get_origin(option) is Annotated and option.__origin__ is int) for option in options)
