"""A run on disk: what is in a study, and the only code that knows its file names."""
