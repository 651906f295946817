"""Names and labels: what is allowed, and how a label set is written.

A name is dot-separated; each segment is a level of the tree that ``get_stats()`` returns. A label set is a
tuple of ``(name, value)`` pairs sorted by name, so equal sets are equal tuples.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tapes.errors import InvalidLabel, InvalidName
from tapes.hashing import blake2b

Labels = tuple[tuple[str, str], ...]

RESERVED = frozenset({"name", "producer", "merge", "weak", "unit", "help", "buckets", "labels"})
"""Words that no maker takes as a keyword label: they are, or may become, arguments of their own."""

MAX_SEGMENTS, MAX_CHARACTERS = 32, 255
"""Maximum segments and characters of a metric's name, with its registry's prefix."""
MAX_LABEL_CHARACTERS = 1024
"""Maximum characters of a label's value; a longer one is cut."""

_HASH_BYTES = 8
_CUT = "…"
"""Separates the beginning of a cut value from the hash of the whole value."""
_KEPT = MAX_LABEL_CHARACTERS - len(_CUT) - 2 * _HASH_BYTES

_DESCRIBED = {"help", "unit", "buckets"}
_LABEL_NAME = re.compile(r"(?!__)[A-Za-z_][A-Za-z0-9_]*")


def check_name(name: str) -> str:
    """Return ``name`` if it can be a metric's name.

    Raises:
        InvalidName: If it is not a string, has an empty segment or unprintable characters, is too long, or
            starts a segment with ``{``, as the selectors of labelled series do in ``get_stats()``.
    """
    if not isinstance(name, str):
        raise InvalidName("a metric's name must be a string", got=name, expected="a name like 'jobs.done'")
    if not all(name.split(".")):
        raise InvalidName(
            "a metric's name has an empty segment",
            got=name,
            expected="non-empty segments separated by single dots, like 'jobs.done'",
        )
    if name.startswith("{") or ".{" in name:
        raise InvalidName(
            "a segment of a metric's name starts with '{'",
            got=name,
            expected="a plain name like 'jobs.done'",
            remedy="give what varies as labels: counter('jobs.done', queue='mail')",
        )
    if not name.isprintable():
        raise InvalidName("a metric's name has unprintable characters", got=name, expected="printable text")
    if len(name) > MAX_CHARACTERS or name.count(".") >= MAX_SEGMENTS:
        raise InvalidName(
            "a metric's name is too long",
            got=name,
            expected=f"{MAX_CHARACTERS} characters and {MAX_SEGMENTS} segments at most",
            remedy="give what varies as labels: counter('jobs.done', queue='mail')",
        )
    return name


def canonical_labels(labels: Mapping[str, Any] | None, more_labels: Mapping[str, Any]) -> Labels:
    """Merge both spellings of labels into one sorted tuple of strings.

    Args:
        labels: The ``labels=`` argument; any legal label name.
        more_labels: Keyword labels; `RESERVED` words are refused among them.

    Raises:
        InvalidLabel: For a reserved keyword, a name that Prometheus would refuse, or a name given twice.
    """
    for word in RESERVED.intersection(more_labels):
        described = f", or tapes.describe(name, text, …) for a {word}" if word in _DESCRIBED else ""
        raise InvalidLabel(
            f"{word!r} can't be a keyword label",
            got=f"{word}={more_labels[word]!r}",
            expected="a keyword that is not an argument's name",
            remedy=f"use labels={{{word!r}: …}} for a label{described}",
        )
    merged: dict[str, str] = {}
    for given in (labels or {}, more_labels):
        if not isinstance(given, Mapping):
            raise InvalidLabel(
                "labels must be a mapping", got=given, expected="a dict like {'queue': 'mail'}"
            )
        for name, value in given.items():
            if not isinstance(name, str) or not _LABEL_NAME.fullmatch(name):
                raise InvalidLabel(
                    "a label's name can't be used",
                    got=name,
                    expected="letters, digits and '_', not starting with a digit or '__'",
                )
            if name in merged:
                raise InvalidLabel(
                    "a label is given twice",
                    got=name,
                    expected="each label either in labels={…} or as a keyword",
                )
            merged[name] = label_text(value)
    return tuple(sorted(merged.items()))


def label_text(value: Any) -> str:
    """Return a label's value as a plain string; an object of a string subclass becomes the equal string.

    A value of more than `MAX_LABEL_CHARACTERS` is cut. A mark and the hash of the whole value follow, so that
    different values stay different.
    """
    text = str.__str__(value) if isinstance(value, str) else str(value)
    if len(text) <= MAX_LABEL_CHARACTERS:
        return text
    whole = blake2b(text.encode(errors="surrogatepass"), digest_size=_HASH_BYTES)
    return text[:_KEPT] + _CUT + whole.hexdigest()


def is_cut(value: str) -> bool:
    """Return whether `label_text` has cut a label's value."""
    return len(value) == MAX_LABEL_CHARACTERS and value[_KEPT] == _CUT


def escape_label_value(value: str) -> str:
    """Escape a label's value as the Prometheus text format does."""
    if "\\" in value or '"' in value or "\n" in value:
        return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return value


def selector(labels: Labels) -> str:
    """Write a label set as Prometheus does: ``{queue="mail",region="eu"}``; empty for no labels."""
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{escape_label_value(value)}"' for name, value in labels) + "}"
