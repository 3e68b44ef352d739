"""Traces of expert routing: their format, recording, importing and inspection.

- manifest: `Manifest`, what manifest.json holds
- columns: every column, its shape, dtype and encoding
- checks: what makes rows valid
- shards, requests: one Parquet file of columns; requests.parquet
- writer: `TraceWriter`, `append_column`
- trace: `Trace`, `list_samples`
- arrays: `load_arrays`, exported columns that processes share
- importers: traces of other projects
- inspect: counts, skew, overlap and reuse of a trace, as tables and a figure
"""
