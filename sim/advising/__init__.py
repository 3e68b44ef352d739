"""Advice: how much memory for the experts, which policy, what it costs, and what would help.

==========  ==============================================================
question    what is asked, checked
points      simulated points, each once
search      the smallest budget, the fastest policy, the knee
confidence  how far a predicted time may be off
elsewhere   the answer for other engines
answers     all of it together
words       for people
==========  ==============================================================
"""

from __future__ import annotations

from sim.advising.answers import Advice, advise, answer
from sim.advising.question import Question

__all__ = ["Advice", "Question", "advise", "answer"]
