"""tapes.distributed.aggregator.lifetime and tapes.processes: how long an aggregator lives."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tapes import processes
from tapes.distributed.aggregator.lifetime import Lifetime
from tapes.processes import ProcessWatch, lives


@pytest.fixture
def process():
    """A process that waits to be ended."""
    started = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield started
    started.kill()
    started.communicate()


def ended(process):
    process.kill()
    process.wait()


def test_without_owners_it_ends_on_request():
    """After the grace period, if no worker is left; after a second in any case."""
    lease = Lifetime()
    assert not lease.expired(0.0, 0)
    lease.request_stop()
    assert not lease.expired(10.0, 0)
    assert lease.expired(10.5, 0)
    lease = Lifetime()
    lease.request_stop()
    assert not lease.expired(10.0, 3)
    assert not lease.expired(10.9, 3)
    assert lease.expired(11.0, 3)


def test_a_joined_lifetime_lasts_as_long_as_any_process(process):
    """It lives for its owner, attached processes, workers and the grace period, and can't be stopped."""
    lease = Lifetime.joined(processes.process_of(process.pid))
    lease.request_stop()
    assert not lease.expired(0.0, 0)
    ended(process)
    second = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lease.attach(processes.host_id(), (processes.process_of(second.pid),))
    assert not lease.expired(100.0, 0)
    ended(second)
    second.communicate()
    assert not lease.expired(200.0, 2)
    assert not lease.expired(900.0, 2)
    assert not lease.is_idle
    assert not lease.expired(901.0, 0)
    assert lease.is_idle
    assert not lease.expired(902.0, 1)  # one came back
    assert not lease.is_idle
    assert not lease.expired(903.0, 0)
    assert not lease.expired(904.9, 0)
    assert lease.expired(905.0, 0)


def test_a_pid_that_belongs_to_another_process_by_now(process):
    """A reused pid is another process, as its start time differs."""
    this = processes.process_of(process.pid)
    other = this._replace(started=this.started - 1)
    assert lives(this)
    assert not lives(other)
    assert not ProcessWatch(this).ended()
    assert ProcessWatch(other).ended()
    ended(process)
    assert not lives(this)
    assert ProcessWatch(this).ended()


def test_without_pidfds_the_pid_is_asked_for(process, monkeypatch):
    """Without pidfds, as on macOS, the end of a process is noticed by its pid."""
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    watch = ProcessWatch(processes.process_of(process.pid))
    assert not watch.ended()
    ended(process)
    assert watch.ended()
    watch.close()
