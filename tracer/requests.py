"""requests.parquet: one row a request of a trace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
import pyarrow as pa

from configs.errors import UserError

REQUESTS_FILE = "requests.parquet"
REQUESTS_SCHEMA = pa.schema(
    [
        pa.field("request", pa.int32(), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("output_tokens", pa.int32(), nullable=False),
        pa.field("domain", pa.string()),
        pa.field("arrival_s", pa.float64()),
    ]
)


def requests_table(
    requests: pd.DataFrame | Iterable[Mapping[str, Any]], where: str = "requests"
) -> pa.Table:
    """Check requests and give them the types of requests.parquet, ordered by request.

    `where` names their origin in the UserError raised.
    """
    frame = pd.DataFrame(requests if isinstance(requests, pd.DataFrame) else list(requests))
    for name in ("request", "prompt_tokens", "output_tokens"):
        if name not in frame:
            raise UserError(f"{where}: column {name!r} is missing; add it")
    unknown = sorted(set(map(str, frame)) - set(REQUESTS_SCHEMA.names))
    if unknown:
        raise UserError(f"{where}: column {unknown[0]!r} is not known; remove it")
    if frame["request"].duplicated().any():
        again = frame["request"][frame["request"].duplicated()].iloc[0]
        raise UserError(f"{where}: request {again} is listed twice; list it once")
    frame = frame.sort_values("request", ignore_index=True).reindex(columns=REQUESTS_SCHEMA.names)
    columns = [_request_column(frame[field.name], field, where) for field in REQUESTS_SCHEMA]
    return pa.Table.from_arrays(columns, schema=REQUESTS_SCHEMA)


def _request_column(values: pd.Series, field: pa.Field, where: str) -> pa.Array:
    plain: list[Any] = [None if pd.isna(value) else value for value in values.tolist()]
    bad: list[Any] = [v for v in plain if v is None and not field.nullable]
    bad += [v for v in plain if isinstance(v, int | float) and not 0 <= v < float("inf")]
    if bad:
        raise UserError(f"{where}: {field.name} {bad[0]} must be a number of at least 0")
    return pa.array(plain, type=field.type)
