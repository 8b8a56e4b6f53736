"""A trace-driven simulator of one decode instance with finetuning beside it, and the devices it can simulate."""
