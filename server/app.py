"""The application factory."""

from __future__ import annotations

import contextlib
import gc
from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from server.api import docs, health, openai, realtime, transcribe, web
from server.api.errors import install_error_handlers
from server.api.health import version
from server.api.middleware import RequestMiddleware
from server.engine.admission import Admission
from server.engine.continuous import ContinuousEngine
from server.engine.interface import Guards
from server.engine.scheduler import ScheduleLimits
from server.metrics import Metrics
from server.preflight import check_model_settings
from server.runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from server.board import Seat
    from server.engine.interface import Engine, Runner
    from server.runtime import Shared
    from server.settings import Settings


def create_app(
    settings: Settings,
    engine: Engine | None = None,
    *,
    shared: Shared | None = None,
    on_failure: Callable[[], None] = lambda: None,
) -> FastAPI:
    """Build the server's application; its lifespan loads, warms up and drains.

    Args:
        settings: the server's options.
        engine: used in place of the one that the settings describe.
        shared: what it has in common with other processes, if there are any.
        on_failure: called when the model cannot be loaded or has died for good, to end the process.

    Raises:
        SettingError: an API key is malformed, or the file of API keys cannot be read; without an
            engine, also if there is no such checkpoint or device.
    """
    metrics = shared.metrics if shared else Metrics()
    if engine is None:
        check_model_settings(settings)
        engine = build_engine(settings, metrics)
    runtime = Runtime(settings, engine, metrics, shared=shared, on_failure=on_failure)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        runtime.start()
        try:
            yield
        finally:
            await runtime.stop()

    app = FastAPI(
        title="speechllm",
        description="Speech to text with a speech LLM.",
        version=version(),
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load their viewers from elsewhere
        redoc_url=None,
    )
    app.state.runtime = runtime
    app.add_middleware(RequestMiddleware)
    if settings.origins:
        # Outermost, so that a page may read refusals, and preflights need no key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # the OpenAI SDK sends a dozen of its own
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    install_error_handlers(app)
    app.include_router(transcribe.router)
    app.include_router(openai.router)
    app.include_router(realtime.router)
    app.include_router(health.router)
    app.include_router(web.router)
    app.include_router(docs.router)
    return app


def build_engine(settings: Settings, metrics: Metrics) -> ContinuousEngine:
    """Make the engine that the settings describe, not started."""
    limits = ScheduleLimits(
        max_batch_size=settings.max_batch_size,
        max_wait_s=settings.max_wait_ms / 1000,
        preferred_batch_sizes=settings.preferred_sizes,
        max_batch_audio_s=settings.max_batch_audio_s or None,
    )
    return ContinuousEngine(
        partial(_load_runner, settings),
        limits,
        make_admission(settings),
        guards=Guards(loops=settings.loop_guard, silence=settings.silence_gate),
        on_iteration=metrics.iterated,
    )


def make_admission(settings: Settings, seat: Seat | None = None) -> Admission:
    """Make what bounds the engine's queue; with a seat, that of several processes together."""
    return Admission(
        max_requests=settings.max_queue_size,
        max_audio_s=settings.max_queue_audio_s,
        requests=seat.tally("requests") if seat else None,
        audio_s=seat.tally("audio_s") if seat else None,
    )


def _load_runner(settings: Settings) -> Runner:
    # Importing torch takes seconds; in the device's thread it delays no health check.
    from server.engine.runner import SpeechRunner, use_cpu_threads  # noqa: PLC0415 - see above

    use_cpu_threads(settings.cpu_threads)
    if gc.get_freeze_count():  # of a runner that has died
        gc.unfreeze()
        gc.collect()
    runner = SpeechRunner.load(
        settings.model,
        settings.device,
        settings.dtype,
        max_slots=settings.max_batch_size,
        kv_cache_bytes=settings.kv_cache_mib << 20 or None,
        cuda_graphs=settings.cuda_graphs,
        num_beams=settings.num_beams or None,
    )
    # All of it stays. Each search for garbage among what torch and transformers have made would
    # stop every thread, the event loop's too, for a third of a second.
    gc.collect()
    gc.freeze()
    return runner
