"""Ours beside the peers, measured in turns on the same weights; see docs/guides/benchmarking.md."""
