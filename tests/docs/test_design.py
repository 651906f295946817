"""The tour of the inside names what exists."""

from __future__ import annotations

import importlib
import re
import tomllib

import pytest

from tests.processes import ROOT

PAGE = (ROOT / "docs" / "design.md").read_text()
NAMES = sorted(set(re.findall(r"`(tapes(?:\.\w+)+)`", PAGE)))
BLOCKS = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


def find(name):
    """Return the module, class or function of that dotted name."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute)
        return found
    raise AssertionError(f"there is no {name}")


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_the_tour_exists(name):
    """A module, class or function that docs/design.md names can be imported under that name."""
    find(name)


def modules_of(layer):
    return frozenset(re.findall(r"\w+", layer))


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract["containers"][0])
def test_the_layers_of_the_tour_are_those_of_the_contract(contract):
    """docs/design.md shows the layers of each import contract, line by line; comments follow two spaces."""
    shown = [[modules_of(line.split("  ")[0]) for line in block.splitlines()] for block in BLOCKS]
    assert [modules_of(layer) for layer in contract["layers"]] in shown
