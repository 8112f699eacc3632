"""Small models with random weights, their prompts, a tokenizer with a chat template, and stores for them.

The weights are large enough that an answer depends on the whole prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

import stratakv

# Models as small as these are computed before a second thread has woken up.
torch.set_num_threads(1)

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
PROMPT_TOKENS = 150
BLOCK = 16


def llama(dtype: Any = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A Llama of three layers."""
    terms = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**{**terms, **changes})
    return transformers.LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def prompt(tokens: int = PROMPT_TOKENS, seed: int = 1) -> Any:
    """Random tokens, `[1, tokens]`, none of them 0."""
    return torch.randint(1, 256, (1, tokens), generator=torch.Generator().manual_seed(seed))


def padded(prompts: list[Any]) -> dict[str, Any]:
    """A batch of prompts as a tokenizer pads them for generation."""
    columns = max(each.shape[1] for each in prompts)
    input_ids = torch.zeros(len(prompts), columns, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, each in enumerate(prompts):
        input_ids[row, columns - each.shape[1] :] = each[0]
        attention_mask[row, columns - each.shape[1] :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def settings(folder: Path, ram: str = "64MiB") -> stratakv.Config:
    """A store of RAM and SSD."""
    return stratakv.Config(
        ram=stratakv.RamConfig(capacity_bytes=ram),
        ssd=stratakv.SsdConfig(path=str(folder), capacity_bytes="256MiB", segment_bytes="4MiB", policy="write_through"),
    )


SPECIAL = ["<pad>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(template: str = TEMPLATE) -> Any:
    """256 tokens that are words: what is decoded is encoded to the same tokens again."""
    # transformers tries a tokenizer with this word before it looks for strings that stop a generation.
    words = [*SPECIAL, *(f"w{number}" for number in range(len(SPECIAL), 255)), "abcdef"]
    vocabulary = {word: number for number, word in enumerate(words)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[2:],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = template
    return made


def words(tokens: int, seed: int = 1) -> str:
    """A text of so many tokens of that tokenizer."""
    return " ".join(f"w{number}" for number in (prompt(tokens, seed)[0] % 200 + len(SPECIAL)).tolist())
