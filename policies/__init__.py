"""Scheduling policies: the contract in ``base``, finding them in ``registry``, one short file per policy."""
