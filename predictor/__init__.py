"""Latency predictors that policies load; none is built yet."""
