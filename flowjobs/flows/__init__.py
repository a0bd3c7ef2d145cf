"""Flow matching: paths from a source to the data, and how their ends are paired.

`flow` has every flow with its equation and what the rest of the program must know of it; `pairs`
has the pairs that a step trains on.
"""
