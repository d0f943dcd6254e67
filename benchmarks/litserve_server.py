"""LitServe's dynamic batching over batched `generate`: what people build next.

python -m benchmarks.litserve_server --model weights/default --port 8001
"""

import io
from pathlib import Path
from typing import Annotated, Any

import litserve
import numpy as np
import soundfile
import typer
from fastapi import Request
from numpy.typing import NDArray

from model.transcription import Transcriber
from server.engine.runner import use_cpu_threads

MAX_BATCH_SIZE = 32
BATCH_TIMEOUT_S = 0.05  # for a batch to fill; more would only add latency to these clips
REQUEST_TIMEOUT_S = 600.0


class SpeechAPI(litserve.LitAPI):
    """Batched `generate` over what waits. Pickled into LitServe's worker process."""

    def __init__(self, model: Path, device: str, dtype: str, threads: int) -> None:
        """Prepare; `setup` loads."""
        super().__init__(
            max_batch_size=MAX_BATCH_SIZE, batch_timeout=BATCH_TIMEOUT_S, api_path="/transcribe"
        )
        self._model, self._place, self._threads = model, (device, dtype), threads

    def setup(self, _device: str) -> None:
        """Load, in the worker."""
        use_cpu_threads(self._threads)
        self._transcriber = Transcriber.from_pretrained(self._model, *self._place)

    def decode_request(self, request: Request) -> NDArray[np.float32]:
        """Read the upload. LitServe wants this annotation, and hands over the request's form."""
        form: Any = request
        wav = io.BytesIO(form["file"].file.read())
        waveform: NDArray[np.float32] = soundfile.read(wav, dtype="float32")[0]
        return waveform

    def batch(self, inputs: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Leave the clips apart; the processor pads them."""
        return inputs

    def predict(self, inputs: list[NDArray[np.float32]]) -> list[str]:
        """Transcribe a batch."""
        return [each.text for each in self._transcriber.transcribe(inputs).transcripts]

    def unbatch(self, output: list[str]) -> list[str]:
        """One text a clip."""
        return output

    def encode_response(self, output: str) -> dict[str, str]:
        """Answer like the others."""
        return {"text": output}


def main(
    model: Annotated[Path, typer.Option()],
    port: Annotated[int, typer.Option()],
    device: Annotated[str, typer.Option()] = "auto",
    dtype: Annotated[str, typer.Option()] = "auto",
    threads: Annotated[int, typer.Option(help="0: all cores.")] = 0,
) -> None:
    """Serve."""
    # LitServe would place the model by itself; `setup` does.
    server = litserve.LitServer(
        SpeechAPI(model, device, dtype, threads), accelerator="cpu", timeout=REQUEST_TIMEOUT_S
    )
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    typer.run(main)
