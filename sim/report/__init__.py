"""One HTML file of a sweep or an advice, to hand on: question, answer, and what it rests on."""

from __future__ import annotations

from sim.report.page import write_report

__all__ = ["write_report"]
