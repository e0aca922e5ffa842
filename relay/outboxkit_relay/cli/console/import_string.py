"""The user's consumers, by import string: ``app:billing``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from outboxkit.consumer import Consumer
from outboxkit.errors import ConfigurationError

if TYPE_CHECKING:
    from outboxkit.brokers import Subscription

__all__ = ["load", "subscription"]


def load(name: str) -> Consumer:
    """The consumer behind ``module:attribute``; modules of the current directory are found too.

    Raises:
        ConfigurationError: says which part of the name leads nowhere.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigurationError(f"expected module:consumer, for example app:billing, got {name!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    found = getattr(_module(module_name), attribute, None)
    if not isinstance(found, Consumer):
        what = "has no" if found is None else f"has a {type(found).__name__}, not a Consumer, as"
        raise ConfigurationError(f"the module {module_name} {what} {attribute!r}; give module:consumer")
    return found


def subscription(consumer: Consumer) -> Subscription:
    """What the consumer reads."""
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
