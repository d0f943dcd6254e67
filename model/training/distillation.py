"""A fine-tuned Whisper as the teacher of a speech LLM that writes the same tokens.

A published Whisper's decoder has read far more than a small LM trained on a little text. Its
distribution over the next token, given the same audio and the same text so far, tells the LM more
than the one token that was said (Hinton et al. 2015, arXiv 1503.02531).

Axis legend: B clips, F encoder frames, D encoder width, L target tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from model.encoder import encode, length_mask
from model.training.acceleration import use_fast_attention
from model.training.speech_data import pad_targets
from model.whisper_baseline import WhisperTranscriber, masked_cross_attention

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from model.processing import SpeechLLMProcessor


class WhisperTeacher:
    """A frozen Whisper, run on the batches that the speech LLM is trained on."""

    def __init__(self, folder: str, processor: SpeechLLMProcessor) -> None:
        """Load it.

        Args:
            folder: what `speechllm train whisper` wrote.
            processor: the speech LLM's.

        Raises:
            CheckpointError: there is no Whisper, or its tensors do not fit.
            ValueError: its tokens are not the LLM's, or its encoder runs in another mode.
        """
        transcriber = WhisperTranscriber.from_pretrained(folder, "cpu", "fp32")
        if transcriber.tokenizer.get_vocab() != processor.tokenizer.get_vocab():
            raise ValueError(f"{folder}: its tokens are not the LLM's, so it cannot teach it")
        if transcriber.encoder_mode != processor.encoder_mode:
            raise ValueError(
                f"{folder}: its encoder runs in mode {transcriber.encoder_mode}, the speech LLM's "
                f"in mode {processor.encoder_mode}"
            )
        self._whisper = transcriber.whisper.requires_grad_(False).eval()
        use_fast_attention(self._whisper)
        self._prefix = transcriber.prefix_ids
        self._mode = transcriber.encoder_mode
        self._pad_id = int(processor.tokenizer.pad_token_id)

    def has_encoder(self, encoder: WhisperEncoder) -> bool:
        """Whether the teacher's encoder makes the same frames as `encoder`."""
        own, other = self._whisper.model.encoder.state_dict(), encoder.state_dict()
        return own.keys() == other.keys() and all(
            torch.equal(tensor, other[name]) for name, tensor in own.items()
        )

    @torch.no_grad()
    def encode(self, input_features: Tensor, feature_lens: Tensor) -> Tensor:
        """Frames (B, F, D) of log-mel features (B, M, T), by the teacher's own encoder."""
        self._whisper.to(input_features.device)  # the loop has placed the student meanwhile
        return encode(self._whisper.model.encoder, input_features, feature_lens, self._mode)[0]

    @torch.no_grad()
    def probabilities(
        self, frames: Tensor, frame_lens: Tensor, targets: list[list[int]], vocab_size: int
    ) -> Tensor:
        """Distribution over each next token, targets and EOS of all clips in a row.

        What lies beyond the decoder's last position it cannot teach: zeros stand there.

        Args:
            frames: (B, F, D) of the teacher's encoder.
            frame_lens: (B,) valid frames.
            targets: token ids of each clip.
            vocab_size: of the LLM, V, whose table may be larger than the tokenizer.

        Returns:
            (sum over clips of L + 1, V) float32.
        """
        self._whisper.to(frames.device)
        skipped, most = len(self._prefix) - 1, self._whisper.config.max_target_positions
        inputs = pad_targets([(self._prefix + ids)[:most] for ids in targets], self._pad_id)
        with masked_cross_attention(self._whisper, length_mask(frame_lens, frames.shape[1])):
            hidden = self._whisper.model.decoder(
                input_ids=inputs.to(frames.device), encoder_hidden_states=frames, use_cache=False
            ).last_hidden_state
        wanted = torch.tensor([len(ids) + 1 for ids in targets], device=frames.device)
        taught = wanted.clamp(max=most - skipped)
        hidden = hidden[:, skipped:]
        logits = self._whisper.proj_out(hidden[length_mask(taught, hidden.shape[1])])
        probabilities: Tensor = logits.new_zeros(int(wanted.sum()), vocab_size, dtype=torch.float32)
        positions = torch.cat([torch.arange(int(n), device=frames.device) for n in wanted])
        is_taught = positions < taught.repeat_interleave(wanted)
        n_tokens = min(vocab_size, logits.shape[-1])
        probabilities[is_taught, :n_tokens] = logits.float().softmax(-1)[:, :n_tokens]
        return probabilities
