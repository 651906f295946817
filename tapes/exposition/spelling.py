"""How names, labels and numbers are written in both formats of Prometheus.

Source: the Prometheus text format 0.0.4 and OpenMetrics 1.0.0, the latter's canonical numbers for bounds;
promlint for what a name should not have.
"""

from __future__ import annotations

import re
from functools import lru_cache

from tapes.naming import Labels, escape_label_value


@lru_cache(maxsize=4096)
def metric_name(name: str) -> str:
    """Write a metric's name for Prometheus: every character but letters, digits and ``_`` becomes ``_``.

    So do colons, which are reserved for recording rules.
    """
    name = re.sub(r"[^a-zA-Z0-9_]", "_", name)
    return "_" + name if name[0].isdigit() else name


@lru_cache(maxsize=256)
def unit_name(unit: str | None) -> str:
    """Write a unit as the end of a name; empty if it has no character that a name may have."""
    return re.sub(r"[^a-zA-Z0-9]+", "_", unit or "").strip("_")


def braces(labels: Labels) -> str:
    """Write the text between a sample's name and its number: any labels in braces, and a space."""
    pairs = ",".join([f'{name}="{escape_label_value(value)}"' for name, value in labels])
    if not pairs.isascii():
        pairs = pairs.encode("utf-8", "replace").decode()
    return f"{{{pairs}}} " if pairs else " "


def without_le(labels: Labels) -> Labels:
    """Return ``labels`` with ``le``, the label of a bucket's bound, under another name."""
    names = [name for name, _ in labels]
    if "le" not in names:
        return labels
    free = "exported_le"
    while free in names:
        free = "exported_" + free
    return tuple((free if name == "le" else name, value) for name, value in labels)


@lru_cache(maxsize=256)
def bound_labels(bounds: tuple[float, ...]) -> list[str]:
    """Return the text between a bucket's other labels and its number, for each bound and +Inf."""
    return [f'le="{bound}"}} ' for bound in [*map(_canonical, bounds), "+Inf"]]


def _canonical(bound: float) -> str:
    """Write a bound as Go does, with ``.0`` after whole numbers: queries contain it."""
    text = repr(bound + 0.0)  # both zeros become the positive one
    sign, digits = text[: bound < 0], text[bound < 0 :]
    whole, _, fraction = digits.partition(".")
    if "e" in digits or len(whole) < 7:
        return text
    mantissa = f"{whole[0]}.{whole[1:]}{fraction}".rstrip("0").rstrip(".")
    return f"{sign}{mantissa}e+{len(whole) - 1:02}"


def escape_help(text: str, openmetrics: bool) -> str:
    """Write a help text on one line."""
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if openmetrics else text
