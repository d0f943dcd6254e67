import re
from pathlib import Path

from server import errors
from server.api.errors import ERROR_TABLE, UNEXPECTED


def leaves(kind):
    below = kind.__subclasses__()
    return [kind] if not below else [leaf for each in below for leaf in leaves(each)]


def test_every_error_has_a_status_and_a_code_of_its_own():
    assert set(leaves(errors.ServerError)) == set(ERROR_TABLE)
    codes = [kind.code for kind in ERROR_TABLE.values()]
    assert len(set(codes)) == len(codes)


def test_a_clients_fault_is_4xx_and_ours_is_5xx():
    for error, kind in ERROR_TABLE.items():
        too_many = {errors.QueueFullError, errors.RateLimitedError, errors.BufferFullError}
        is_clients = issubclass(error, errors.RequestError) or error in too_many
        assert kind.status // 100 == (4 if is_clients else 5), error


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = set(re.findall(r"(\w+Error)\b", errors.__doc__))
    defined = set(re.findall(r"^class (\w+)\(", Path(errors.__file__).read_text(), re.MULTILINE))
    assert drawn == defined


def test_the_documentation_lists_every_code_with_its_status():
    documented = set()
    text = (Path(__file__).parents[3] / "docs" / "api.md").read_text(encoding="utf-8")
    for status, codes in re.findall(r"^\| (\d{3}) \| ([^|]+) \|", text, re.MULTILINE):
        documented |= {(int(status), code) for code in re.findall(r"`(\w+)`", codes)}
    assert documented == {(kind.status, kind.code) for kind in [*ERROR_TABLE.values(), UNEXPECTED]}
