"""Slow, independent implementations that the project's own are checked against."""
