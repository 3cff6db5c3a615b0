"""Functions and classes of yours that a config gives, itself or as "package.module:name"."""

import functools
import importlib
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any


def resolve(field: str, given: str | Callable[..., Any]) -> Callable[..., Any]:
    """Return the class or function that a field of a config gives or names.

    Args:
      field: its name, for errors.
      given: the class or function, or "package.module:name" of it. The module is imported, which
        runs it; where the program is started counts as a folder of modules.

    Raises:
      ValueError: if there is no such module or name, or it cannot be called.
    """
    if not isinstance(given, str):
        return given
    module, colon, name = given.partition(":")
    if not (module and colon and name):
        raise ValueError(f"{field}: expected package.module:name, got {given!r}")
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever comes of running it
        raise ValueError(
            f"{field}: expected a module {module} that can be imported, got {_told(error)}"
        ) from error
    try:
        found = operator.attrgetter(name)(found)
    except AttributeError:
        raise ValueError(f"{field}: expected {name} in {module}, got no such name") from None
    if not callable(found):
        raise ValueError(f"{field}: expected {given} to be a class or a function, got {found!r}")
    return found


def taken(field: str, function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a class or function takes, by name, of the arguments that are offered.

    Raises:
      ValueError: if it needs others.
    """
    # Not of the class: that would be the signature by which a metaclass makes instances.
    method = isinstance(function, type)
    try:
        signature = inspect.signature(function.__init__ if method else function)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{field}: expected a signature of {name_of(function)}, got none") from (
            error
        )
    parameters = list(signature.parameters.values())[1 if method else 0 :]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for p in parameters:
        filled = p in named and p.name in offered
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and not filled:
            raise ValueError(
                f"{field}: expected {name_of(function)} to need no arguments but "
                f"{', '.join(offered) or 'none'}, got {p.name!r} without a default; a function "
                "that fills it in will do"
            )
    return {p.name: offered[p.name] for p in named if p.name in offered}


def call(field: str, function: Callable[..., Any], **offered: Any) -> Any:
    """Call a class or function with what it takes, by name, of the arguments that are offered.

    Raises:
      ValueError: if it needs others, or raises something; names it.
    """
    arguments = taken(field, function, offered)
    with_name = functools.partial(function, **arguments)
    return guarded(field, name_of(function), with_name)


def guarded(field: str, name: str, function: Callable[[], Any]) -> Any:
    """Call a function that runs a user's code.

    Raises:
      ValueError: whatever comes of it, on one line with the name.
    """
    try:
        return function()
    except Exception as error:
        raise ValueError(f"{field}: {name}: {_told(error)}") from error


def name_of(given: Any) -> str:
    """Return the name of a class or function, as `resolve` takes it; of a string itself."""
    if isinstance(given, str):
        return given
    if isinstance(given, functools.partial):
        arguments = [*map(repr, given.args), *(f"{k}={v!r}" for k, v in given.keywords.items())]
        return f"{name_of(given.func)}({', '.join(arguments)})"
    name = getattr(given, "__qualname__", None) or type(given).__qualname__
    return f"{getattr(given, '__module__', None) or 'builtins'}:{name}"


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
