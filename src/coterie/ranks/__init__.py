"""Several processes that are one party: the ranks of a run.

`world` says whether this process was started as one of several, and refuses to run as if it were alone.
"""
