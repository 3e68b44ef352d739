"""Tiny random transformers models with experts, and a tokenizer for them."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY = 40
END = 0
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": END,
    "pad_token_id": None,
}
CONFIGS = {
    "olmoe": {
        "num_hidden_layers": 4,
        "intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "tie_word_embeddings": True,
    },
    "qwen2_moe": {
        "num_hidden_layers": 5,
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 20,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1, 4],
        "tie_word_embeddings": False,
    },
}


def build(family, **changes):
    """A random float32 model whose gates are sharp enough that rounding decides no choice."""
    torch.manual_seed(0)
    defaults = type(transformers.AutoConfig.for_model(family))
    config = defaults(**{**COMMON, **CONFIGS.get(family, {}), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.mul_(50)
    return model


def save(model, path):
    """The model and a tokenizer whose token i is the word `ti`."""
    model.save_pretrained(path)
    words = {f"t{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path
