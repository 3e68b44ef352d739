"""Traces of other projects, turned into ours: each importer either writes a whole trace or nothing.

- npz: `import_npz`, arrays of expert ids and scores of decode tokens
- bigmoe_csv: `import_bigmoe_csv`, the access log of the BigMoeOnEdge engine
- vllm: `import_vllm`, the routed experts that vLLM returns
- sglang: `import_sglang`, dumps of SGLang's expert distribution recorder
- hf_parquet: `import_hf_parquet`, Parquet of indices and scores, a file a layer
- moe_trace: `import_moe_trace`, the CSV of llama.cpp's moe-trace
- sequential: `SequentialWriter`, requests that ran alone
- directory: `new_directory`, in which nothing appears before all of it is there
"""

from tracer.importers.bigmoe_csv import import_bigmoe_csv
from tracer.importers.hf_parquet import import_hf_parquet
from tracer.importers.moe_trace import import_moe_trace
from tracer.importers.npz import import_npz
from tracer.importers.sglang import import_sglang
from tracer.importers.vllm import import_vllm

__all__ = [
    "import_bigmoe_csv",
    "import_hf_parquet",
    "import_moe_trace",
    "import_npz",
    "import_sglang",
    "import_vllm",
]
