"""What one process trains and saves, another one loads and transcribes with."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from model.checkpoint import load_model, load_processor, save_model

TEXTS = ["zero one", "Өнөөдөр хүйтэн байна."]

TRANSCRIBE = """
import sys
import numpy as np
from model.transcription import Transcriber

clips = list(np.load(sys.argv[2]).values())
batch = Transcriber.from_pretrained(sys.argv[1], device="cpu").transcribe(clips)
for transcript in batch.transcripts:
    print(transcript.finish_reason, transcript.language, transcript.text)
"""


def test_a_trained_checkpoint_answers_the_same_in_another_process(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    clips = [(0.1 * rng.standard_normal(n)).astype(np.float32) for n in (40_000, 90_000)]
    model, processor = load_model(tiny_checkpoint), load_processor(tiny_checkpoint)
    model.config.max_tokens_per_audio_s = 30.0
    torch.manual_seed(0)
    batch = processor(clips, TEXTS)
    optimiser = torch.optim.AdamW(model.train().parameters(), lr=4e-3)
    for _ in range(100):
        loss = model(**batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if loss < 0.01:
            break
    save_model(model.eval(), tmp_path / "trained", processor=processor, dtype=torch.float16)
    np.savez(tmp_path / "clips.npz", *clips)
    done = subprocess.run(
        [
            sys.executable, "-W", "error", "-c", TRANSCRIBE,
            str(tmp_path / "trained"), str(tmp_path / "clips.npz"),
        ],
        capture_output=True, text=True, timeout=300, check=False,
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"stop en {TEXTS[0]}", f"stop mn {TEXTS[1]}"]
    assert done.stderr == ""  # no progress bars, no load reports
