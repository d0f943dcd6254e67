"""Log lines as JSON objects, one a line on stderr."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

_FIELDS = "fields"  # the LogRecord attribute that carries `structured`'s values


def configure_logging(level: str) -> None:
    """Send every logger's lines to stderr; uvicorn's own go the same way."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def structured(**fields: object) -> dict[str, object]:
    """Wrap values for a logging call's `extra`."""
    return {_FIELDS: fields}


class JsonFormatter(logging.Formatter):
    """Formats a record with its time, level, logger, message and structured fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
