"""Prompts in one tensor: rows of different lengths, padded on the left as transformers pads for generation.

    row 0   · · · a b c d        `·` padding, never stored: column p + i of a row with p of it is token i
    row 1   e f g h i j k

Only padding before the first token leaves a row what it is alone. A mask that hides anything else changes what later
tokens are computed from, so it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stratakv import InputError

__all__ = ["Batch"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts of one request.

    Attributes:
        input_ids: `[rows, columns]`, integers on the CPU.
        padding: How many columns each row is padded by, on the left.
    """

    input_ids: torch.Tensor
    padding: tuple[int, ...]

    @classmethod
    def of(cls, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Batch:
        """Reads prompts as they are handed to `model.generate`.

        Args:
            input_ids: `[rows, columns]`, or `[columns]` for one.
            attention_mask: 0 where a column is padding, else 1; of the shape of `input_ids`, or of fewer columns, if
                those behind are of no padding. None: there is none.

        Raises:
            InputError: The tensors are no prompts, or padded otherwise than on the left.
        """
        if not isinstance(input_ids, torch.Tensor):
            raise InputError(f"input_ids is {type(input_ids).__name__}, not a tensor of [rows, tokens]")
        if input_ids.ndim == 1:
            input_ids = input_ids[None]
            attention_mask = attention_mask[None] if attention_mask is not None else None
        if input_ids.ndim != 2:
            raise InputError(f"input_ids has {input_ids.ndim} dimensions; [rows, tokens] or [tokens] is supported")
        if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
            raise InputError(f"input_ids is {input_ids.dtype}; token ids are integers")
        if input_ids.device.type != "cpu":
            raise InputError(f"input_ids is on {input_ids.device}; only CPU tensors are supported")
        if input_ids.shape[0] == 0:
            raise InputError("input_ids has no rows")
        rows, columns = input_ids.shape
        padding = (0,) * rows
        if attention_mask is not None:
            if attention_mask.ndim != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] > columns:
                raise InputError(f"attention_mask is {list(attention_mask.shape)}, input_ids {[rows, columns]}")
            padding = _left_padding(attention_mask)
        return cls(input_ids=input_ids.detach(), padding=padding)

    @property
    def rows(self) -> int:
        """How many prompts there are."""
        return int(self.input_ids.shape[0])

    @property
    def columns(self) -> int:
        """Length of a row, padding included."""
        return int(self.input_ids.shape[1])

    def tokens(self, row: int) -> torch.Tensor:
        """One prompt without its padding, `[tokens]`."""
        return self.input_ids[row, self.padding[row] :]

    def mask(self) -> torch.Tensor:
        """The `attention_mask` that says so, `[rows, columns]`."""
        return (torch.arange(self.columns) >= torch.tensor(self.padding)[:, None]).long()


def _left_padding(attention_mask: torch.Tensor) -> tuple[int, ...]:
    """How many columns of each row are hidden, all of them before the first token."""
    mask = attention_mask.detach().cpu()
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError("attention_mask has values other than 0 and 1")
    columns = mask.shape[1]
    shown = mask.bool()
    padding = []
    for row, count in enumerate(shown.sum(dim=1).tolist()):
        if not count:
            raise InputError(f"row {row} of attention_mask hides its whole prompt")
        found = shown[row].nonzero().flatten()
        first, last = int(found[0]), int(found[-1])
        if last + 1 < columns:
            raise InputError(
                f"row {row} of attention_mask is padded on the right, by {columns - last - 1} of {columns} tokens; "
                "generation wants padding on the left: tokenizer.padding_side = 'left'"
            )
        if first + count < columns:
            hole = first + int((~shown[row, first:]).nonzero()[0])
            raise InputError(
                f"row {row} of attention_mask hides token {hole}, behind the first that it shows: "
                "keys and values of later ones would depend on more than the prefix"
            )
        padding.append(first)
    return tuple(padding)
