"""Layouts of raw data on disk: a file here is a source by its name."""
