"""Benchmarks: what the package claims, measured. They import the package, never the other way."""
