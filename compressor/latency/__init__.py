"""Measuring: the statistics in `timing`, then one file per runtime."""
