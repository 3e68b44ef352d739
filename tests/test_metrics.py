"""Numbers that users read, worked out by hand: latencies, roofline times, memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from configs import load_geometry, load_hardware
from sim.budget import resolve, workspace_bytes
from sim.machine import StepTimes
from sim.metrics import latencies
from sim.timing import RooflineTiming
from tracer.workload import Workload

MS = 1_000_000


def two_requests() -> Workload:
    """Request 0: prefill of 3 tokens, 2 decode rows; request 1: no prefill, 1 decode row."""
    columns: dict[str, Any] = {
        "request": np.array([0, 0, 0, 0, 0, 1], np.int32),
        "step": np.array([0, 0, 0, 1, 2, 3], np.int32),
        "phase": np.array([0, 0, 0, 1, 1, 1], np.uint8),
        "position": np.array([0, 1, 2, 3, 4, 7], np.int32),
        "experts": np.zeros((6, 1, 1), np.int16),
    }
    return Workload(columns, 4)


def test_latencies_by_hand() -> None:
    # Steps of 10, 4, 6 and 8 ms. Request 0: first token at 10, then 4 and 6: tpot 5, e2el 20.
    # Request 1: one decode row of 8 ms, no ttft.
    times = StepTimes(
        begin=[0, 10 * MS, 14 * MS, 20 * MS], end=[10 * MS, 14 * MS, 20 * MS, 28 * MS]
    )
    found = latencies(two_requests(), times)
    assert found["ttft_ms"]["mean"] == 10
    assert found["tpot_ms"]["mean"] == pytest.approx((5 + 8) / 2)
    assert found["tpot_ms"]["p50"] == pytest.approx(6.5)
    assert found["itl_ms"]["mean"] == pytest.approx((4 + 6 + 8) / 3)
    assert found["e2el_ms"]["mean"] == pytest.approx((20 + 8) / 2)


def test_roofline_by_hand() -> None:
    geometry, hardware = load_geometry("olmoe-1b-7b"), load_hardware("rtx4090-pcie4")
    timing = RooflineTiming(geometry, hardware)
    rate, flops = int(hardware.gpu_bytes_per_s), int(hardware.gpu_flops_per_s)

    def ceil_ns(amount: int, per_s: int) -> int:
        return -(-amount * 10**9 // per_s)

    # 8 experts of 3 x 2048 x 1024 bf16 weights, one token: bytes decide.
    expert = 3 * 2048 * 1024 * 2
    assert timing.experts_ns(0, 8, 8) == ceil_ns(8 * expert, rate) > hardware.experts_floor_ns
    # One expert, 100,000 tokens: flops decide.
    assert timing.experts_ns(0, 1, 100_000) == ceil_ns(2 * (expert // 2) * 100_000, flops)
    assert timing.experts_ns(0, 1, 1) == max(hardware.experts_floor_ns, ceil_ns(expert, rate))
    # A long prefill: 2 flops a weight and token, 4 a pair of positions and channel.
    tokens = 30_000
    weights = geometry.segment_bytes_by_layer[0] // 2
    work = 2 * weights * tokens + 4 * 2048 * tokens * tokens
    assert timing.segment_ns(0, tokens, 1, tokens) == ceil_ns(work, flops)
    # One token against a large KV capacity: its bytes decide (2 x 2048 bf16 a layer and token).
    nbytes = geometry.segment_bytes_by_layer[0] + 2 * 2048 * 2 * 10**6
    assert timing.segment_ns(0, 1, 1, 10**6) == ceil_ns(nbytes, rate)
    assert timing.segment_ns(0, 1, 1, 1) >= hardware.segment_floor_ns
    streamed = ceil_ns(2 * expert, int(hardware.cpu_bytes_per_s))
    # One token's activations are in cpu_transfer_ns; one assignment more: 2048 bf16 there and back.
    link = int(hardware.link_bytes_per_s)
    there_and_back = hardware.cpu_transfer_ns + ceil_ns(2 * 2048 * 2, link)
    assert timing.cpu_experts_ns(0, 2, 2) == streamed + there_and_back
    # One expert, 1,000 tokens: flops decide.
    computed = ceil_ns(2 * (expert // 2) * 1000, int(hardware.cpu_flops_per_s))
    there_and_back = hardware.cpu_transfer_ns + ceil_ns(2 * 2048 * 2 * 999, link)
    assert timing.cpu_experts_ns(0, 1, 1000) == computed + there_and_back


def test_memory_by_hand() -> None:
    geometry = load_geometry("olmoe-1b-7b")
    memory = resolve(geometry, two_requests(), None, "25%")
    # The longest context is 8 tokens, one request a step; 16 layers x 2 x 2048 x 2 bytes a token.
    assert memory.kv_bytes == 8 * 16 * 2 * 2048 * 2
    assert memory.expert_bytes == geometry.expert_bytes_total // 4
    assert memory.total_bytes == memory.expert_bytes + memory.fixed_bytes
    # 3 tokens: 8 assignments of (2 x 2048 + 3 x 1024), 4 x 2048 more, bf16; 50,304 fp32 logits.
    tokens = 3 * (8 * (2 * 2048 + 3 * 1024) + 4 * 2048) * 2
    assert workspace_bytes(geometry, 3, 1) == tokens + 50_304 * 4
