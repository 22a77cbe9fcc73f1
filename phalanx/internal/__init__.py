"""What the processes of a cluster say to each other and keep in the store. Not an API: it may change."""
