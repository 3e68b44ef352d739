"""Find and load a model and its tokenizer; what cannot be recorded is told before weights are read.

A model is a local directory, or the id of one on the Hugging Face hub (in the local cache, or
fetched where there is a network).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from configs.errors import UserError
from tracer.adapters import find_moe_blocks
from tracer.prompts import Prompt

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_CONTEXT_NAMES = ("max_position_embeddings", "max_seq_len", "n_positions")


@dataclass
class Loaded:
    """A model that can be recorded: configuration and tokenizer are read, the weights not yet."""

    name: str
    source: str
    revision: str
    config: Any
    tokenizer: Any
    device: str
    dtype: str
    trust_remote_code: bool

    @property
    def context(self) -> int | None:
        """Most tokens of a request, prompt and answer; None where the configuration has none."""
        config = self.config.get_text_config()
        found = (getattr(config, name, None) for name in _CONTEXT_NAMES)
        return next((value for value in found if isinstance(value, int)), None)

    def tokenize(self, prompt: Prompt, index: int) -> list[int]:
        """Token ids of the prompt; chats through the tokenizer's template."""
        if "messages" not in prompt:
            ids = list(self.tokenizer(prompt["text"]).input_ids)
        elif self.tokenizer.chat_template is None:
            raise UserError(
                f"prompt {index + 1} has messages, and the tokenizer of {self.name} no chat"
                " template; give texts"
            )
        else:
            ids = self._tokenize_chat(prompt["messages"], index)
        if not ids:
            raise UserError(f"prompt {index + 1} has no tokens: give it a text")
        return ids

    def _tokenize_chat(self, messages: list[dict[str, Any]], index: int) -> list[int]:
        try:
            encoded = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        # TypeError: of what the template does with a content that is no text.
        except (jinja2.TemplateError, TypeError) as error:
            raise UserError(
                f"prompt {index + 1}: the chat template of {self.name} refuses its messages"
                f" ({_line(error)}); mend them"
            ) from error
        return list(encoded["input_ids"])

    def weights(self) -> Any:
        """Load the model to its device.

        Raises UserError where it does not fit, is broken, or lacks weights that the configuration
        asks for: transformers would draw those at random.
        """
        dtype: Any = DTYPES.get(self.dtype, "auto")
        # By way of `device_map` a GPU's weights do not all pass through the host's memory.
        place = {"device_map": self.device} if self.device != "cpu" else {}
        loader: Any = transformers.AutoModelForCausalLM
        try:
            model, found = loader.from_pretrained(
                self.source,
                dtype=dtype,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told by name below
                **place,
            )
        except torch.OutOfMemoryError as error:
            raise UserError(f"{self.name} does not fit into the memory of {self.device}") from error
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{self.name}: its weights cannot be loaded: {_line(error)}") from error
        self._refuse_random(found)
        return model.eval()

    def _refuse_random(self, found: dict[str, Any]) -> None:
        if found["missing_keys"]:
            raise UserError(
                f"{self.name}: its files lack {len(found['missing_keys'])} weights, such as"
                f" {min(found['missing_keys'])}; fetch them, or mend config.json"
            )
        if found["mismatched_keys"]:
            name, there, asked = min(found["mismatched_keys"])
            raise UserError(
                f"{self.name}: {name} is {list(there)} in its files, and config.json asks for"
                f" {list(asked)}; mend config.json"
            )


def load_model(
    path_or_id: str | Path,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Loaded:
    """Read configuration and tokenizer of a causal language model with experts.

    `dtype`: auto (the checkpoint's), or of DTYPES. Raises UserError for a model that is not there,
    is dense or not covered, or has no tokenizer.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: choose of auto, {', '.join(DTYPES)}")
    source, name = _locate(path_or_id)
    config = _config(source, name, trust_remote_code)
    _refuse_uncovered(config, name, trust_remote_code)
    tokenizer = _tokenizer(source, name, trust_remote_code)
    revision = str(getattr(config, "_commit_hash", None) or "")
    return Loaded(name, source, revision, config, tokenizer, device, dtype, trust_remote_code)


def resolve_device(device: str) -> str:
    """`auto` is the GPU where there is one; `cuda` without a GPU is a UserError."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and device.split(":")[0] != "cuda":
        raise UserError(f"device {device!r}: choose of auto, cpu, cuda")
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"device {device}: PyTorch sees no GPU here; use --device cpu")
    return device


def _locate(path_or_id: str | Path) -> tuple[str, str]:
    """Where to load from, and the model's name."""
    path = Path(path_or_id)
    if (path / "config.json").is_file():
        return str(path), path.resolve().name
    text = str(path_or_id)
    if path.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise UserError(f"{text}: no model lies here (config.json is missing); give its directory")
    return text, text


def _config(source: str, name: str, trust_remote_code: bool) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise UserError(_unreachable(source, name, "config.json")) from error
    except (ValueError, StrictDataclassError) as error:
        hint = "; --trust-remote-code runs it" if "trust_remote_code" in str(error) else ""
        message = _line(error) if not hint else "the model comes with code of its own"
        raise UserError(f"{name}: {message}{hint}") from error


def _tokenizer(source: str, name: str, trust_remote_code: bool) -> Any:
    mend = "put tokenizer.json and tokenizer_config.json beside config.json"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{name}: its tokenizer cannot be loaded; {mend} ({_line(error)})"
        ) from error
    # Where there are no files, transformers makes one of the model's class without a vocabulary.
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise UserError(f"{name}: it has no tokenizer; {mend}")
    return tokenizer


def _refuse_uncovered(config: Any, name: str, trust_remote_code: bool) -> None:
    """Build the model without memory for its weights, to see whether it has experts that route."""
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name}: an encoder-decoder model; only decoder-only ones are recorded")
    try:
        with torch.device("meta"):
            skeleton = transformers.AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{name}: no causal language model ({_line(error)})") from error
    find_moe_blocks(skeleton)


def _unreachable(source: str, name: str, what: str) -> str:
    if Path(source).is_dir():
        return f"{name}: its {what} cannot be read; restore it"
    return (
        f"{name}: neither a local directory nor in the local Hugging Face cache, and the hub did"
        f" not give it; download it where there is a network (hf download {name} --local-dir DIR)"
        " and name DIR"
    )


def _line(error: BaseException) -> str:
    """An error's first sentence, in one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:200] + "..."
