"""What a client may ask of a transcription, whichever way it asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.engine.decoding import GREEDY

if TYPE_CHECKING:
    from server.engine.decoding import Decoding
    from server.transcription import Timestamps


@dataclass(frozen=True, slots=True)
class TranscribeOptions:
    """Options of one transcription.

    Attributes:
        language: ISO 639-1 code of what is spoken; None leaves it to the model.
        prompt: replaces the checkpoint's own.
        previous_text: what was said just before the recording.
        hotwords: words that are likely to be said.
        condition_on_previous_text: let the model read what it has said of the piece before; the
            pieces of a long recording then follow each other.
        timestamps: how finely to place the text in time.
        decoding: how its tokens are chosen.
        vad: whether to leave out what is no speech.
        deadline_s: seconds from the upload's end until the answer is no longer wanted; None leaves
            it to the server, whose own limit holds anyway.
    """

    language: str | None = None
    prompt: str | None = None
    previous_text: str = ""
    hotwords: tuple[str, ...] = ()
    condition_on_previous_text: bool = False
    timestamps: Timestamps = "none"
    decoding: Decoding = GREEDY
    vad: bool = True
    deadline_s: float | None = None

    @property
    def places_text(self) -> bool:
        """Whether the answer tells when anything was said; several answers come with times."""
        return self.timestamps != "none" or self.decoding.n_best > 1
