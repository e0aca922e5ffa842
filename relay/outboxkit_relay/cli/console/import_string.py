"""The user's consumers and functions, by import string: ``app:billing``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outboxkit.consumer import Consumer
from outboxkit.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from outboxkit.brokers import Subscription

__all__ = ["load", "load_any", "load_function", "subscription"]


def load(name: str) -> Consumer:
    """Returns the consumer behind ``module:attribute``; modules of the current directory are found too.

    Raises:
        ConfigurationError: says which part of the name leads nowhere.
    """
    found = load_any(name, "module:consumer, for example app:billing")
    if not isinstance(found, Consumer):
        raise _wrong(name, found, "a Consumer")
    return found


def load_function(name: str) -> Callable[..., Any]:
    """Returns the function behind ``module:function``; modules of the current directory are found too.

    Raises:
        ConfigurationError: says which part of the name leads nowhere.
    """
    found: Callable[..., Any] | None = load_any(name, "module:function, for example repairs:add_currency")
    if not callable(found):
        raise _wrong(name, found, "a function")
    return found


def load_any(name: str, expected: str) -> Any:
    """Returns what is behind ``module:attribute``, None when the module has no such attribute.

    Args:
        name: the import string.
        expected: how such a string looks, for the error.

    Raises:
        ConfigurationError: there is no such module.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigurationError(f"expected {expected}, got {name!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return getattr(_module(module_name), attribute, None)


def _wrong(name: str, found: object, expected: str) -> ConfigurationError:
    module_name, _, attribute = name.partition(":")
    what = "has no" if found is None else f"has a {type(found).__name__}, not {expected}, as"
    kind = "consumer" if expected == "a Consumer" else "function"
    return ConfigurationError(f"the module {module_name} {what} {attribute!r}; give module:{kind}")


def subscription(consumer: Consumer) -> Subscription:
    """Returns what the consumer reads."""
    return consumer.subscription


def _module(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only what was asked for: a module that is missing inside the user's code is another error, with its own text.
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigurationError(
                f"there is no module {error.name!r} here; run this where it is, or install it",
            ) from None
        raise
