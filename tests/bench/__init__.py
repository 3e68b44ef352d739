"""Benchmarks: the lean simulator beside the plain one, its memory, and what tracing costs.

``make bench``, or ``python -m tests.bench``. The ordinary test run deselects them.
"""
