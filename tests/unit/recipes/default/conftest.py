"""The recipe's scripts as modules: they lie outside the packages and import one another."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

RECIPE = Path(__file__).resolve().parents[4] / "recipes" / "default"


@pytest.fixture(scope="session")
def recipe() -> Path:
    return RECIPE


@pytest.fixture(scope="session")
def scripts() -> Iterator[dict[str, ModuleType]]:
    names = (
        "synthesise",
        "synthesise_neural",
        "prepare",
        "pseudo_label",
        "average",
        "gather_text",
    )
    sys.path.insert(0, str(RECIPE))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(RECIPE))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def synthesise(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["synthesise"]


@pytest.fixture(scope="session")
def synthesise_neural(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["synthesise_neural"]


@pytest.fixture(scope="session")
def prepare(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["prepare"]


@pytest.fixture(scope="session")
def pseudo_label(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["pseudo_label"]


@pytest.fixture(scope="session")
def gather_text(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["gather_text"]
