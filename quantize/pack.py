"""Bit packing: integer codes of any width from 1 to 8 bits into 32-bit words, densely, least significant bits first.

A run of 32 codes fills exactly ``bits`` words; codes of 3, 5, 6 or 7 bits may straddle two of them. This is the
layout of compressed-tensors (its ``pack_to_int32``), and for 2, 4 and 8 bits that of GPTQ checkpoints too.
"""

from __future__ import annotations

import math

import torch

__all__ = ["pack_words", "packed_length", "signed_codes", "unpack_words", "unsigned_codes"]

_WORD = 32
_WORD_MASK = (1 << _WORD) - 1


def packed_length(count: int, bits: int) -> int:
    """Words that ``count`` codes take."""
    return math.ceil(count * bits / _WORD)


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack unsigned codes along the last dimension.

    Args:
        codes: uint8 ``[rows, count]``, each below ``2 ** bits``.
        bits: 1 to 8.

    Returns:
        int32 ``[rows, packed_length(count, bits)]``; bits after the last code are zero.
    """
    rows, count = codes.shape
    padded = torch.nn.functional.pad(codes.contiguous(), (0, -count % _WORD))
    if 8 % bits == 0:
        # Whole codes per byte: join them within bytes, and read four bytes as one little-endian word.
        lanes = padded.view(rows, -1, 8 // bits)
        joined = lanes[..., 0].clone()
        for lane in range(1, 8 // bits):
            joined |= lanes[..., lane] << (lane * bits)
        words = joined.view(torch.int32)
    else:
        lanes = padded.view(rows, -1, _WORD).to(torch.int64)
        wide = torch.zeros((rows, lanes.shape[1], bits), dtype=torch.int64, device=codes.device)
        for lane in range(_WORD):
            word, shift = divmod(lane * bits, _WORD)
            wide[..., word] |= (lanes[..., lane] << shift) & _WORD_MASK
            if shift + bits > _WORD:
                wide[..., word + 1] |= lanes[..., lane] >> (_WORD - shift)
        words = _as_signed(wide).reshape(rows, -1)
    return words[:, : packed_length(count, bits)].contiguous()


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first ``count`` codes of each row; the inverse of :func:`pack_words`.

    Args:
        words: int32 ``[rows, packed_length(count, bits)]``.
        bits: 1 to 8.
        count: codes per row.

    Returns:
        uint8 ``[rows, count]``.
    """
    rows = words.shape[0]
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        bytes_ = words.contiguous().view(torch.uint8)
        lanes = [(bytes_ >> (lane * bits)) & mask for lane in range(8 // bits)]
        return torch.stack(lanes, -1).view(rows, -1)[:, :count].contiguous()
    padded = torch.nn.functional.pad(words, (0, -words.shape[1] % bits))
    wide = padded.view(rows, -1, bits).to(torch.int64) & _WORD_MASK
    codes = torch.empty((rows, wide.shape[1], _WORD), dtype=torch.uint8, device=words.device)
    for lane in range(_WORD):
        word, shift = divmod(lane * bits, _WORD)
        value = wide[..., word] >> shift
        if shift + bits > _WORD:
            value |= wide[..., word + 1] << (_WORD - shift)
        codes[..., lane] = (value & mask).to(torch.uint8)
    return codes.view(rows, -1)[:, :count].contiguous()


def unsigned_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes (int8, of any shape) moved up by half their range, ``0 … 2 ** bits - 1``, as uint8."""
    # Modulo 256, so that the sum needs no wider type.
    return codes.view(torch.uint8).add(1 << (bits - 1))


def signed_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of :func:`unsigned_codes`."""
    return codes.sub(1 << (bits - 1)).view(torch.int8)


def _as_signed(words: torch.Tensor) -> torch.Tensor:
    """int64 values below 2³² as the int32 with the same bits."""
    return torch.where(words > _WORD_MASK >> 1, words - (1 << _WORD), words).to(torch.int32)
