import json
import logging

from server.log import JsonFormatter, structured


def test_a_line_is_one_json_object_with_its_fields():
    record = logging.makeLogRecord(
        {"name": "speechllm.access", "levelname": "INFO", "msg": "a\nb", **structured(status=200)}
    )
    line = JsonFormatter().format(record)
    assert "\n" not in line
    fields = json.loads(line)
    assert (fields["message"], fields["status"], fields["level"]) == ("a\nb", 200, "info")
