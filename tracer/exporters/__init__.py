"""What other tools read, from a trace.

- load: `expert_counts`, `export_eplb`, `export_sglang_location`
"""

from tracer.exporters.load import expert_counts, export_eplb, export_sglang_location

__all__ = ["expert_counts", "export_eplb", "export_sglang_location"]
