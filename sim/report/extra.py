"""The optional packages that the report needs."""

from __future__ import annotations

from importlib.util import find_spec

from configs.errors import UserError

INSTALL = "pip install 'moesim[report]'"
PACKAGES = ("plotly", "jinja2")


def require_report_extra() -> None:
    """Raise UserError, naming the installation, where one of PACKAGES is not there."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"moesim report: {missing[0]} is not installed; run {INSTALL}")
