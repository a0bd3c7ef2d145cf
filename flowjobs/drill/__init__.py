"""Proves the promises on the cluster of its user, by interrupting a run in every way."""
