"""Parallel equals single process."""
