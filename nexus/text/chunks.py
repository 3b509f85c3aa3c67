"""Prompts as rows of token ids: CLIP's windows of 77, T5's one long row."""

from typing import Any, NamedTuple

from nexus.text.weighting import Part, joined

BACKTRACK = 20          # a window that would end within a phrase ends at a comma no further back than this


class Row(NamedTuple):
    """One row for an encoder: ids, their weights, and how many of them are not padding."""

    ids: list[int]
    weights: list[float]
    used: int


def tokens(tokenizer: Any, part: Part) -> tuple[list[int], list[float]]:
    """The ids of a text without special ones, each with the weight of its last character."""
    found = tokenizer(part.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    weights = [part.weights[end - 1] if end else 1.0 for _, end in found["offset_mapping"]]
    return list(found["input_ids"]), weights


def clip_rows(tokenizer: Any, parts: list[Part], length: int) -> list[Row]:
    """As many windows of `length` ids as the prompt needs, each with its own begin and end; BREAK starts another."""
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    rows = []
    for part in parts:
        ids, weights = tokens(tokenizer, part)
        while True:
            cut = _window(ids, comma, length - 2)
            rows.append(_framed(tokenizer, ids[:cut], weights[:cut], length))
            ids, weights = ids[cut:], weights[cut:]
            if not ids:
                break
    return rows


def _window(ids: list[int], comma: int | None, room: int) -> int:
    """How many ids the next window takes: up to a late comma when the rest does not fit."""
    if len(ids) <= room:
        return len(ids)
    for place in range(room - 1, max(room - 1 - BACKTRACK, 0), -1):
        if ids[place] == comma:
            return place + 1
    return room


def clip_row(tokenizer: Any, parts: list[Part], length: int) -> tuple[Row, str]:
    """The one window of a recipe that cannot take more, and the text that did not fit."""
    ids, weights = tokens(tokenizer, joined(parts))
    room = length - 2
    return _framed(tokenizer, ids[:room], weights[:room], length), _text(tokenizer, ids[room:])


def _framed(tokenizer: Any, ids: list[int], weights: list[float], length: int) -> Row:
    pad = length - 2 - len(ids)
    row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * pad]
    return Row(row, [1.0, *weights, *[1.0] * (pad + 1)], len(ids) + 2)


def t5_row(tokenizer: Any, parts: list[Part], length: int) -> tuple[Row, str]:
    """T5's row, closed by its end mark and padded, and the text that did not fit."""
    ids, weights = tokens(tokenizer, joined(parts))
    kept, room = ids[:length - 1], length - 1
    pad = room - len(kept)
    row = [*kept, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * pad]
    return Row(row, [*weights[:room], *[1.0] * (pad + 1)], len(kept) + 1), _text(tokenizer, ids[room:])


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids).strip() if ids else ""
