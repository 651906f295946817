"""Starting an aggregator, finding it, and starting it again."""
