"""Profiling of decode under varying batch and interference; not built yet."""
