"""The decision core and the policies: pure state machines, shared by simulator and GPU.

==================  ==============================================================
errors              the one error type users see
interface           the parts of a policy, and what they may know
capacity            budgets to slots
slots               slots a layer: even, or fitted on requests set aside
memory              which expert holds a slot, in which state
transfers           the queue of copies: HIGH before LOW, chunks
core                events in, commands out
registry            names, parameters, capability flags
caches              cache rules as parts
scored              bases of rules that evict the smallest score
buffers             two buffers in place of a cache
_map_store          recorded gates, searched by cosine
_slot_worth         who leaves, and what a slot is expected to bring (auto)
_lanes              misses shared out between link and CPU (auto)
==================  ==============================================================

Every other module is a policy, named after it, with its source in its docstring.
"""

from policies.errors import PolicyError
from policies.registry import PolicyInfo, get, names

__all__ = ["PolicyError", "PolicyInfo", "get", "names"]
