"""A run's record folder: what is in it, writing it, reading it, and the metrics computed from it."""
