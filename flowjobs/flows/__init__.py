"""Flow matching: paths from a source to the data, and how their ends are paired."""
