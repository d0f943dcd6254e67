"""What can go wrong with a request, free of HTTP; `server.api.errors` maps it to statuses.

ServerError
├── RequestError                    the client's doing
│   ├── InvalidRequestError         the form is not what the endpoint takes
│   ├── LanguageUnsupportedError    one that the checkpoint does not name
│   ├── ModelUnknownError           no such model is served
│   ├── TaskUnsupportedError        something that no speech model here can do
│   ├── ApiKeyError                 no key, or a wrong one
│   ├── OriginRefusedError          a page that may not call this server
│   ├── UploadTooLargeError         more bytes than allowed
│   ├── UploadStalledError          its bytes have stopped coming
│   ├── BufferEmptyError            a live session has no audio to commit
│   └── AudioError
│       ├── AudioEmptyError         no bytes, or not one sample
│       ├── AudioUnrecognisedError  no container that we know
│       ├── AudioUnsupportedError   a codec, sample rate or channel count that we refuse
│       ├── AudioTruncatedError     the container announces more than came
│       ├── AudioUnreadableError    the decoder gave up
│       ├── AudioNotFiniteError     NaN, infinite or absurdly large samples
│       └── AudioTooLongError       more seconds than allowed
├── CapacityError                   come back later
│   ├── QueueFullError              too many requests wait already
│   ├── RateLimitedError            the client's key has used up its share
│   ├── BufferFullError             a live session's audio comes faster than it is worked on
│   ├── NotReadyError               the model is still loading, or has failed to
│   └── ShuttingDownError           the server is about to end
├── DeadlineExceededError           the answer would come too late
└── InternalError                   our doing
    ├── DecoderCrashedError         a decoding process died
    ├── DecodeTimeoutError          a decoding process took too long and was ended
    └── InferenceFailedError        the model failed on this request
"""

from __future__ import annotations


class ServerError(Exception):
    """Base of all errors a request can end with.

    Attributes:
        message: the reason, for the client's eyes.
        param: the form field at fault, if it is one.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        """Give the reason, and the form field it lies in."""
        super().__init__(message)
        self.message = message
        self.param = param


class RequestError(ServerError):
    """The client's doing; sending the same again fails again."""


class InvalidRequestError(RequestError):
    """The form is not what the endpoint takes."""


class LanguageUnsupportedError(RequestError):
    """The checkpoint names its languages, and this is none of them."""


class ModelUnknownError(RequestError):
    """No model of that name is served."""


class TaskUnsupportedError(RequestError):
    """The endpoint exists for its answer only: no checkpoint here can do this."""


class ApiKeyError(RequestError):
    """The request has no key, or a wrong one."""


class OriginRefusedError(RequestError):
    """A browser's page that may not call this server."""


class UploadTooLargeError(RequestError):
    """The upload has more bytes than allowed."""


class UploadStalledError(RequestError):
    """The upload's bytes have stopped coming."""


class BufferEmptyError(RequestError):
    """A live session has no audio, or next to none, to commit."""


class AudioError(RequestError):
    """The upload is no audio that can be transcribed."""

    def __init__(self, message: str, *, param: str | None = "file") -> None:
        """Give the reason; it lies in the file."""
        super().__init__(message, param=param)


class AudioEmptyError(AudioError):
    """No bytes, or not one sample."""


class AudioUnrecognisedError(AudioError):
    """No container that we know."""


class AudioUnsupportedError(AudioError):
    """A codec, sample rate or channel count that we refuse."""


class AudioTruncatedError(AudioError):
    """The container announces more than came."""


class AudioUnreadableError(AudioError):
    """The decoder gave up."""


class AudioNotFiniteError(AudioError):
    """NaN, infinite or absurdly large samples."""


class AudioTooLongError(AudioError):
    """More seconds than allowed."""


class CapacityError(ServerError):
    """The server cannot take the request now.

    Attributes:
        retry_after_s: when to come back, in seconds; None where nobody knows.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        """Give the reason, and when to come back."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFullError(CapacityError):
    """Too many requests wait already."""


class RateLimitedError(CapacityError):
    """The client's key has used up its share."""


class BufferFullError(CapacityError):
    """A live session's audio comes faster than it is worked on."""


class NotReadyError(CapacityError):
    """The model is still loading, or has failed to."""


class ShuttingDownError(CapacityError):
    """The server is about to end."""


class DeadlineExceededError(ServerError):
    """The answer would come too late."""


class InternalError(ServerError):
    """Our doing."""


class DecoderCrashedError(InternalError):
    """A decoding process died."""


class DecodeTimeoutError(InternalError):
    """A decoding process took too long and was ended."""


class InferenceFailedError(InternalError):
    """The model failed on this request."""
