"""Benchmarks that a CPU can answer: the host's share of a step, the head, start-up, the loader. Each beside its peers."""
