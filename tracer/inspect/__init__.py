"""What a trace says about caching, as tables and figures.

- summary: `inspect_trace`, all tables; `subject`, one line on what they are of
- popularity: accesses by expert; skew; domains
- overlap: experts that an earlier token chose too
- reuse: reuse distances
- slots: hit rate against slots, LRU and Belady
- predictions: how often recorded predictions are right
- batches: distinct experts a step, and a batch of requests
- sets: sets of experts as bits
- tables: for people, and as one JSON object
- panels, figures: the pictures

A *look-up* is one expert needed by one layer in one step, however many of the step's tokens chose
it: what a cache is asked. An expert's *reuse distance* is the number of experts of its layer used
between its last use and the step's begin, so that an LRU cache of C experts a layer hits exactly
the look-ups with a distance below C, where no step needs more than C.
"""

from tracer.inspect.summary import Summary, draw_inspection, inspect_trace, subject
from tracer.inspect.tables import as_json, render

__all__ = ["Summary", "as_json", "draw_inspection", "inspect_trace", "render", "subject"]
