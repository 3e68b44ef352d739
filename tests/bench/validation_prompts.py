"""Prompts of given lengths, cut from files of documents: what the traces of the validation ran on.

    python -m tests.bench.validation_prompts --model TWIN --documents gsm8k_test.jsonl:question \\
        --documents mt_bench.jsonl:turns.0 --lengths 512,512,64,64,64,8,8,8 --others 30 \\
        --seed 15 --out prompts.jsonl

A prompt begins where a document does and goes on into the next ones, in an order drawn from the
seed, until it has as many tokens as it shall have; no document is in two prompts. `--others`:
so many more, of 24 to 124 tokens, drawn evenly.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from configs.files import write_atomically
from tracer.prompts import read_prompts

SHORTEST, LONGEST = 24, 124


def cut(tokenizer: PreTrainedTokenizerBase, texts: Iterator[str], length: int) -> str:
    """A text of exactly so many tokens from the beginning of the next ones; they are used up."""
    joined = ""
    for text in texts:
        joined += text
        if len(tokenizer(joined)["input_ids"]) >= length:
            found = _of_length(tokenizer, joined, length)
            if found is not None:
                return found
            joined = ""  # no cut of it has just so many: begin anew
        else:
            joined += "\n\n"
    raise SystemExit(f"the documents are used up before a prompt has {length} tokens: name more")


def _of_length(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> str | None:
    """The shortest beginning with so many tokens; None if no cut between characters has them."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high) // 2
        if len(tokenizer(text[:middle])["input_ids"]) < length:
            low = middle + 1
        else:
            high = middle
    found = text[:low]
    return found if len(tokenizer(found)["input_ids"]) == length else None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="whose tokenizer counts")
    parser.add_argument(
        "--documents", action="append", required=True, help="FILE or FILE:FIELD; several times"
    )
    parser.add_argument("--lengths", default="", help="tokens of each of the first prompts")
    parser.add_argument("--others", type=int, default=0)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help=".jsonl, new")
    options = parser.parse_args(argv)
    if options.out.exists():
        parser.error(f"{options.out} exists: name another file")
    rng = np.random.default_rng(options.seed)
    texts = []
    for named in options.documents:
        path, _, field = named.partition(":")
        texts += [prompt["text"] for prompt in read_prompts(path, field=field or None)]
    order = iter([texts[at] for at in rng.permutation(len(texts))])
    lengths = [int(length) for length in options.lengths.split(",") if length]
    lengths += rng.integers(SHORTEST, LONGEST + 1, options.others).tolist()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    lines = [json.dumps({"text": cut(tokenizer, order, length)}) for length in lengths]
    write_atomically(options.out, ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main()
