"""Profiles of decode alone and beside finetuning: planned, measured, checked for noise, reported."""
