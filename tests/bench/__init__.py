"""Benchmarks: the lean simulator beside the plain one, and its memory on a long trace.

``make bench``, or ``python -m tests.bench``. The ordinary test run deselects them.
"""
