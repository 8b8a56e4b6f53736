"""Request workloads: traces, a generator with the statistics of one, and the open-loop client."""
