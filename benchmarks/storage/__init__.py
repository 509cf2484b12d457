"""``python -m benchmarks.storage``: the store against what a user would pick instead, on the same content."""
