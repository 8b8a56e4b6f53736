"""vLLM: the scheduler's and the worker's hooks, launching, weights without a copy, version differences."""
