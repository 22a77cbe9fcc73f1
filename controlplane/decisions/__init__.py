"""The decisions of the active controller: from a snapshot of the cluster to actions.

Pure: no I/O, and time is an argument. `reconcile` lists the decisions in order; `assess`, `form`,
`degrade`, `reshape` and `cleanup` make them.
"""
