"""A metaclass that gives every class its own metrics, named after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["metered_meta"]


def metered_meta(metrics: Iterable[tuple[str, str, Callable[[str], Any]]], base: type = type) -> type:
    """Return a metaclass that adds metrics to every class made with it, subclasses included.

    Args:
        metrics: Tuples of the class attribute, a template for the metric's name, in which ``{}`` stands
            for the class's name, and a callable that takes the finished name and returns a metric.
        base: The metaclass to extend, most often ``abc.ABCMeta``.

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
    wanted = [(attribute, template, factory) for attribute, template, factory in metrics]

    def __new__(  # noqa: N807 - it becomes the metaclass's
        mcls: Any, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any
    ) -> Any:
        for attribute, template, factory in wanted:
            namespace[attribute] = factory(template.format(name))
        return base.__new__(mcls, name, bases, namespace, **kwargs)

    return type(f"Metered{base.__name__.capitalize()}", (base,), {"__new__": __new__})
