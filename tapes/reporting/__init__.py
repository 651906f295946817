"""Who writes a registry's values, when, and where to.

A reporter is given a registry, or gets the default one; inside an aggregator it gets the merged view of all
workers instead.
"""

from tapes.reporting.base import Reporter

__all__ = ["Reporter"]
