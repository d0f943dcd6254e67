"""What a token adds to a text, as bytes: a character may be spread over several tokens."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_SPACE = "\u2581"
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Maps the token ids of one tokenizer to bytes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Find out how its tokens are spelt."""
        self._tokenizer = tokenizer
        self._special_ids = frozenset(tokenizer.all_special_ids)
        decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
        steps = {step.get("type"): step for step in decoder.get("decoders", [decoder])}
        self._bytes = _byte_alphabet() if "ByteLevel" in steps else None
        # SentencePiece writes a space as a mark, which a decoder drops where it stands alone.
        self._space = _SPACE if _SPACE in json.dumps(decoder, ensure_ascii=False) else None
        self._falls_back = "ByteFallback" in steps

    def __call__(self, token_id: int) -> bytes:
        """Return a token's bytes, UTF-8 when put together.

        A special token writes none, nor does an id that LLMs with more rows than tokens can say.
        """
        piece: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None or token_id in self._special_ids:
            return b""
        if self._bytes is not None and all(letter in self._bytes for letter in piece):
            return bytes(self._bytes[letter] for letter in piece)
        if self._falls_back and (byte := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        if self._space is not None:
            return piece.replace(self._space, " ").encode()
        return str(self._tokenizer.decode([token_id])).encode()


def _byte_alphabet() -> dict[str, int]:
    """The letters in which byte-level BPE spells bytes: GPT-2's `bytes_to_unicode`, inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(0x100) if byte not in set(printable))
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}
