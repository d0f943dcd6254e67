"""Our server against what people build instead, on the same clips, in turns.

    python -m benchmarks.suite --shapes default,0.5b --output benchmarks/results/suite

In every round each way transcribes all clips, so that the machine's drift hits all of them. The
servers are processes of their own, asked over real sockets; the rest runs in this process, while
they are idle. A random shape says as many tokens of each second of audio as `--rates` tells. With
as many clips as clients there is one wave only, and filling and emptying the server weigh as much
as what it does in between: take three times as many, or more.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from matplotlib.figure import Figure

from benchmarks.load import (
    Measurement,
    make_clips,
    percentile_ms,
    read_recordings,
    run_clients,
    watch_health,
)
from benchmarks.offline import (
    convert_whisper,
    missing_faster_whisper,
    run_engine,
    run_faster_whisper,
    run_generate,
)
from benchmarks.report import markdown_table, write_report
from benchmarks.servers import Peer, missing, our_server, peer_server
from benchmarks.shapes import Shape, make_checkpoint, make_whisper
from model.transcription import Transcriber
from server.engine.runner import SpeechRunner, use_cpu_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.load import Clip

MAX_BATCH_SIZE = 32  # of everything that batches
OURS = "server"
OFFLINE_ENGINE = "engine, offline"
OFFLINE_GENERATE = f"generate, batches of {MAX_BATCH_SIZE}, offline"
FASTER_WHISPER = "faster-whisper, offline"
WHISPER_TOKENS_PER_AUDIO_S = 3.0  # beside the default checkpoint: English
HEADINGS = (
    "", "RTFx", "ours / this", "p50 ms", "p95 ms", "p99 ms", "health p99 ms", "errors",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Options:
    """Of the whole suite."""

    clients: tuple[int, ...]
    rounds: int
    device: str
    dtype: str
    threads: int


@dataclass(slots=True)
class Scenario:
    """A model, and how many tokens it says; what was measured with it."""

    shape: Shape
    tokens_per_audio_s: float | None
    measurements: dict[tuple[str, int], Measurement] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Names it."""
        rate = self.tokens_per_audio_s
        return self.shape if rate is None else f"{self.shape}, {rate:g} tokens an audio second"

    def of(self, way: str, clients: int) -> Measurement:
        """The measurement of a way with so many clients; 0 for those without a server."""
        name = f"{way}, {clients} client{'s' * (clients > 1)}" if clients else way
        return self.measurements.setdefault((way, clients), Measurement(name))


