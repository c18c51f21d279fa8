"""What a section of the config is: a frozen dataclass whose keys know their range.

No jax here: a mistake is found before anything slow is imported.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, ClassVar, Self, get_args

from ml_collections import ConfigDict

from sra2_jax.errors import UserError

Field = dataclasses.Field
NUMBERS = tuple[float, ...]  # "0.1,0.2" as a text
SOME = r"[^\0\n]+", "must not be empty"
ANY = r"[^\0\n]*", "must be one line"
NAME = r"\w[\w.+-]*", "must be a name of letters, digits, '_', '.', '+' and '-'"


@dataclass(frozen=True)
class Key:
    """What is known of a key besides its type and default.

    low, high: of numbers; pattern: of texts, with what is said of another.
    free: a resumed run may change it.
    """

    about: str
    low: float = -math.inf
    high: float = math.inf
    pattern: tuple[str, str] = ANY
    free: bool = False


def key(default: Any, *known: Any, **more: Any) -> Any:
    """A key that a run keeps for life; known, more: the fields of `Key`."""
    return field(default=default, metadata={"key": Key(*known, **more)})


def free(default: Any, *known: Any, **more: Any) -> Any:
    """A key that a resumed run may change."""
    return key(default, *known, free=True, **more)


def other(section: Any, name: str, default: Any) -> Any:
    """The key of another section, with another default."""
    return field(default=default, metadata=fields(section)[name].metadata)


def allowed(f: Field) -> str:
    """What the value of a key must be, in words."""
    known: Key = f.metadata["key"]
    if f.type == NUMBERS:
        return f"must be numbers between {known.low:.10g} and {known.high:.10g}, as 1,2"
    if choices := get_args(f.type):
        return f"must be one of {', '.join(map(repr, choices))}"
    if f.type in (int, float):
        whole = "a whole number" if f.type is int else "a number"
        return f"must lie between {known.low:.10g} and {known.high:.10g}, {whole}"
    return "must be true or false" if f.type is bool else known.pattern[1]


def fits(f: Field, value: Any) -> bool:
    """Whether a key may have a value, others aside."""
    known: Key = f.metadata["key"]
    if f.type == NUMBERS:
        numbers = type(value) is tuple and {*map(type, value)} <= {int, float}
        return numbers and all(known.low <= x <= known.high for x in value)
    if choices := get_args(f.type):
        return type(value) is str and value in choices
    if type(value) is not f.type:
        return False
    if f.type in (int, float):
        return known.low <= value <= known.high  # also refuses NaN
    return f.type is bool or bool(re.fullmatch(known.pattern[0], value))


def converted(kind: Any, value: Any) -> Any:
    """A text, a list of JSON, or a whole number as a key of this type has it; what
    cannot be one stays as it is, to be refused."""
    if type(value) is str:
        if kind is bool:
            return {"true": True, "false": False}.get(value.lower(), value)
        with contextlib.suppress(ValueError):
            if kind == NUMBERS:
                return tuple(map(float, filter(None, value.strip("()").split(","))))
            if kind in (int, float):
                return kind(value)
    if kind is float and type(value) is int:
        return float(value) if abs(value) < 1e300 else math.inf
    return tuple(value) if kind == NUMBERS and type(value) is list else value


def shown(value: Any) -> str:
    """A value, not too long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class Section:
    """What all sections have: keys checked by type, choice and range, then together.

    where: "model" of config.model, "" of the whole.

    Raises UserError: the first key that is wrong, its value and what is allowed.
    """

    where: ClassVar[str] = ""

    def __init_subclass__(cls, where: str = "", **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.where = where or cls.where

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            if "key" not in f.metadata:  # a section in it
                continue
            value = converted(f.type, getattr(self, f.name))
            object.__setattr__(self, f.name, value)
            if not fits(f, value):
                raise UserError(f"{self.given(f.name)}: {allowed(f)}")
        for line in self.conflicts():
            raise UserError(line)

    def given(self, key: str) -> str:
        """ "config.SECTION.KEY=VALUE", of a key or "section.key"."""
        name = ".".join(filter(None, ("config", self.where, key)))
        return f"{name}={shown(attrgetter(key)(self))}"

    def conflicts(self) -> Iterator[str]:
        """What cannot go together, a line each."""
        yield from ()

    @classmethod
    def of(cls, values: Mapping[str, Any] | ConfigDict) -> Self:
        """From nested mappings or {"section.key": value}; what is missing, since it is
        younger than the mapping, has its default.

        Raises UserError: an unknown key, or a value that it may not have.
        """
        flat = dict(flatten(values, cls))
        for name in flat:
            find(cls, name)
        return _make(cls, flat, "")

    def override(self, values: Mapping[str, Any]) -> Self:
        """A copy with {"section.key": value or text}. Raises UserError as `of`."""
        return self.of(self.flat() | dict(values))

    def flat(self) -> dict[str, Any]:
        """{"section.key": value} of every key."""
        return dict(flatten(self.to_dict(), type(self)))

    def to_dict(self) -> dict[str, Any]:
        """As nested dicts, for JSON."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]


def _make(cls: Any, flat: Mapping[str, Any], prefix: str) -> Any:
    values = {}
    for f in dataclasses.fields(cls):
        if "key" not in f.metadata:
            values[f.name] = _make(f.type, flat, f"{prefix}{f.name}.")
        elif prefix + f.name in flat:
            values[f.name] = flat[prefix + f.name]
    return cls(**values)


@functools.cache
def fields(cls: Any) -> dict[str, Field]:
    """The field of every key, by "section.key"."""
    found: dict[str, Field] = {}
    for f in dataclasses.fields(cls):
        kind: Any = f.type
        inside = {} if "key" in f.metadata else fields(kind)
        found |= {f"{f.name}.{name}": g for name, g in inside.items()} or {f.name: f}
    return found


def flatten(
    values: Mapping[str, Any] | ConfigDict, cls: Any, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """("section.key", value) of nested mappings, down to the keys of `cls`."""
    for name, value in values.items():
        whole = f"{prefix}{name}"
        if isinstance(value, Mapping | ConfigDict) and whole not in fields(cls):
            yield from flatten(value, cls, f"{whole}.")
        else:
            yield whole, value


def find(cls: Any, name: str) -> Field:
    """The field of a key. Raises UserError: there is none; the nearest is named."""
    names = fields(cls)
    if name in names:
        return names[name]
    if inside := [k for k in names if k.startswith(f"{name}.")]:
        example = f"set its keys, as config.{inside[0]}"
        raise UserError(f"config.{name} is a section: {example}")
    near = difflib.get_close_matches(name[:80], names, 1)
    hint = f"did you mean config.{near[0]}?" if near else "--keys lists them"
    raise UserError(f"unknown key config.{name[:80]}: {hint}")
