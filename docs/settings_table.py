"""Writes the table of settings into `configuration.md` when the site is built."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import SecretStr

from server.settings import Settings, flag_of, variable_of

PLACE = "<!-- settings -->"


def on_page_markdown(markdown: str, **_others: Any) -> str:  # noqa: ANN401 - MkDocs' own
    """Put the table where a page asks for it."""
    return markdown.replace(PLACE, settings_table())


def settings_table() -> str:
    """Return a row for each setting: flag, variable, default, and what it is."""
    rows = ["| flag and variable | default | |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = field.get_default()
        if isinstance(default, SecretStr):
            default = default.get_secret_value()
        shown = f"`{default}`" if default != "" else "empty"
        text = (field.description or "").replace("|", "\\|")
        if choices := [each for each in get_args(field.annotation) if isinstance(each, str)]:
            text += f" One of {', '.join(choices)}."
        rows.append(f"| `{flag_of(name)}`<br>`{variable_of(name)}` | {shown} | {text} |")
    return "\n".join(rows)
