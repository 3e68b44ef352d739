"""The decision core and the policies: pure state machines, shared by simulator and GPU.

==================  ==============================================================
errors              the one error type users see
interface           the parts of a policy, and what they may know
capacity            budgets to slots
memory              which expert holds a slot, in which state
transfers           the queue of copies: HIGH before LOW, chunks
core                events in, commands out
registry            names, parameters, capability flags
caches              cache rules as parts
==================  ==============================================================

Every other module is a policy, named after it, with its source in its docstring.
"""

from policies.errors import PolicyError
from policies.registry import PolicyInfo, get, names

__all__ = ["PolicyError", "PolicyInfo", "get", "names"]
