"""Messages between a process and its children, and the sockets that carry them."""
