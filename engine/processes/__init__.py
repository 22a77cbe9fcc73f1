"""One rank as a process: how it starts, what it serves, and the loop of steps."""
