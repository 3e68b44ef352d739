"""One HTML file of a sweep or an advice, to hand on: question, answer, and what it rests on.

Importing it raises UserError where the packages of the extra ``report`` are not installed.
"""

from __future__ import annotations

from sim.report.extra import require_report_extra

# Before the page's own imports, which need these packages.
require_report_extra()

from sim.report.page import write_report  # noqa: E402

__all__ = ["write_report"]
