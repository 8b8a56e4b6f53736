"""Splitting a device between decode and finetuning: one partitioner per kind of device."""
