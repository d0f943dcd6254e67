"""One long recording over HTTP: how long it takes, in how much memory, and whether it is all there.

    python -m benchmarks.long_recording --manifest kathleen_test.jsonl --audio-root data \
        --seconds 3600 --output benchmarks/results/hour

Recordings of a manifest are put one after the other, in random order and with pauses between, into
one FLAC file, which is posted to a server of its own. Its words are then counted sentence by
sentence, in the places that their times give them.
"""

from __future__ import annotations

import bisect
import itertools
import json
import statistics
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import jiwer
import numpy as np
import soundfile
import typer

from benchmarks.servers import plain_server
from model.data.audio import SAMPLE_RATE_HZ, load_audio
from model.data.manifest import Utterance, read_manifest

ANSWER_TIMEOUT_S = 4 * 3600.0
_PAUSES_S = (0.2, 1.2)
_WATCH_S = 1.0
_HISS = 1e-4  # of the pauses, so that none is digital silence


@dataclass(frozen=True, slots=True)
class Sentence:
    """What is said from when to when."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Completeness:
    """How a transcript's words are spread over the sentences that were said.

    Attributes:
        reference_words: that were said.
        words: of the transcript.
        wer: word error rate, without case and punctuation.
        empty: sentences in whose place no word stands.
        overfull: sentences in whose place stand more than twice their words, and two more.
    """

    reference_words: int
    words: int
    wer: float
    empty: list[str]
    overfull: list[str]


def join(utterances: list[Utterance], seconds: float) -> tuple[np.ndarray, list[Sentence]]:
    """Put recordings into one of at most `seconds` (N,) float32, each at most once."""
    rng = np.random.default_rng(0)
    pieces: list[np.ndarray] = []
    sentences: list[Sentence] = []
    n_samples = 0
    for index in rng.permutation(len(utterances)):
        clip = load_audio(utterances[index].audio)
        pause = rng.normal(0, _HISS, int(SAMPLE_RATE_HZ * rng.uniform(*_PAUSES_S)))
        end = n_samples + len(clip) + len(pause)
        if end > seconds * SAMPLE_RATE_HZ:
            break
        start_s, end_s = n_samples / SAMPLE_RATE_HZ, (n_samples + len(clip)) / SAMPLE_RATE_HZ
        sentences.append(Sentence(utterances[index].text or "", start_s, end_s))
        pieces += [clip, pause.astype(np.float32)]
        n_samples = end
    return np.concatenate(pieces), sentences


def count_words(sentences: list[Sentence], words: list[dict[str, Any]]) -> Completeness:
    """Place each word, `{"word", "start", "end"}`, in the sentence that it lies next to."""
    middles = [(a.end_s + b.start_s) / 2 for a, b in itertools.pairwise(sentences)]
    counts = [0] * len(sentences)
    for word in words:
        counts[bisect.bisect(middles, (word["start"] + word["end"]) / 2)] += 1
    said = [len(sentence.text.split()) for sentence in sentences]
    pairs = list(zip(sentences, said, counts, strict=True))
    reference = " ".join(sentence.text for sentence in sentences)
    return Completeness(
        reference_words=sum(said),
        words=len(words),
        wer=float(jiwer.wer(_plain(reference), _plain(" ".join(word["word"] for word in words)))),
        empty=[sentence.text for sentence, n, count in pairs if n and not count],
        overfull=[sentence.text for sentence, n, count in pairs if count > 2 * n + 2],
    )


def _plain(text: str) -> str:
    kept = (letter for letter in text.lower() if letter.isalnum() or letter in " '")
    return " ".join("".join(kept).split())


def resident_mb(process_id: int) -> float:
    """What a process and its children hold, MB; shared pages count in each."""
    children = Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()
    total_kib = 0
    for each in (str(process_id), *children):
        try:
            lines = Path(f"/proc/{each}/status").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total_kib += sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    return total_kib / 1000


class Watch:
    """Looks at a server's memory and health while it works."""

    def __init__(self, url: str, process_id: int) -> None:
        self.peak_mb = self.slowest_health_s = 0.0
        self._url, self._process_id = url, process_id
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=ANSWER_TIMEOUT_S) as client:
            while not self._over.wait(_WATCH_S):
                self.peak_mb = max(self.peak_mb, resident_mb(self._process_id))
                began_s = time.monotonic()
                client.get("/health/live")
                health_s = time.monotonic() - began_s
                self.slowest_health_s = max(self.slowest_health_s, health_s)


def main(
    manifest: Annotated[list[Path], typer.Option(help="Repeatable.")],
    output: Annotated[Path, typer.Option(help="Of the report, without its suffix.")],
    audio_root: Annotated[Path | None, typer.Option()] = None,
    model: Annotated[Path, typer.Option()] = Path("weights/default"),
    device: Annotated[str, typer.Option()] = "cpu",
    threads: Annotated[int, typer.Option(help="Of the engine; 0: all cores.")] = 0,
    seconds: Annotated[float, typer.Option(help="Of the recording, at most.")] = 3600.0,
) -> None:
    """Transcribe one long recording, and count."""
    utterances = [each for path in manifest for each in read_manifest(path, audio_root)]
    waveform, sentences = join([each for each in utterances if each.text], seconds)
    file = output.with_suffix(".flac")
    soundfile.write(file, waveform, SAMPLE_RATE_HZ)
    options = [
        "--cpu-threads", str(threads), "--max-upload-bytes", str(file.stat().st_size + 4096),
        "--request-timeout-s", str(ANSWER_TIMEOUT_S),
    ]  # fmt: skip
    with plain_server(model, device, options) as server:
        idle_mb = resident_mb(server.process_id)
        began_s = time.monotonic()
        with Watch(server.url, server.process_id) as watch:
            answer = httpx.post(
                f"{server.url}/transcribe",
                files={"file": file.read_bytes()},
                data={"timestamps": "word"},
                timeout=ANSWER_TIMEOUT_S,
            ).raise_for_status()
        wall_s = time.monotonic() - began_s
    segments = answer.json()["segments"]
    audio_s = len(waveform) / SAMPLE_RATE_HZ
    report = {
        "audio_s": audio_s,
        "wall_s": wall_s,
        "rtfx": audio_s / wall_s,
        "idle_mb": idle_mb,
        "peak_mb": watch.peak_mb,
        "slowest_health_s": watch.slowest_health_s,
        "sentences": len(sentences),
        "segments": len(segments),
        "median_segment_s": statistics.median(each["end"] - each["start"] for each in segments),
        "not_stopped": [each["text"] for each in segments if each["finish_reason"] != "stop"],
        **asdict(count_words(sentences, [word for each in segments for word in each["words"]])),
    }
    text = json.dumps(report, indent=2, ensure_ascii=False)
    output.with_suffix(".json").write_text(text + "\n")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
