"""The face: light, sorted, typed."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import tapes
from tapes.testing import ManualClock

MODULES = [
    module.name
    for module in pkgutil.walk_packages(tapes.__path__, "tapes.")
    if not module.name.endswith("__main__")
]


def test_importing_tapes_loads_addict_and_the_standard_library_alone():
    """No zmq, no web framework, no adapter, no reporter."""
    code = """
import sys
before = set(sys.modules)
import tapes
for name in set(sys.modules) - before:
    if "site-packages" in (getattr(sys.modules[name], "__file__", None) or ""):
        print(name.partition(".")[0])
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(output.split()) <= {"addict", "tapes"}
    code = "import sys, tapes; print(*(n for n in sys.modules if n.startswith('tapes.')))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    above = ("tapes.reporting", "tapes.contrib", "tapes.distributed", "tapes.exposition", "tapes.testing")
    assert not [name for name in output.split() if name.startswith(above)]


def test_a_worker_loads_no_module_of_the_aggregator(short_dir):
    """A connected registry needs the packages worker, supervision, storage, transport and protocol alone."""
    code = f"""
import sys, tapes
registry = tapes.DistributedRegistry("ipc://{short_dir}/m.ipc")
registry.connect()
registry.counter("c").increment()
registry.close()
print(*(name for name in sys.modules if name.startswith("tapes.distributed.")))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "tapes.distributed.worker.connected" in output.split()
    assert not [name for name in output.split() if name.startswith("tapes.distributed.aggregator")]


@pytest.mark.parametrize("name", ["tapes", *MODULES])
def test_what_a_module_offers_is_sorted_and_there(name):
    """__all__ is complete enough to be believed."""
    module = importlib.import_module(name)
    offered = getattr(module, "__all__", [])
    assert list(offered) == sorted(offered, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    for each in offered:
        assert hasattr(module, each)


def test_a_mistyped_name_is_an_attribute_error():
    """A mistyped name of the package is an AttributeError that names it."""
    with pytest.raises(AttributeError, match="no attribute 'conter'"):
        tapes.conter


def test_the_lazy_names_are_found():
    """Names that are imported lazily are found by dir() and by import."""
    assert {"DistributedRegistry", "counter", "connect"} <= set(dir(tapes))
    assert "Any" not in dir(tapes)
    assert tapes.DistributedRegistry.__module__ == "tapes.distributed.registry"


def test_a_missing_extra_says_how_to_install_it():
    """Without pyzmq: what needs it, and the command."""
    code = """
import sys
sys.modules["zmq"] = None
import tapes
try:
    tapes.connect()
except ImportError as error:
    print(error)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'tapes[distributed]'" in output


def test_a_manual_clock_does_not_go_backwards():
    """Time is advanced by zero or more."""
    clock = ManualClock(5)
    clock.advance(0.5)
    assert clock() == 5.5
    with pytest.raises(tapes.TapesError, match="zero or more"):
        clock.advance(-1)