def run_scenario(scenario: Scenario, clips: Sequence[Clip], options: Options) -> None:
    """Start everything, warm it up, and measure in turns."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rate = scenario.tokens_per_audio_s or 0.0
        model = make_checkpoint(scenario.shape, folder / "model", rate)
        place = (options.device, options.dtype, options.threads)
        urls = {OURS: stack.enter_context(our_server(model, *place)).url}
        for peer in get_args(Peer):
            if (reason := missing(peer)) is not None:
                scenario.left_out[peer] = reason
                continue
            urls[peer] = stack.enter_context(peer_server(peer, model, *place)).url
        offline = _offline(scenario, model, folder, options)
        for url in urls.values():
            run_clients(url, clips[:2], 1, Measurement("warm-up"))
        for run in offline.values():
            run(clips[:2], Measurement("warm-up"))
        for _ in range(options.rounds):
            _run_round(scenario, clips, options, urls, offline)


def _offline(
    scenario: Scenario, model: Path, folder: Path, options: Options
) -> dict[str, Callable[[Sequence[Clip], Measurement], None]]:
    """What runs without a server, by name."""
    served, transcriber = (  # the engine may pack the weights of its own
        Transcriber.from_pretrained(model, options.device, options.dtype) for _ in range(2)
    )
    runner = SpeechRunner(served, max_slots=MAX_BATCH_SIZE)
    ways: dict[str, Callable[[Sequence[Clip], Measurement], None]] = {
        OFFLINE_ENGINE: lambda clips, to: run_engine(runner, clips, to),
        OFFLINE_GENERATE: lambda clips, to: run_generate(transcriber, clips, MAX_BATCH_SIZE, to),
    }
    reason = missing_faster_whisper()
    if reason is not None:
        scenario.left_out[FASTER_WHISPER] = reason
        return ways
    make_whisper(folder / "whisper")
    whisper = convert_whisper(
        folder / "whisper", folder / "ctranslate2", options.dtype, options.threads
    )
    rate = scenario.tokens_per_audio_s or WHISPER_TOKENS_PER_AUDIO_S
    ways[FASTER_WHISPER] = lambda clips, to: run_faster_whisper(whisper, clips, to, rate)
    return ways


def _run_round(
    scenario: Scenario,
    clips: Sequence[Clip],
    options: Options,
    urls: dict[str, str],
    offline: dict[str, Callable[[Sequence[Clip], Measurement], None]],
) -> None:
    for clients in options.clients:
        for way, url in urls.items():
            measurement = scenario.of(way, clients)
            if way == OURS:
                with watch_health(url, measurement.health_s):
                    run_clients(url, clips, clients, measurement)
            else:
                run_clients(url, clips, clients, measurement)
    for way, run in offline.items():
        run(clips, scenario.of(way, 0))


def tabulate(scenario: Scenario) -> str:
    """Everything measured, each with what our server reaches over it.

    A way with clients is compared with our server under as many; one without, with our best.
    """
    ours = {n: each for (way, n), each in scenario.measurements.items() if way == OURS}
    best = max(each.rtfx for each in ours.values())
    rows = []
    for (way, clients), each in scenario.measurements.items():
        reference = ours[clients].rtfx if way != OURS and clients else best
        rows.append(
            [
                each.name,
                f"{each.rtfx:.1f}",
                "" if way == OURS or not each.rtfx else f"{reference / each.rtfx:.2f}",
                *(f"{each.percentile_ms(percent):.0f}" for percent in (50, 95, 99)),
                f"{percentile_ms(each.health_s, 99):.1f}" if each.health_s else "",
                each.errors,
            ]
        )
    left_out = [f"\nLeft out: {way}: {reason}." for way, reason in scenario.left_out.items()]
    return f"### {scenario.title}\n\n{markdown_table(HEADINGS, rows)}\n" + "".join(left_out)


def plot(scenarios: Sequence[Scenario]) -> Figure:
    """RTFx over the number of clients, one panel a scenario; dashed without a server."""
    figure = Figure(figsize=(5 * len(scenarios), 4.2), layout="constrained")
    panels = figure.subplots(1, len(scenarios), squeeze=False)[0]
    for axes, scenario in zip(panels, scenarios, strict=True):
        for way in dict.fromkeys(way for way, _ in scenario.measurements):
            points = {n: m.rtfx for (w, n), m in scenario.measurements.items() if w == way}
            look = {"label": way, "color": f"C{len(axes.lines)}"}
            if 0 in points:
                axes.axhline(points[0], linestyle="--", **look)
            else:
                axes.plot(list(points), list(points.values()), "o-", **look)
        axes.set(title=scenario.title, xlabel="clients", ylabel="RTFx", ylim=(0, None))
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    return figure


def _scenarios(shapes: str, rates: str) -> list[Scenario]:
    names = shapes.split(",")
    unknown = sorted(set(names) - set(get_args(Shape)))
    if unknown:
        sys.exit(f"error: unknown shape {', '.join(unknown)}; there are {get_args(Shape)}")
    scenarios = []
    for name in names:
        # The default checkpoint was trained to end where the speech does.
        counts = [None] if name == "default" else [float(rate) for rate in rates.split(",")]
        scenarios += [Scenario(name, count) for count in counts]  # type: ignore[arg-type]  # names are checked before
    return scenarios


def main(
    shapes: Annotated[str, typer.Option(help="default, small, 0.5b.")] = "default,0.5b",
    rates: Annotated[str, typer.Option(help="Tokens an audio second, random shapes.")] = "3,8",
    clients: Annotated[str, typer.Option(help="Numbers of clients.")] = "1,4,16,32",
    clips: Annotated[int, typer.Option(min=2, max=2000, help="Several times the clients.")] = 96,
    shortest_s: Annotated[float, typer.Option(min=0.1, max=30)] = 1.0,
    longest_s: Annotated[float, typer.Option(min=0.1, max=30)] = 20.0,
    rounds: Annotated[int, typer.Option(min=1, max=20)] = 3,
    manifest: Annotated[Path | None, typer.Option(help="Recordings to join.")] = None,
    audio_root: Annotated[Path | None, typer.Option()] = None,
    device: Annotated[str, typer.Option()] = "auto",
    dtype: Annotated[str, typer.Option()] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="0: all cores.")] = 0,
    output: Annotated[Path, typer.Option(help="Without suffix.")] = Path(
        "benchmarks/results/suite"
    ),
) -> None:
    """Compare our server with others and with offline transcription."""
    use_cpu_threads(threads)
    counts = tuple(int(count) for count in clients.split(","))
    options = Options(counts, rounds, device, dtype, threads)
    recordings = read_recordings(manifest, audio_root)
    posted = make_clips(recordings, clips, shortest_s=shortest_s, longest_s=longest_s)
    scenarios = _scenarios(shapes, rates)
    for scenario in scenarios:
        run_scenario(scenario, posted, options)
        print(tabulate(scenario), flush=True)  # noqa: T201 - the command's answer
    data: dict[str, object] = {
        "clips": len(posted),
        "audio_s": sum(clip.audio_s for clip in posted),
        "rounds": rounds,
        "device": device,
        "dtype": dtype,
        "scenarios": {
            scenario.title: {
                "left_out": scenario.left_out,
                "measurements": [
                    {**asdict(each), "rtfx": each.rtfx} for each in scenario.measurements.values()
                ],
            }
            for scenario in scenarios
        },
    }
    text = "\n\n".join(["## Servers", *map(tabulate, scenarios)])
    write_report(output, data, text, plot(scenarios))
    if any(each.errors for scenario in scenarios for each in scenario.measurements.values()):
        sys.exit("error: some requests failed")


if __name__ == "__main__":
    typer.run(main)
