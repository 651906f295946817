"""What runs inside the application: it publishes a registry, and asks the aggregator for the merged view."""
