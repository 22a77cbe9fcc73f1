"""A cluster on one machine: its programs, and the process that keeps them running."""
