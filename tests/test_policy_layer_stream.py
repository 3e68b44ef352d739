"""Streaming of whole layers, worked out by hand."""

from __future__ import annotations

import pytest

from policies.capacity import plan_memory
from policies.errors import PolicyError
from tests.driver import Log, make_core, policy_data, run_instant, shape_of, story, told, total
from tests.machines import FlatTiming, make_machine, random_workload
from tests.on_sample import run_on_sample, totals

# Three layers of two experts; keys 0 1, 2 3, 4 5.
SHAPE = shape_of(3, 2, top_k=1)


def test_layer_stream_copies_every_layer_whole_in_every_step():
    steps = [[[1], [2], [5]], [[0, 1], [2], [4]]]
    log: Log = []
    core = make_core("layer-stream", policy_data(SHAPE, steps), slots=4, log=log)
    run_instant(core, steps)
    assert story(log) == told("""
        0.- | | ~0 ~1
        0.0 | 1* | ~2 ~3 -0 -1    # told at the next gate: who leaves
        0.1 | 2* | ~4 ~5 -2 -3
        0.2 | 5* |
        1.- | | -4 -5 ~0 ~1
        1.0 | 0* 1* | ~2 ~3 -0 -1
        1.1 | 2* | ~4 ~5 -2 -3
        1.2 | 4* |
    """)
    assert core.tally.copies == 2 * 6


def test_nothing_overtakes_the_stream():
    core = make_core("layer-stream", policy_data(SHAPE, [[[1], [2], [5]]]), slots=4)
    core.step_begin(0, "decode")
    for prediction in core.predictions_at_step():
        core.prediction_ready(prediction)
    assert core.gate(0, [1]).waiting == 1
    for prediction in core.predictions(0, [1]):
        core.prediction_ready(prediction)
    # Needed or not: all of layer 0, then all of layer 1, though the gate has named 1 alone.
    assert [copy.key for copy in core.queue.high] == [0, 1, 2, 3]
    assert core.tally.prefetch_cancelled == 0


def test_a_step_takes_as_long_as_the_link_needs_for_the_whole_model():
    # 3 layers x 8 experts x 1000 ns on the wire, against 380 ns of computing.
    work = random_workload(1, steps=50, requests=1)
    machine = make_machine(work, "layer-stream", FlatTiming(), slots=6)
    machine.run()
    model_ns = 3 * 8 * 1000
    layer_ns = 8 * 1000
    # The last layer of the last step may be in flight as the run ends.
    assert 50 * model_ns - layer_ns <= machine.link.busy_ns <= 50 * model_ns
    assert abs(machine.times.end[-1] - 50 * model_ns) <= layer_ns
    assert total(machine.core, "misses") == 0


def test_layer_stream_needs_room_for_two_layers():
    with pytest.raises(PolicyError, match=r"smallest .* is 48 bytes \(two buffers of a whole lay"):
        plan_memory(SHAPE, "whole-layers", 47)
    assert plan_memory(SHAPE, "whole-layers", 48).capacity == (2, 2)
    # A larger budget is of no use.
    assert plan_memory(SHAPE, "whole-layers", 1000).used_bytes == 48


def test_layer_stream_on_the_sample_trace():
    found = run_on_sample("layer-stream", max_tokens=90)
    assert totals(found) == (0, 5248, 0, 42996, 42943)
    steps = found["decode"]["events"] // 16 + found["requests"]
    assert found["prefetch"]["issued"] == steps * 16 * 64
    copy_ns = found["h2d_bytes"] / found["copies"] / found["link_bytes_per_s"] * 1e9
    assert found["tpot_ms"]["mean"] == pytest.approx(16 * 64 * copy_ns / 1e6, rel=0.03)
