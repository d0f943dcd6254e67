"""The documentation: all settings, no dead ends, nothing from elsewhere."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from server.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
# A reader's browser fetches these; a link that is clicked is another matter.
LOADED = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(?:https?:)?//|<link\b[^>]*//")


def load_hook():
    spec = importlib.util.spec_from_file_location("table", ROOT / "docs" / "settings_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_has_every_setting_once():
    hook = load_hook()
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert hook.PLACE in text
    table = hook.on_page_markdown(text, page=None)
    for name in Settings.model_fields:
        assert table.count(f"| `--{name.replace('_', '-')}`<br>") == 1
        assert f"`{ENV_PREFIX}{name.upper()}`" in table


def test_flags_that_the_pages_name_exist():
    known = {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    for page in ("operating.md", "realtime.md", "configuration.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        named = set(re.findall(r"`(--[a-z][a-z-]+)`", text))
        assert named <= known, f"{page}: {named - known}"


def test_metrics_that_the_pages_name_exist():
    source = (ROOT / "server" / "metrics.py").read_text(encoding="utf-8")
    for page in ("operating.md", "realtime.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for name in re.findall(r"speechllm_[a-z_]+", text):
            assert f'"{name.removesuffix("_total")}"' in source, f"{page}: {name}"


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    if importlib.util.find_spec("mkdocs") is None or shutil.which("git") is None:
        pytest.skip("MkDocs is not installed; the extra `docs` has it")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not LOADED.search(re.sub(r'<link rel="(?:canonical|next|prev)"[^>]*>', "", text))
    assert "mermaid" not in (tmp_path / "architecture.html").read_text(encoding="utf-8")
