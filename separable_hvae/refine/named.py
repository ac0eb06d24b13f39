"""Settings that are a name or an instance."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from separable_hvae.checks import shown, with_article

T = TypeVar("T")


def named(name: str, value: Any, known: Mapping[str, Callable[[], T]], base: type[T]) -> T:
    """Return the instance that ``value`` is or names.

    Raises:
        TypeError: If it is neither a name nor an instance of ``base``.
        ValueError: If the name is unknown.
    """
    if isinstance(value, str):
        if value not in known:
            raise ValueError(f"{name} must be one of {sorted(known)} or {with_article(base)}, got {value!r}")
        return known[value]()
    if not isinstance(value, base):
        hint = f": call it, {value.__name__}(…)" if isinstance(value, type) and issubclass(value, base) else ""
        raise TypeError(f"{name} must be a name or {with_article(base)}, got {shown(value)}{hint}")
    return value
