"""Benchmarks that measure this project beside a peer, in the same run on the same machine."""
