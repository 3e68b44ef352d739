"""Read single experts from a checkpoint, without ever holding the others.

Checkpoints keep experts under names of their own (one tensor an expert and matrix, or fused). The
conversion that transformers would apply to all of them together is applied to one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from configs.errors import UserError

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


@dataclass
class _Source:
    """Where one fused parameter of one layer comes from.

    ``converter`` None: the checkpoint holds it fused, under ``keys[""]``. Else ``keys`` maps each
    source pattern to the keys of its experts, by expert.
    """

    converter: Any = None
    keys: dict[str, dict[int, str]] = field(default_factory=dict)


class ExpertReader:
    """Experts of a safetensors checkpoint, one at a time.

    ``meta_model``: the model on the meta device; ``blocks``: its experts modules by name. Raises
    UserError for a missing or damaged file and for an expert that the checkpoint lacks.
    """

    def __init__(self, path: str | Path, meta_model: Any, blocks: dict[str, Any]) -> None:
        self.path = Path(path)
        self._file_of = _files(self.path)
        self._sources = self._find_sources(meta_model, blocks)
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}

    def close(self) -> None:
        """Close the files."""
        self._stack.close()
        self._open.clear()

    def __enter__(self) -> ExpertReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def read(self, block: str, expert: int) -> dict[str, torch.Tensor]:
        """Parameters of one expert by name; shapes as in the fused module, less the first."""
        parameters = self._sources[block]
        return {name: self._read(source, name, expert) for name, source in parameters.items()}

    def _read(self, source: _Source, name: str, expert: int) -> torch.Tensor:
        if source.converter is None:
            key = source.keys[""][0]
            with self._readable(key):
                rows: torch.Tensor = self._file(key).get_slice(key)[expert]
            return rows
        tensors: dict[str, list[torch.Tensor]] = {}
        for pattern, keys in source.keys.items():
            if expert not in keys:
                raise UserError(f"{self.path}: {pattern} lacks expert {expert}; get the checkpoint")
            key = keys[expert]
            with self._readable(key):
                tensors[pattern] = [self._file(key).get_tensor(key)]
        converter = source.converter
        result: Any = tensors
        for operation in converter.operations:
            result = operation.convert(
                result,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
            )
        (fused,) = result.values()
        fused = fused[0] if isinstance(fused, list) else fused
        row: torch.Tensor = fused[0]
        return row

    @contextmanager
    def _readable(self, key: str) -> Iterator[None]:
        try:
            yield
        except SafetensorError as error:
            path = self._file_of[key]
            raise UserError(f"{path}: cannot be read ({error}); get the file again") from error

    def _file(self, key: str) -> Any:
        path = self._file_of[key]
        if path not in self._open:
            try:
                self._open[path] = self._stack.enter_context(safe_open(str(path), "pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: cannot be read ({error}); get the file again") from error
        return self._open[path]

    def _find_sources(
        self, meta_model: Any, blocks: dict[str, Any]
    ) -> dict[str, dict[str, _Source]]:
        transforms = get_model_conversion_mapping(meta_model)
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        by_pattern = {p: each for each in converters for p in each.source_patterns}
        wanted = {
            f"{block}.{name}": (block, name)
            for block, experts in blocks.items()
            for name, _ in experts.named_parameters()
        }
        state = dict(meta_model.state_dict())
        sources: dict[str, dict[str, _Source]] = {block: {} for block in blocks}
        prefix = meta_model.base_model_prefix
        for key in self._file_of:
            target, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if target not in wanted:
                continue
            block, name = wanted[target]
            source = sources[block].setdefault(name, _Source())
            if pattern is None:
                source.keys[""] = {0: key}
                continue
            source.converter = by_pattern[pattern]
            source.keys.setdefault(pattern, {})[_expert_of(key)] = key
        for target, (block, name) in wanted.items():
            if name not in sources[block]:
                raise UserError(f"{self.path}: holds no {target}; is it this model's checkpoint?")
        return sources


def _expert_of(key: str) -> int:
    """Number of the expert in a key such as ``...experts.12.up_proj.weight``."""
    match = re.search(r"experts?\.(\d+)\.", key)
    if match is None:
        raise UserError(f"checkpoint key {key!r} names no expert: this layout is not supported")
    return int(match[1])


def _files(path: Path) -> dict[str, Path]:
    """File of every key; the headers alone are read."""
    index = path / INDEX_FILE
    if index.is_file():
        weight_map = _weight_map(index)
        missing = sorted({name for name in weight_map.values() if not (path / name).is_file()})
        if missing:
            raise UserError(f"{path}: shard {missing[0]} is missing; get it from the source")
        for name in sorted(set(weight_map.values())):
            next(_keys(path / name), None)  # tells of a damaged one
        return {key: path / name for key, name in weight_map.items()}
    single = path / SINGLE_FILE
    if not single.is_file():
        raise UserError(f"{path}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    return dict(_keys(single))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{index}: is no index of a checkpoint; get the file again") from error
    return found


def _keys(path: Path) -> Iterator[tuple[str, Path]]:
    try:
        with safe_open(str(path), "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                yield key, path
    except SafetensorError as error:
        raise UserError(f"{path}: is cut off or damaged ({error}); get it again") from error
