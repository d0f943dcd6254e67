"""The fields that the endpoints take, from texts to options.

The models here also describe the fields in the OpenAPI document, so that what is said of them is
what holds.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from server.engine.decoding import MAX_BEAMS, Decoding
from server.errors import InvalidRequestError, LanguageUnsupportedError
from server.options import TranscribeOptions
from server.transcription import Timestamps

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from server.engine.interface import Capabilities

MAX_PROMPT_CHARACTERS = 1000
MAX_HOTWORDS = 100
MAX_HOTWORD_CHARACTERS = 50
_LANGUAGE_PATTERN = "^[a-z]{2,3}$"
_MAX_DEADLINE_MS = 24 * 3600 * 1000
_VAD_FIELDS = ("threshold", "prefix_padding_ms", "silence_duration_ms")

OpenAIFormat = Literal["json", "text", "srt", "verbose_json", "vtt"]
ResponseFormat = Literal["json", "verbose_json", "text", "srt", "vtt", "tsv"]

_Form = TypeVar("_Form", bound=BaseModel)


def _present(value: str) -> str:
    if not value.strip():
        raise ValueError("it is empty")
    return value


_Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS), BeforeValidator(_present)]


def _language_code(value: str) -> str:
    if not re.fullmatch(_LANGUAGE_PATTERN, value):
        raise ValueError(f"a language is named by its ISO 639-1 code, such as en; got {value!r}")
    return value


_Language = Annotated[
    str, AfterValidator(_language_code), Field(json_schema_extra={"pattern": _LANGUAGE_PATTERN})
]


class TranscribeForm(BaseModel):
    """Fields of `POST /transcribe` besides the recordings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    language: _Language | None = Field(
        None,
        description="ISO 639-1 code of what is spoken; one that the checkpoint does not name is "
        "refused.",
        examples=["en"],
    )
    prompt: _Prompt | None = Field(
        None,
        description="What to ask the model, in place of the prompt that it was trained with; one "
        "that was trained without is asked nothing.",
        examples=["Transcribe the speech."],
    )
    hotwords: str | None = Field(
        None,
        description="Words that are likely to be said, between commas or line ends: at most "
        f"{MAX_HOTWORDS} of at most {MAX_HOTWORD_CHARACTERS} characters. Those that sound like "
        "something in the recording are put before the audio. For checkpoints trained so.",
        examples=["Ulaanbaatar, Sükhbaatar"],
    )
    previous_text: str | None = Field(
        None,
        max_length=MAX_PROMPT_CHARACTERS,
        description="What was said just before the recording; of a long one only its end is read. "
        "For checkpoints trained so.",
        examples=["We were talking about Ulaanbaatar."],
    )
    condition_on_previous_text: bool = Field(
        False,
        description="Let the model read what it has said of the piece of a long recording before; "
        "pieces are then transcribed one after the other. For checkpoints trained so.",
        examples=[False],
    )
    response_format: ResponseFormat = Field(
        "json", description="What to answer with.", examples=["json"]
    )
    timestamps: Timestamps | None = Field(
        None,
        description="How finely to place the text in time. Unless said: `word` for srt, vtt and "
        "tsv, whose lines then end between words; `segment` for verbose_json; else `none`.",
        examples=["word"],
    )
    temperature: float = Field(
        0.0,
        ge=0.0,
        le=2.0,
        description="Of sampling; 0 takes the likeliest token, and the same each time.",
        examples=[0.0],
    )
    num_beams: int | None = Field(
        None,
        ge=1,
        le=MAX_BEAMS,
        description="Of beam search; 1 for none. Unless said, the server's; none for a stream, and "
        "when sampling.",
        examples=[1],
    )
    n_best: int = Field(
        1,
        ge=1,
        le=MAX_BEAMS,
        description="How many answers of the beam search to return (json); the search has as many "
        "beams at least, if num_beams is not given.",
        examples=[1],
    )
    logprobs: bool = Field(
        False, description="Also return each token's log-probability (json).", examples=[False]
    )
    stream: bool = Field(
        False,
        description="Answer with server-sent events, as text comes; for a long recording also "
        "`transcript.progress`, as its pieces are done.",
        examples=[False],
    )
    progress: bool = Field(
        False,
        description="Answer with server-sent events: for a long recording `transcript.progress`, "
        "as its pieces are done, and last `transcript.done`, whose `body` is the answer as it "
        "would have come without them.",
        examples=[False],
    )
    deadline_ms: int | None = Field(
        None,
        ge=1,
        le=_MAX_DEADLINE_MS,
        description="From the upload's end until the answer is no longer wanted; it is then 504.",
        examples=[30_000],
    )
    vad: bool = Field(
        True, description="Leave out what is no speech before the model hears it.", examples=[True]
    )

    def options(self, capabilities: Capabilities) -> TranscribeOptions:
        """Return what is asked for.

        Args:
            capabilities: of the checkpoint.

        Raises:
            RequestError: a value that cannot be, or two that cannot be together.
        """
        check_languages([self.language] if self.language else [], capabilities.languages)
        if self.stream and self.response_format != "json":
            raise _streams_json_only()
        if self.stream and self.progress:
            raise InvalidRequestError("stream tells the progress already", param="progress")
        if self.logprobs and self.response_format != "json":
            raise InvalidRequestError("logprobs go with response_format json", param="logprobs")
        if self.n_best > 1 and self.response_format != "json":
            raise InvalidRequestError("n_best goes with response_format json", param="n_best")
        by_format = {"srt": "word", "vtt": "word", "tsv": "word", "verbose_json": "segment"}
        timestamps: Any = self.timestamps or by_format.get(self.response_format, "none")
        if timestamps == "none" and self.response_format in by_format:
            timestamps = "segment"  # these formats cannot do without
        return TranscribeOptions(
            language=self.language,
            prompt=self.prompt,
            previous_text=self.previous_text or "",
            hotwords=split_hotwords((self.hotwords or "").replace("\n", ",").split(",")),
            condition_on_previous_text=self.condition_on_previous_text,
            timestamps=timestamps,
            decoding=Decoding(
                temperature=self.temperature,
                num_beams=self.num_beams or max(self.n_best, _usual_beams(self, capabilities)),
                n_best=self.n_best,
                # verbose_json tells the mean of them.
                logprobs=self.logprobs or self.response_format == "verbose_json",
            ),
            vad=self.vad,
            deadline_s=None if self.deadline_ms is None else self.deadline_ms / 1000,
        )


