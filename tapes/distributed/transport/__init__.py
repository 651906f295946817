"""0MQ: addresses, keys, sockets, and one request with its reply."""
