"""Adapters: one line each that gives a web application its metrics and ``/metrics``."""
