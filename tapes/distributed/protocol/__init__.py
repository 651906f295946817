"""Messages, and how they become bytes and back; no I/O."""
