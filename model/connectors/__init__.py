"""Connectors map encoder frames into the LLM's embedding space. One file each, one registry.

A `Connector` is built from (config, d_encoder, d_llm); its forward takes encoder
frames (B, F, D_enc) and lengths (B,) and returns audio embeddings (B, N, D_llm) and lengths (B,).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model.connectors.connector import Connector
from model.connectors.stack import StackConnector, StackConnectorConfig

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Connector",
    "StackConnector",
    "StackConnectorConfig",
    "connector_config",
    "make_connector",
    "output_lens",
]

_REGISTRY = {"stack": (StackConnector, StackConnectorConfig)}


def connector_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Check a connector's configuration and fill in its defaults.

    Raises:
        ValueError: an unknown type or field, or a value out of range.
    """
    kind = fields.get("type", "stack")
    if kind not in _REGISTRY:
        raise ValueError(f"unknown connector {kind!r}; there are: {', '.join(_REGISTRY)}")
    _, schema = _REGISTRY[kind]
    return schema(**fields).model_dump()


def make_connector(fields: dict[str, Any], d_encoder: int, d_llm: int) -> Connector:
    """Build the connector that `fields` describe, between the given widths."""
    module, schema = _REGISTRY[fields["type"]]
    return module(schema(**fields), d_encoder, d_llm)


def output_lens(fields: dict[str, Any], frame_lens: Tensor) -> Tensor:
    """Audio embeddings that clips of `frame_lens` encoder frames become (B,)."""
    module, schema = _REGISTRY[fields["type"]]
    return module.output_lens(schema(**fields), frame_lens)
