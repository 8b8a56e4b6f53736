"""Latency predictors: learned from profiles and records, loaded by policies."""
