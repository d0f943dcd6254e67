"""Requests made up from the OpenAPI document, against a real server: no 5xx, all as described."""

from collections import Counter

import pytest
import schemathesis

# Now, not within the first fixture: where pytest rewrites it that deep in calls, Python 3.11 may
# end in "AST constructor recursion depth mismatch" (CPython's issue 106905).
import schemathesis.specs.openapi.schemas
from hypothesis import HealthCheck, Phase, assume, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.recordings import encode, speechlike

TIMEOUT_S = 180
CLIP = encode(speechlike(0.3))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
WITH_INPUT = [
    ("POST", "/transcribe"),
    ("POST", "/v1/audio/transcriptions"),
    ("GET", "/v1/models/{model}"),
]
OPERATIONS = [
    *WITH_INPUT,
    ("POST", "/v1/audio/translations"),
    ("GET", "/v1/models"),
    ("GET", "/health/live"),
    ("GET", "/health/ready"),
    ("GET", "/metrics"),
    ("GET", "/"),
]
BOUNDED = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,  # the suite says the same each time
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def api(open_server):
    _, client = open_server
    return schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")


def test_every_operation_is_tried(api):
    described = {
        (method.upper(), path) for path, methods in api.raw_schema["paths"].items()
        for method in methods
    }  # fmt: skip
    assert described == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_what_the_document_allows_is_answered_as_it_says(api, method, path):
    operation = api[path][method]

    @BOUNDED
    @given(case=operation.as_strategy())
    def check(case):
        case.call_and_validate(checks=CHECKS, timeout=TIMEOUT_S)

    check()


@pytest.mark.parametrize(("method", "path"), WITH_INPUT)
def test_what_it_does_not_allow_is_refused_as_it_says(api, method, path):
    operation = api[path][method]

    @BOUNDED
    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
    def check(case):
        case.call_and_validate(checks=CHECKS, timeout=TIMEOUT_S)

    check()


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/transcribe", "application/octet-stream"),
        ("/v1/audio/transcriptions", "multipart/form-data"),
    ],
)
def test_any_options_beside_a_real_recording_are_answered_as_it_says(api, path, media_type):
    """Made-up files are refused before most options count; these are not."""
    operation = api[path]["POST"]
    statuses = Counter()

    @BOUNDED
    @given(case=operation.as_strategy())
    def check(case):
        assume(case.media_type == media_type)
        if media_type == "multipart/form-data":
            case.body["file"] = CLIP
        else:
            case.body = CLIP
            case.query.pop("deadline_ms", None)  # a millisecond is rightly 504
            # What excludes each other would leave too few that are answered.
            if "progress" in case.query:
                case.query.pop("stream", None)
            if "n_best" in case.query:
                case.query.pop("response_format", None)
        statuses[case.call_and_validate(checks=CHECKS, timeout=TIMEOUT_S).status_code] += 1

    check()
    assert set(statuses) <= {200, 400, 404}
    assert statuses[200] >= 3, statuses
