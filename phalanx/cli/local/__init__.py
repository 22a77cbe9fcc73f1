"""A cluster on one machine: its programs, and the supervisor process that keeps them running."""
