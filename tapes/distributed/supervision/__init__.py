"""Finding an aggregator, starting it, and restarting it."""
