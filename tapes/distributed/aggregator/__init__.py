"""What runs in the process that adds up what all workers publish."""
