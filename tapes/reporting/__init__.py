"""Reporters: they write the values of a registry somewhere, when asked or on a schedule.

A reporter has a registry, the default one if none is given. In an aggregator it gets the merged view of all
workers instead. To write a reporter of your own, override `ScheduledReporter.report`.
"""

from tapes.reporting.base import Reporter
from tapes.reporting.scheduled import ScheduledReporter

__all__ = ["Reporter", "ScheduledReporter"]
