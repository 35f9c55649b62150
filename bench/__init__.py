"""Benchmarks of hubpath_fast, run from the repository root: see bench/README.md."""
