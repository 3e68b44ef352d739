"""Write requests that ran alone, one after another: prefill in one or more steps, then decoding."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from tracer.columns import DECODE, NULL_ID, PREFILL
from tracer.writer import TraceWriter

MAX_STEP_ROWS = np.iinfo(np.int16).max + 1


class SequentialWriter:
    """Turn the routing of whole requests into the steps of a trace.

    A request is prefilled in steps of `prefill_chunk` tokens (None: in one step) and then decoded,
    a step a token. Formats that keep no batches are imported like this: as batch 1.
    """

    def __init__(self, writer: TraceWriter, prefill_chunk: int | None = None) -> None:
        self._writer = writer
        self._chunk = prefill_chunk
        self._next_step = 0
        self._requests: list[dict[str, Any]] = []

    def add(
        self,
        where: str,
        experts: NDArray,
        prompt_tokens: int,
        *,
        first_position: int = 0,
        token_id: NDArray | None = None,
        weights: NDArray | None = None,
    ) -> None:
        """Write one request of n rows that begin at `first_position`.

        experts and weights: [n, L, k]; token_id: [n], None where unknown. Rows before
        `prompt_tokens` are prefill. Raises UserError, beginning with `where`, for a prefill step
        that is longer than a step may be.
        """
        rows = len(experts)
        prefill = min(max(prompt_tokens - first_position, 0), rows)
        chunk = self._chunk or max(prefill, 1)
        if chunk > MAX_STEP_ROWS and prefill > MAX_STEP_ROWS:
            raise UserError(
                f"{where}: {prefill} tokens in one prefill step, a step holds at most"
                f" {MAX_STEP_ROWS}; give --prefill-chunk, the tokens of a prefill step"
            )
        index = np.arange(rows)
        is_prefill = index < prefill
        prefill_steps = -(-prefill // chunk)
        step = np.where(is_prefill, index // chunk, prefill_steps + index - prefill)
        columns = {
            "request": np.full(rows, len(self._requests)),
            "step": self._next_step + step,
            "row": np.where(is_prefill, index % chunk, 0),
            "phase": np.where(is_prefill, PREFILL, DECODE),
            "position": first_position + index,
            "token_id": np.full(rows, NULL_ID) if token_id is None else token_id,
        }
        self._writer.write_rows(experts=experts, weights=weights, **columns)
        self._next_step += int(step[-1]) + 1
        self._requests.append(
            {
                "request": len(self._requests),
                "prompt_tokens": prompt_tokens,
                "output_tokens": rows - prefill + 1,
            }
        )

    def close(self) -> None:
        """Write the requests' lengths and mark the trace complete."""
        self._writer.close(self._requests)
