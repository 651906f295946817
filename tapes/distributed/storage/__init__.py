"""What lies beside the socket: the private directory, locks, the journal, and spooled goodbyes."""
