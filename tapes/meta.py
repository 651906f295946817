"""A metaclass that gives every class its own metrics, named after the class."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any

from tapes.errors import InvalidArgument

__all__ = ["metered_meta"]


def metered_meta(metrics: Iterable[tuple[str, str, Callable[[str], Any]]], base: type = type) -> type:
    """Return a metaclass that adds metrics to every class made with it, subclasses included.

    The metrics exist when ``__init_subclass__`` and ``__set_name__`` run. Everything else is the base
    metaclass's: keywords of the class statement, ``__prepare__``, ``__slots__``.

    A type checker can't see what a metaclass adds, so declare it. mypy also needs a comment, as it follows no
    metaclass that is an expression:

        class Endpoint(metaclass=metered_meta([…])):  # type: ignore[metaclass]
            latency: ClassVar[Timer]

    Args:
        metrics: Tuples of the class attribute, a template for the metric's name, in which ``{}`` stands
            for the class's name, and a callable that takes the finished name and returns a metric.
        base: The metaclass to extend, most often ``abc.ABCMeta``.

    Raises:
        InvalidArgument: If one of ``metrics`` is not such a tuple, or ``base`` is not a metaclass.

    Example:
        >>> import abc, tapes
        >>> registry = tapes.Registry()
        >>> class Base(metaclass=metered_meta([
        ...     ("latency", "endpoints.{}.latency", registry.timer),
        ... ], base=abc.ABCMeta)):
        ...     pass
        >>> class Widgets(Base):
        ...     pass
        >>> Widgets.latency
        <tapes timer 'endpoints.Widgets.latency'>
    """
    wanted = [_checked(metric) for metric in metrics]
    if not (isinstance(base, type) and issubclass(base, type)):
        raise InvalidArgument("base", got=base, expected="a metaclass, like abc.ABCMeta")
    return _metaclass(wanted, base)


def _metaclass(wanted: list[tuple[str, str, Callable[[str], Any]]], base: type) -> type:
    def __new__(  # noqa: N807 - it becomes the metaclass's
        mcls: Any, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any
    ) -> Any:
        made = {attribute: factory(template.format(name)) for attribute, template, factory in wanted}
        if type(namespace) is dict:
            return super(metaclass, mcls).__new__(mcls, name, bases, {**namespace, **made}, **kwargs)
        # A namespace of another type gives meaning to what is put in: an enumeration makes it a member.
        cls: Any = super(metaclass, mcls).__new__(mcls, name, bases, namespace, **kwargs)
        for attribute, metric in made.items():
            setattr(cls, attribute, metric)
        return cls

    own = {"__new__": __new__, "__module__": __name__}
    title = base.__name__[:1].upper() + base.__name__[1:]
    metaclass: Any = types.new_class(f"Metered{title}", (base,), {}, lambda namespace: namespace.update(own))
    return metaclass  # type: ignore[no-any-return]


def _checked(metric: Any) -> tuple[str, str, Callable[[str], Any]]:
    try:
        attribute, template, factory = metric
        if isinstance(attribute, str) and isinstance(template.format(""), str) and callable(factory):
            return attribute, template, factory
    except (TypeError, ValueError, AttributeError, LookupError):
        pass
    expected = "(attribute, template, factory), like ('latency', 'endpoints.{}.latency', tapes.timer)"
    raise InvalidArgument("one of the metrics of metered_meta()", got=metric, expected=expected)
