"""Traces of other projects, turned into ours: each importer either writes a whole trace or nothing.

- npz: `import_npz`, arrays of expert ids and scores of decode tokens
- bigmoe_csv: `import_bigmoe_csv`, the access log of the BigMoeOnEdge engine
- directory: `new_directory`, in which nothing appears before all of it is there
"""

from tracer.importers.bigmoe_csv import import_bigmoe_csv
from tracer.importers.npz import import_npz

__all__ = ["import_bigmoe_csv", "import_npz"]
