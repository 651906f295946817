"""Who writes a registry's values, when, and where to.

A reporter is given a registry, or gets the default one; inside an aggregator it gets the merged view of all
workers instead. Override `ScheduledReporter.report` to write one of your own.
"""

from tapes.reporting.base import Reporter
from tapes.reporting.scheduled import ScheduledReporter

__all__ = ["Reporter", "ScheduledReporter"]
