"""Pre-gated MoE's double buffer: no cache; the next layer's experts come while this one computes.

Source: Pre-gated MoE, arXiv 2308.12066. A pre-gate in layer l selects the experts of layer l + 1;
they are copied to the other buffer while layer l computes. Nothing is kept beyond the two buffers,
so peak memory is that of two layers' active experts.

Our readings: the paper trains the pre-gates, and what they select is what the model runs. Here the
model is as it is: the pre-gate is the next layer's gate on this layer's gate input (column
``lookahead_1``, top-k a token, the union over a step's tokens), it costs the machine's
``next_gate`` time, and an expert that it missed is a demand copy (lossless). The first layer is
demand only. The budget is two equal buffers, for even and odd layers; an event that needs more than
a buffer holds runs in waves. A buffer is emptied at the gate of the layer after its own; wrongly
predicted experts give way before that where room is short.
"""

from __future__ import annotations

from policies.buffers import TwoBuffers
from policies.errors import PolicyError
from policies.interface import Policy, PolicyData
from policies.next_gate import NextGate
from policies.registry import Params, register

COLUMN = "lookahead_1"


@register(
    "pregated",
    prefetches=True,
    columns=lambda params: (COLUMN,),
    summary="no cache: the next layer's predicted experts are copied to a second buffer",
    source="Pre-gated MoE, arXiv 2308.12066",
)
def build(params: Params, data: PolicyData) -> Policy:
    """From the trace's look-ahead column."""
    if COLUMN not in data.columns or data.lookahead is None:
        raise PolicyError(
            f"pregated needs the column {COLUMN}, which this trace lacks: record it with "
            "`moesim trace ... --record lookahead=1`"
        )
    shape = data.shape
    predictions = {1: data.lookahead(COLUMN, shape.top_k)}
    prefetcher = NextGate(predictions, shape.layers, shape.experts)
    return Policy(TwoBuffers(), prefetcher, scope="buffers")
