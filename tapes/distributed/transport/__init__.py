"""0MQ: addresses, keys, sockets, and requests with their replies."""