class OpenAIForm(BaseModel):
    """Fields of `POST /v1/audio/transcriptions` besides the recording."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(
        None,
        description="A name that `GET /v1/models` lists, or `whisper-1`.",
        examples=["whisper-1"],
    )
    language: str | None = Field(
        None,
        description="ISO 639-1 code of what is spoken; one that the checkpoint does not name is "
        "refused.",
        examples=["en"],
    )
    languages: list[str] | None = Field(
        None,
        alias="languages[]",
        description="What may be spoken. One works as `language` does; of several, each has to be "
        "one that the checkpoint names, and it decides by itself.",
        examples=[["en", "mn"]],
    )
    prompt: str | None = Field(
        None,
        max_length=MAX_PROMPT_CHARACTERS,
        description="What was said before, for checkpoints trained to read that (what does not fit "
        "is cut off at its beginning); for others what to ask the model, in place of the prompt "
        "that they were trained with.",
        examples=["We were talking about Ulaanbaatar."],
    )
    keywords: list[str] | None = Field(
        None,
        alias="keywords[]",
        description="Words that are likely to be said; for checkpoints trained with such lists.",
        examples=[["Ulaanbaatar", "Sükhbaatar"]],
    )
    response_format: OpenAIFormat = Field(
        "json", description="What to answer with.", examples=["verbose_json"]
    )
    temperature: float = Field(
        0.0, ge=0.0, le=1.0, description="Of sampling; 0 for none.", examples=[0.0]
    )
    timestamp_granularities: list[Literal["word", "segment"]] | None = Field(
        None,
        alias="timestamp_granularities[]",
        description="What verbose_json lists; segments unless said.",
        examples=[["word", "segment"]],
    )
    include: list[Literal["logprobs"]] | None = Field(
        None,
        alias="include[]",
        description="`logprobs`: each token's log-probability, with response_format json.",
        examples=[["logprobs"]],
    )
    chunking_strategy: str | None = Field(
        None,
        description='`auto`, or {"type": "server_vad"} as JSON or as fields '
        "`chunking_strategy[type]`. Its numbers are checked, and the server's own hold.",
        examples=["auto"],
    )
    stream: bool = Field(
        False, description="Answer with server-sent events, as text comes.", examples=[False]
    )

    @property
    def words(self) -> bool:
        """Whether verbose_json lists words."""
        return "word" in (self.timestamp_granularities or ())

    @property
    def segments(self) -> bool:
        """Whether verbose_json lists segments."""
        return "segment" in (self.timestamp_granularities or ("segment",))

    @property
    def logprobs(self) -> bool:
        """Whether json lists log-probabilities."""
        return bool(self.include)

    def options(self, capabilities: Capabilities) -> TranscribeOptions:
        """Return what is asked for.

        Args:
            capabilities: of the checkpoint.

        Raises:
            RequestError: a value that cannot be, or two that cannot be together.
        """
        asked = [each for each in [self.language, *(self.languages or ())] if each]
        check_languages(asked, capabilities.languages)
        if self.stream and self.response_format != "json":
            raise _streams_json_only()
        if self.logprobs and self.response_format != "json":
            raise InvalidRequestError("logprobs go with response_format json", param="include")
        if self.timestamp_granularities and self.response_format != "verbose_json":
            raise InvalidRequestError(
                "timestamp_granularities go with response_format verbose_json",
                param="timestamp_granularities",
            )
        check_chunking(self.chunking_strategy)
        timestamps: Timestamps = "none"
        if self.words or self.response_format in {"srt", "vtt"}:
            timestamps = "word"
        elif self.response_format == "verbose_json":
            timestamps = "segment"
        prompt = self.prompt if (self.prompt or "").strip() else None
        continues = "previous_text" in capabilities.context_templates
        return TranscribeOptions(
            language=asked[0] if len(asked) == 1 else None,
            prompt=None if continues else prompt,
            previous_text=(prompt or "") if continues else "",
            hotwords=split_hotwords(self.keywords or ()),
            timestamps=timestamps,
            decoding=Decoding(
                temperature=self.temperature,
                num_beams=_usual_beams(self, capabilities),
                logprobs=self.logprobs or self.response_format == "verbose_json",
            ),
        )


def parse_form(form: type[_Form], fields: Iterable[tuple[str, str]]) -> _Form:
    """Check fields against a model of them.

    Raises:
        InvalidRequestError: names the field: unknown, twice, or of a value that it cannot have.
    """
    lists = {field.alias: name for name, field in form.model_fields.items() if field.alias}
    values: dict[str, Any] = {}
    for name, value in fields:
        repeated = name if name in lists else f"{name}[]"
        if repeated in lists:
            values.setdefault(repeated, []).append(value)
        elif name in values:
            raise InvalidRequestError(f"the field {name!r} came twice", param=name)
        else:
            values[name] = value
    try:
        return form.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        param = str(fault["loc"][0]).removesuffix("[]")
        if fault["type"] == "extra_forbidden":
            known = ", ".join(["file", *form.model_fields])
            message = f"unknown field {param!r}; this endpoint takes {known}"
        else:
            message = f"the field {param!r}: {fault['msg'].removeprefix('Value error, ')}"
        raise InvalidRequestError(message, param=param) from error


def check_languages(asked: Iterable[str], languages: Sequence[str]) -> None:
    """Raise LanguageUnsupportedError for one that the checkpoint does not name."""
    for language in asked:
        if languages and language not in languages:
            raise LanguageUnsupportedError(
                f"the language {language!r} is none of this checkpoint's: {', '.join(languages)}",
                param="language",
            )


def split_hotwords(words: Iterable[str]) -> tuple[str, ...]:
    """Return each word once, without surrounding space.

    Raises:
        InvalidRequestError: there are too many, or one is too long or not printable.
    """
    unique = tuple(dict.fromkeys(word.strip() for word in words if word.strip()))
    if len(unique) > MAX_HOTWORDS:
        raise InvalidRequestError(f"more than {MAX_HOTWORDS} hotwords", param="hotwords")
    for word in unique:
        if len(word) > MAX_HOTWORD_CHARACTERS or not word.isprintable():
            raise InvalidRequestError(
                f"a hotword has at most {MAX_HOTWORD_CHARACTERS} characters, all printable: "
                f"{word[:MAX_HOTWORD_CHARACTERS]!r}",
                param="hotwords",
            )
    return unique


def fold_chunking(fields: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Gather `chunking_strategy[type]` and its like, as the SDK sends an object, into one JSON."""
    parts: dict[str, str] = {}
    rest = []
    for name, value in fields:
        if name.startswith("chunking_strategy[") and name.endswith("]"):
            parts[name.removeprefix("chunking_strategy[").removesuffix("]")] = value
        else:
            rest.append((name, value))
    return [*rest, ("chunking_strategy", json.dumps(parts))] if parts else rest


def check_chunking(strategy: str | None) -> None:
    """Raise InvalidRequestError for what is neither `auto` nor a description of a server VAD."""
    if not strategy or strategy == "auto":
        return
    try:
        config = json.loads(strategy)
        is_known = isinstance(config, dict) and set(config) <= {"type", *_VAD_FIELDS}
        is_right = is_known and config.get("type") == "server_vad"
        numbers = [float(config[name]) for name in _VAD_FIELDS if name in config]
    except (ValueError, TypeError, OverflowError, RecursionError):
        is_right, numbers = False, []
    if not is_right or any(not number >= 0 for number in numbers):
        raise InvalidRequestError(
            'chunking_strategy is auto or {"type": "server_vad"}, with '
            f"{', '.join(_VAD_FIELDS)} if need be",
            param="chunking_strategy",
        )


def _usual_beams(form: TranscribeForm | OpenAIForm, capabilities: Capabilities) -> int:
    """Beams of a request that does not say; neither a stream nor sampling goes with a search."""
    return 1 if form.stream or form.temperature > 0 else capabilities.num_beams


def _streams_json_only() -> InvalidRequestError:
    return InvalidRequestError("stream goes with response_format json", param="stream")
