"""Arguments of public functions, refused at the call where they are of another kind or range.

What is given back is of the plain type: NumPy's numbers and path-like objects are taken too.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from calicache.graph_passes.common.errors import CalicacheError

Value = TypeVar("Value")
Error = type[CalicacheError]
LONGEST = 80  # letters of a value that are told


def whole_number(
    name: str, value: Any, error: Error, least: int, most: int | None = None, fix: str = ""
) -> int:
    """A whole number within bounds; no truth value and no fraction.

    Args:
        name: of the argument.
        value: what was given.
        error: what is raised.
        least: number that it may be.
        most: number that it may be; None for no bound.
        fix: what the user can do where it is outside of them; to raise or lower it where empty.

    Raises:
        CalicacheError: of the kind `error`.
    """
    expected = f"{least} or more" if most is None else f"{least} .. {most}"
    try:
        whole = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = None
    if whole is None:
        raise _refused(name, f"a whole number, {expected}", value, error)
    if whole < least:
        raise _refused(name, expected, whole, error, fix or f"Raise {name}.")
    if most is not None and whole > most:
        raise _refused(name, expected, whole, error, fix or f"Lower {name}.")
    return whole


def number(name: str, value: Any, error: Error) -> float:
    """A number, NaN and infinities among them; no truth value and no text.

    Raises:
        CalicacheError: of the kind `error`.
    """
    try:
        if not isinstance(value, bool | str | bytes):
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # tensors of several numbers too
        pass
    raise _refused(name, "a number", value, error)


def numbers(name: str, values: Any, error: Error) -> tuple[float, ...]:
    """One number or more, of a list, an array or a tensor.

    Raises:
        CalicacheError: of the kind `error`.
    """
    try:
        given = None if isinstance(values, str) else tuple(values)
    except TypeError:
        given = None
    if not given:
        raise _refused(name, "a list of numbers", values, error)
    return tuple(number(name, value, error) for value in given)


def of_kind(name: str, value: Any, kind: type[Value], error: Error) -> Value:
    """A value of a class.

    Raises:
        CalicacheError: of the kind `error`.
    """
    if not isinstance(value, kind):
        raise _refused(name, f"a value of the class {kind.__name__}", value, error)
    return value


def texts(name: str, values: Any, error: Error) -> tuple[str, ...]:
    """Several texts; one alone would be taken for its letters.

    Raises:
        CalicacheError: of the kind `error`.
    """
    if isinstance(values, Iterable) and not isinstance(values, str):
        given = tuple(values)
        if all(isinstance(value, str) for value in given):
            return given
    raise _refused(name, "a list or tuple of texts", values, error)


def path_of(value: Any, error: Error) -> Path:
    """A path from a text or a path-like object.

    Raises:
        CalicacheError: of the kind `error`.
    """
    try:
        text = os.fspath(value)
    except TypeError:
        text = None
    if not isinstance(text, str) or "\0" in text:
        raise _refused("path", "a path as text, without a zero byte", value, error)
    return Path(text)


def _refused(
    name: str, expected: str, value: object, error: Error, fix: str = ""
) -> CalicacheError:
    text = repr(value)
    got = text if len(text) <= LONGEST else f"a value of the class {type(value).__name__}"
    return error(name, expected=expected, got=got, fix=fix or f"Give such a value as {name}.")
