"""Random variation of training data: of waveforms, of log-mel spectrograms, of encoder frames.

Axis legend: B clips, N samples, M mel bins, T frames, D encoder width, K masks.

Everything random comes from a generator that the caller passes, so that a clip's variation is a
function of its seed. `AugmentationConfig`, `SpecAugmentConfig` and `FeatureAugmentConfig` refuse
values out of range; a probability or count of 0 switches an effect off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import soxr
import torch

from model.data.audio import SAMPLE_RATE_HZ

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    Waveform = NDArray[np.float32]
    Range = tuple[float, float]

_TELEPHONE_RATE_HZ = 8_000
_LOWEST_EQUALISED_HZ = 62.5
# Noise under a clip quieter than this (RMS, -60 dBFS) is scaled as if the clip were this loud, so
# that silence becomes audible background noise.
_QUIETEST_RMS = 1e-3
_SILENT_RMS = 1e-6  # below half a step of 16-bit audio
# Share of additive noise that is generated where recordings of noise are given.
_GENERATED_NOISE_SHARE = 0.3
# A room's impulse response is followed until it has decayed by this much.
_REVERBERATION_FLOOR_DB = 60.0

MIN_GAP_S = 0.05
MAX_GAP_S = 0.4  # of silence between two joined utterances
_SHORT_S = 1.5
_SHORT_PROBABILITY = 0.6
_MAX_LONG_PARTS = 3


SPEED_PROBABILITY = 0.5
SPEED_RANGE = (0.85, 1.18)


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentationConfig:
    """How often and how strongly waveforms are varied; each effect is drawn on its own.

    Probabilities are per clip; ranges are drawn from uniformly.

    Attributes:
        speed_probability: of playing faster or slower, which moves the pitch too.
        speed_range: speed factor; 0.9 lasts 1/0.9 as long.
        padding_probability: of near silence before and behind, as where a recording is started and
            stopped by hand.
        padding_s: seconds of it on each side, drawn for each.
        padding_db: RMS of the clip over that of the faint noise there.
        reverberation_probability: of a synthetic room.
        reverberation_time_s: time in which the room's sound decays by 60 dB (T60).
        direct_to_reverberant_db: energy of the direct sound over that of the room's.
        equaliser_probability: of another microphone: a smooth curve over frequency.
        equaliser_db: most that the curve raises or lowers a frequency.
        noise_probability: of additive noise: a recording, or noise of a random colour.
        noise_snr_db: RMS of the clip over that of the noise.
        telephone_probability: of a telephone's band (8 kHz sample rate).
        gain_probability: of another loudness.
        gain_db: gain; held back where it would clip.
        max_duration_s: a clip is not slowed down or padded beyond this.
    """

    speed_probability: float = SPEED_PROBABILITY
    speed_range: Range = SPEED_RANGE
    padding_probability: float = 0.35
    padding_s: Range = (0.0, 1.2)
    padding_db: Range = (30.0, 70.0)
    reverberation_probability: float = 0.15
    reverberation_time_s: Range = (0.1, 0.6)
    direct_to_reverberant_db: Range = (0.0, 18.0)
    equaliser_probability: float = 0.3
    equaliser_db: float = 9.0
    noise_probability: float = 0.35
    noise_snr_db: Range = (5.0, 30.0)
    telephone_probability: float = 0.12
    gain_probability: float = 1.0
    gain_db: Range = (-12.0, 6.0)
    max_duration_s: float = 30.0

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn.

        Raises:
            ValueError: a probability outside 0..1, an empty range, or a quantity that must be
                above 0 and is not.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_probability"):
                _require_share(field.name, value)
            elif isinstance(value, tuple):
                _require_range(field.name, value)
        for name, lowest in (
            ("speed_range", self.speed_range[0]),
            ("reverberation_time_s", self.reverberation_time_s[0]),
            ("max_duration_s", self.max_duration_s),
        ):
            if not lowest > 0:
                raise ValueError(f"{name} must be above 0, not {lowest}")
        for name, lowest in (
            ("padding_s", self.padding_s[0]),
            ("equaliser_db", self.equaliser_db),
        ):
            if not 0 <= lowest < math.inf:
                raise ValueError(f"{name} must not be below 0, nor infinite: {lowest}")


class WaveformAugmenter:
    """Varies clips as a voice, a room, a microphone and a telephone line do, in that order."""

    def __init__(self, config: AugmentationConfig, noises: Sequence[Waveform]) -> None:
        """Keep the noises.

        Args:
            config: how often and how strongly.
            noises: recordings of background noise, each (N_i,) float at 16 kHz; without any, all
                noise is generated.

        Raises:
            ValueError: a noise is empty, silent, not finite or not mono.
        """
        for number, noise in enumerate(noises):
            _require_waveform(f"noise {number}", noise)
            if not np.any(noise):
                raise ValueError(f"noise {number} is silent")
        self._config = config
        self._noises = [np.asarray(noise, dtype=np.float32) for noise in noises]

    def __call__(self, waveform: Waveform, rng: np.random.Generator) -> Waveform:
        """Vary one clip.

        Args:
            waveform: (N,) float32 mono at 16 kHz.
            rng: decides everything; the same state gives the same result.

        Returns:
            (N',) float32, finite, within -1..1; N' differs from N where the speed changed or the
            clip was padded. A clip beyond full scale is scaled down to it.

        Raises:
            ValueError: the clip is empty, not finite or not mono.
        """
        _require_waveform("waveform", waveform)
        config = self._config
        waveform = waveform / np.float32(max(1.0, float(np.abs(waveform).max())))
        if rng.random() < config.speed_probability:
            waveform = self._change_speed(waveform, rng)
        if rng.random() < config.padding_probability:
            waveform = self._pad(waveform, rng)
        if rng.random() < config.reverberation_probability:
            waveform = _reverberate(waveform, self._room(rng))
        if rng.random() < config.equaliser_probability:
            waveform = _equalise(waveform, config.equaliser_db, rng)
        if rng.random() < config.noise_probability:
            noise = self._draw_noise(len(waveform), rng)
            waveform = add_noise(waveform, noise, rng.uniform(*config.noise_snr_db))
        if rng.random() < config.telephone_probability:
            waveform = _limit_to_telephone_band(waveform)
        gain = 1.0
        if rng.random() < config.gain_probability:
            gain = 10 ** (rng.uniform(*config.gain_db) / 20)
        peak = max(float(np.abs(waveform).max()), 1e-9)
        varied: Waveform = np.clip(waveform * np.float32(min(gain, 1 / peak)), -1.0, 1.0)
        return varied

    def _change_speed(self, waveform: Waveform, rng: np.random.Generator) -> Waveform:
        slowest, fastest = self._config.speed_range
        max_samples = self._config.max_duration_s * SAMPLE_RATE_HZ
        # Where a clip is at its limit already it may only get faster, and stays as it is if the
        # range does not allow that.
        slowest = max(slowest, min(len(waveform) / max_samples, 1.0))
        if slowest > fastest:
            return waveform
        factor = rng.uniform(slowest, fastest)
        changed: Waveform = soxr.resample(
            waveform, SAMPLE_RATE_HZ * factor, SAMPLE_RATE_HZ, quality="LQ"
        )
        return changed if len(changed) else waveform

    def _pad(self, waveform: Waveform, rng: np.random.Generator) -> Waveform:
        sides = [int(rng.uniform(*self._config.padding_s) * SAMPLE_RATE_HZ) for _ in range(2)]
        spare = max(0, int(self._config.max_duration_s * SAMPLE_RATE_HZ) - len(waveform))
        before, behind = (min(side, spare // 2) for side in sides)
        padded = np.pad(waveform, (before, behind))
        noise = _coloured_noise(len(padded), rng)
        noise[before : before + len(waveform)] = 0.0  # a clip has its own
        return add_noise(padded, noise, rng.uniform(*self._config.padding_db))

    def _room(self, rng: np.random.Generator) -> Waveform:
        """Impulse response (N,): the direct sound, then noise that decays exponentially."""
        time_s = rng.uniform(*self._config.reverberation_time_s)
        ratio_db = rng.uniform(*self._config.direct_to_reverberant_db)
        n_samples = max(2, int(time_s * SAMPLE_RATE_HZ))
        decay_db = np.linspace(0.0, -_REVERBERATION_FLOOR_DB, n_samples, dtype=np.float32)
        tail = rng.standard_normal(n_samples, dtype=np.float32) * 10 ** (decay_db / 20)
        tail[0] = 0.0
        level = 10 ** (-ratio_db / 20) / math.sqrt(float(np.square(tail).sum()))
        response = (tail * level).astype(np.float32)
        response[0] = 1.0
        return response

    def _draw_noise(self, n_samples: int, rng: np.random.Generator) -> Waveform:
        """A recording from a random place on, repeated as needed, or noise of a random colour."""
        if not self._noises or rng.random() < _GENERATED_NOISE_SHARE:
            return _coloured_noise(n_samples, rng)
        noise = self._noises[rng.integers(len(self._noises))]
        start = int(rng.integers(len(noise)))
        return np.resize(np.roll(noise, -start), n_samples)


def add_noise(waveform: Waveform, noise: Waveform, snr_db: float) -> Waveform:
    """Add noise at a signal-to-noise ratio, by RMS over the whole clip.

    Args:
        waveform: (N,) float32.
        noise: (N,) float32 of any level; a silent one adds nothing.
        snr_db: level of the clip over the noise's. A clip below -60 dBFS counts as -60 dBFS.
    """
    noise_rms = _rms(noise)
    if noise_rms < _SILENT_RMS:
        return waveform
    scale = max(_rms(waveform), _QUIETEST_RMS) / noise_rms * 10 ** (-snr_db / 20)
    return waveform + noise * np.float32(scale)


def concatenate_utterances(
    clips: Sequence[tuple[Waveform, str]],
    rng: np.random.Generator,
    max_duration_s: float,
) -> tuple[Waveform, str]:
    """Join utterances into one, with a random pause between each two.

    Pauses get shorter where the whole would become too long. A clip that does not fit even so is
    left out together with its text and all that follow it; the first is always kept, whole.

    Args:
        clips: waveforms (N_i,) at 16 kHz with their texts; an empty text adds no words.
        rng: decides the pauses.
        max_duration_s: most seconds in the result.

    Returns:
        The waveform (N,) and the texts, joined by spaces.

    Raises:
        ValueError: there are no clips.

    Source: random concatenation, arXiv 2309.13963.
    """
    if not clips:
        raise ValueError("there are no utterances to join")
    spare = int(max_duration_s * SAMPLE_RATE_HZ)
    kept: list[tuple[Waveform, str]] = []
    for waveform, text in clips:
        if kept and len(waveform) > spare:
            break
        kept.append((waveform, text))
        spare -= len(waveform)
    gaps = (rng.uniform(MIN_GAP_S, MAX_GAP_S, len(kept) - 1) * SAMPLE_RATE_HZ).astype(np.int64)
    if len(gaps) and gaps.sum() > spare:
        gaps = (gaps * (spare / gaps.sum())).astype(np.int64)
    parts = [kept[0][0]]
    for gap, (waveform, _) in zip(gaps.tolist(), kept[1:], strict=True):
        parts += [np.zeros(gap, dtype=np.float32), waveform]
    return np.concatenate(parts), " ".join(text for _, text in kept if text)


def joined_duration_s(durations_s: Iterable[float]) -> float:
    """Most seconds that `concatenate_utterances` makes of clips of these durations."""
    durations_s = list(durations_s)
    return sum(durations_s) + MAX_GAP_S * max(len(durations_s) - 1, 0)


def plan_concatenation(  # noqa: PLR0913 - a plan's whole input, no state to hold it
    durations_s: Sequence[float],
    groups: Sequence[Hashable],
    *,
    probability: float,
    max_duration_s: float,
    rng: np.random.Generator,
    max_parts: int = 8,
) -> list[list[int]]:
    """Decide which utterances of an epoch are joined into one training example.

    Clips below 1.5 s (single words, digits) are joined with one another, more often than asked
    for (in 60 % of cases at least) and into strings of 2 to `max_parts`; longer ones into 2 or 3.
    An utterance for which no partner is left stays alone.

    Args:
        durations_s: (N,) seconds of each utterance.
        groups: (N,) only utterances of the same group are joined: the language, or a pair of
            language and speaker.
        probability: with which an utterance is joined with others.
        max_duration_s: most seconds of a joined example, the longest pauses included.
        rng: decides the partners and their order.
        max_parts: most utterances in an example.

    Returns:
        Lists of indices, one an example; every index is in exactly one.

    Raises:
        ValueError: lengths differ, the probability is outside 0..1, or `max_parts` below 2.
    """
    _require_share("probability", probability)
    if max_parts < 2:  # noqa: PLR2004 - one part is no concatenation
        raise ValueError(f"max_parts must be at least 2, not {max_parts}")
    if len(groups) != len(durations_s):
        raise ValueError(f"{len(durations_s)} durations but {len(groups)} groups")
    if probability == 0:
        return [[index] for index in range(len(durations_s))]
    examples: list[list[int]] = []
    open_examples: dict[Hashable, tuple[list[int], int]] = {}
    for index in rng.permutation(len(durations_s)).tolist():
        short = durations_s[index] < _SHORT_S
        if rng.random() >= (max(probability, _SHORT_PROBABILITY) if short else probability):
            examples.append([index])
            continue
        key = (groups[index], short)
        parts, wanted = open_examples.get(key, ([], 0))
        joined_s = joined_duration_s(durations_s[i] for i in [*parts, index])
        if not parts or joined_s > max_duration_s:
            if parts:
                examples.append(parts)
            most = max_parts if short else min(max_parts, _MAX_LONG_PARTS)
            parts, wanted = [], int(rng.integers(2, most + 1))
        parts.append(index)
        if len(parts) == wanted:
            examples.append(parts)
            open_examples.pop(key, None)
        else:
            open_examples[key] = (parts, wanted)
    return examples + [parts for parts, _ in open_examples.values()]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecAugmentConfig:
    """Masks on log-mel spectrograms; widths are drawn uniformly from 0 up to the given most.

    Attributes:
        frequency_masks: number of bands to mask.
        max_frequency_bins: most mel bins in a band.
        time_masks: number of stretches to mask.
        max_time_share: most of a clip's frames in a stretch, so that short clips lose little.
        max_time_frames: most frames in a stretch (10 ms each), however long the clip.
    """

    frequency_masks: int = 2
    max_frequency_bins: int = 20
    time_masks: int = 3
    max_time_share: float = 0.07
    max_time_frames: int = 30

    def __post_init__(self) -> None:
        """Refuse negative counts and shares outside 0..1.

        Raises:
            ValueError: names the field.
        """
        for name in ("frequency_masks", "max_frequency_bins", "time_masks", "max_time_frames"):
            _require_count(name, getattr(self, name))
        _require_share("max_time_share", self.max_time_share)


def spec_augment(
    log_mel: Tensor,
    frame_lens: Tensor,
    config: SpecAugmentConfig,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mask bands and stretches of spectrograms with the clip's own mean.

    Args:
        log_mel: (B, M, T) float; frames beyond a clip's length are left as they are.
        frame_lens: (B,) valid frames.
        config: number and size of the masks.
        generator: torch's default one where None. One on the CPU serves any device.

    Returns:
        (B, M, T), a new tensor.

    Source: SpecAugment, arXiv 1904.08779, without time warping; Whisper's log-mel is not
    mean-normalised, hence the mean in the place of zero.
    """
    n_clips, n_mels, n_frames = log_mel.shape
    lens = frame_lens.to(log_mel.device)
    valid = _valid(lens, n_frames)[:, None, :]  # (B, 1, T)
    bins = lens.new_full((n_clips,), n_mels)
    max_bins = bins.clamp(max=config.max_frequency_bins).float()
    bands = _span_mask(bins, max_bins, n_mels, config.frequency_masks, generator)
    max_widths = (lens * config.max_time_share).clamp(max=config.max_time_frames)
    stretches = _span_mask(lens, max_widths, n_frames, config.time_masks, generator)
    mask = (bands[:, :, None] | stretches[:, None, :]) & valid
    total = torch.where(valid, log_mel, 0).sum(dim=(1, 2))
    mean = total / (lens.clamp(min=1) * n_mels)
    return torch.where(mask, mean[:, None, None].to(log_mel.dtype), log_mel)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureAugmentConfig:
    """Variation of encoder frames, where the audio itself is out of reach (cached features).

    A Whisper encoder's dimensions differ widely in mean and spread, so that each is varied in its
    own units and what is removed becomes the clip's mean, not zero.

    Attributes:
        time_masks: number of stretches set to the clip's mean frame.
        max_time_share: most of a clip's frames in a stretch.
        max_time_frames: most frames in a stretch (20 ms each), however long the clip.
        dropout: probability with which a dimension is at its mean throughout a clip.
        noise_std: standard deviation of Gaussian noise, in those of each dimension in the clip.
    """

    time_masks: int = 2
    max_time_share: float = 0.07
    max_time_frames: int = 10
    dropout: float = 0.05
    noise_std: float = 0.07

    def __post_init__(self) -> None:
        """Refuse negative values, shares above 1 and a dropout that leaves nothing.

        Raises:
            ValueError: names the field.
        """
        _require_count("time_masks", self.time_masks)
        _require_count("max_time_frames", self.max_time_frames)
        _require_share("max_time_share", self.max_time_share)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if not (math.isfinite(self.noise_std) and self.noise_std >= 0):
            raise ValueError(f"noise_std must be at least 0, not {self.noise_std}")


def feature_augment(
    encoder_frames: Tensor,
    frame_lens: Tensor,
    config: FeatureAugmentConfig,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Add noise to encoder frames, drop dimensions of them, and mask stretches.

    Args:
        encoder_frames: (B, T, D) float; frames beyond a clip's length are left as they are.
        frame_lens: (B,) valid frames.
        config: how strongly.
        generator: torch's default one where None. One on the CPU serves any device.

    Returns:
        (B, T, D), a new tensor.
    """
    n_clips, n_frames, width = encoder_frames.shape
    lens = frame_lens.to(encoder_frames.device)
    valid = _valid(lens, n_frames)[..., None]  # (B, T, 1)
    mean, std = _clip_statistics(encoder_frames, valid, lens)
    augmented = encoder_frames
    if config.noise_std:
        noise = _draw(torch.randn, encoder_frames.shape, encoder_frames, generator)
        augmented = augmented + noise * (config.noise_std * std)
    if config.dropout:
        dice = _draw(torch.rand, (n_clips, 1, width), encoder_frames, generator)
        augmented = torch.where(dice < config.dropout, mean, augmented)
    max_widths = (lens * config.max_time_share).clamp(max=config.max_time_frames)
    stretches = _span_mask(lens, max_widths, n_frames, config.time_masks, generator)
    augmented = torch.where(stretches[..., None], mean, augmented)
    return torch.where(valid, augmented, encoder_frames)


def _clip_statistics(frames: Tensor, valid: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each dimension over a clip's frames, both (B, 1, D)."""
    counts = lens.clamp(min=1)[:, None, None]
    mean = torch.where(valid, frames.float(), 0).sum(dim=1, keepdim=True) / counts
    deviations = torch.where(valid, frames.float() - mean, 0)
    variance = deviations.square().sum(dim=1, keepdim=True) / counts
    return mean.to(frames.dtype), variance.sqrt().to(frames.dtype)


def _valid(lens: Tensor, n_frames: int) -> Tensor:
    return torch.arange(n_frames, device=lens.device) < lens[:, None]  # (B, T)


def _span_mask(
    lens: Tensor,
    max_widths: Tensor,
    size: int,
    n_masks: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Union (B, size) of `n_masks` random spans per row, each within the row's length."""
    dice = _draw(torch.rand, (2, len(lens), n_masks), max_widths, generator)
    # (B, K), whole places from 0 to the most
    widths = (dice[0] * (max_widths.floor()[:, None] + 1)).floor()
    starts = (dice[1] * (lens[:, None] - widths + 1)).floor()
    places = torch.arange(size, device=lens.device)
    spans = (places >= starts[..., None]) & (places < (starts + widths)[..., None])  # (B, K, size)
    return spans.any(dim=1)


def _draw(
    distribution: Callable[..., Tensor],
    shape: Sequence[int],
    like: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """Random numbers on `like`'s device, drawn on the generator's."""
    device = like.device if generator is None else generator.device
    drawn = distribution(tuple(shape), generator=generator, device=device)
    return drawn.to(like.device, like.dtype)


def _reverberate(waveform: Waveform, response: Waveform) -> Waveform:
    """Convolve with an impulse response, keeping length and loudness."""
    n_fft = _fast_fft_size(len(waveform) + len(response) - 1)
    spectrum = np.fft.rfft(waveform, n_fft) * np.fft.rfft(response, n_fft)
    wet = np.fft.irfft(spectrum, n_fft)[: len(waveform)].astype(np.float32)
    wet_rms = _rms(wet)
    return wet if wet_rms == 0 else wet * np.float32(_rms(waveform) / wet_rms)


def _fast_fft_size(n_samples: int) -> int:
    """Least size at or above `n_samples` that is 4 to 7 times a power of two."""
    return min(base << max(0, math.ceil(math.log2(n_samples / base))) for base in (4, 5, 6, 7))


def _coloured_noise(n_samples: int, rng: np.random.Generator) -> Waveform:
    """Noise whose power falls with frequency as 1/f^0 (white) to 1/f^2 (brown)."""
    n_fft = _fast_fft_size(n_samples)
    spectrum = np.fft.rfft(rng.standard_normal(n_fft, dtype=np.float32))
    frequencies = np.arange(1, len(spectrum) + 1, dtype=np.float32)
    spectrum *= frequencies ** np.float32(-rng.uniform(0.0, 2.0) / 2)
    return np.fft.irfft(spectrum, n_fft)[:n_samples].astype(np.float32)


def _equalise(waveform: Waveform, most_db: float, rng: np.random.Generator) -> Waveform:
    """Filter by gains drawn at points an octave apart, and between them along straight lines."""
    n_fft = _fast_fft_size(len(waveform))
    frequencies_hz = np.fft.rfftfreq(n_fft, 1 / SAMPLE_RATE_HZ)
    octaves = np.log2(np.maximum(frequencies_hz, 1.0) / _LOWEST_EQUALISED_HZ)
    points = np.arange(8)  # 62.5 Hz to 8 kHz
    gains_db = np.interp(octaves, points, rng.uniform(-most_db, most_db, len(points)))
    spectrum = np.fft.rfft(waveform, n_fft) * 10 ** (gains_db / 20)
    return np.fft.irfft(spectrum, n_fft)[: len(waveform)].astype(np.float32)


def _limit_to_telephone_band(waveform: Waveform) -> Waveform:
    narrow = soxr.resample(waveform, SAMPLE_RATE_HZ, _TELEPHONE_RATE_HZ, quality="MQ")
    wide = soxr.resample(narrow, _TELEPHONE_RATE_HZ, SAMPLE_RATE_HZ, quality="MQ")
    # The way down and up again may lose or add a sample.
    limited = np.zeros_like(waveform)
    n_samples = min(len(wide), len(limited))
    limited[:n_samples] = wide[:n_samples]
    return limited


def _rms(waveform: Waveform) -> float:
    return math.sqrt(float(np.square(waveform, dtype=np.float64).mean()))


def _require_waveform(name: str, waveform: Waveform) -> None:
    if waveform.ndim != 1 or len(waveform) == 0:
        raise ValueError(f"{name} must be one channel of samples, not {waveform.shape}")
    if not np.isfinite(waveform).all():
        raise ValueError(f"{name} holds NaN or infinite samples")


def _require_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be within 0..1, not {value}")


def _require_count(name: str, value: int) -> None:
    if value < 0:
        raise ValueError(f"{name} must be at least 0, not {value}")


def _require_range(name: str, bounds: Range) -> None:
    low, high = bounds
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"{name} must be two finite numbers in order, not {bounds}")
