"""Passes through the LLM: prompts to keys and values in slots, and decode steps to logits.

Any LLM runs by its own `forward`. For those built like Llama the same arithmetic is written out
here with fewer and larger operations, since at a small batch the time is not in matrix products
alone: queries, keys and values come from one product, as do gate and up; residuals are
added within products; queries and keys are rotated together; the mask is made once, in the form
that attention takes.

Axis legend: R rows, D width, H query heads, K key heads, G queries a key head (H / K), W head
width, V vocabulary.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM

from server.engine.kv_slots import DecodeMasks
from server.engine.packed_linear import PackedLinear, laid_out

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from server.engine.kv_slots import KVSlots
    from server.engine.packed_prompts import PackedPrompts

_LLAMA_LIKE = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM)


class DecoderPass(Protocol):
    """Runs a decode step that the slots have begun.

    Attributes:
        is_recordable: it launches the same kernels at every step of a shape.
        reads_own_lengths: of each row it reads what is there, not what the longest has.
    """

    is_recordable: bool
    reads_own_lengths: bool

    def __call__(self, embeds: Tensor, position_ids: Tensor, slots: KVSlots) -> Tensor:
        """Map embeddings (R, 1, D) at `position_ids` (R, 1) to logits (R, V)."""

    def likeliest(self, logits: Tensor) -> Tensor:
        """Find the largest of the logits (R, V), and where; (2, R) float64: one to transfer.

        The first of some that are equal. Not finite where a logit is NaN.
        """

    def prefill(
        self, embeds: Tensor, position_ids: Tensor, slots: KVSlots, lens: Sequence[int]
    ) -> None:
        """Write the keys and values of prompts (B, L, D) at `position_ids` (B, L) to their slots.

        Right-padded, (B,) `lens` long, for rows that `begin_prefill` has named. What is written
        behind a prompt's end is overwritten before anything attends to it.
        """


@runtime_checkable
class PackingPass(Protocol):
    """One that prefills without padding, with the same kernels for as many tokens."""

    def prefill_packed(self, prompts: PackedPrompts, slots: KVSlots) -> None:
        """Write the keys and values of prompts to their slots."""


def choose_pass(llm: PreTrainedModel) -> DecoderPass:
    """Return the fastest pass that does what an LLM's `forward` does on its device.

    Raises:
        ValueError: slots cannot offer what its layers attend to.
    """
    if not _is_llama_like(llm):
        return ModelPass(llm)
    if llm.device.type == "cuda" and find_spec("triton") is not None:
        from server.engine.fused_pass import FusedPass, can_compile, can_fuse  # noqa: PLC0415 - needs triton

        if can_fuse(llm) and can_compile(llm):
            return FusedPass(llm)
    return LlamaPass(llm)


def likeliest(logits: Tensor) -> Tensor:
    """Do as `DecoderPass.likeliest`."""
    return torch.stack([each.double() for each in logits.max(-1)])


class ModelPass:
    """The LLM's own `forward`."""

    is_recordable = False
    reads_own_lengths = False

    def __init__(self, llm: PreTrainedModel) -> None:
        """Look at the LLM's layers.

        Raises:
            ValueError: slots cannot offer what they attend to.
        """
        self._llm = llm
        self._masks = DecodeMasks(llm.config)

    def __call__(self, embeds: Tensor, position_ids: Tensor, slots: KVSlots) -> Tensor:
        """Map embeddings (R, 1, D) at `position_ids` (R, 1) to logits (R, V)."""
        logits: Tensor = self._llm(
            inputs_embeds=embeds,
            attention_mask=self._masks.build(slots, embeds.dtype),
            position_ids=position_ids,
            past_key_values=slots,
            use_cache=True,
        ).logits[:, -1]
        return logits

    def likeliest(self, logits: Tensor) -> Tensor:
        """Find the largest of the logits (R, V), and where; (2, R) float64."""
        return likeliest(logits)

    def prefill(
        self, embeds: Tensor, position_ids: Tensor, slots: KVSlots, lens: Sequence[int]
    ) -> None:
        """Write keys and values of prompts (B, L, D) at `position_ids` (B, L) to their slots."""
        del lens
        _prefill(self._llm, embeds, position_ids, slots)


class JoinedLayer:
    """One layer's products, as few as can be.

    The projections' weights become parts of larger ones, whose memory they share: the LLM works as
    before.
    """

    @torch.no_grad()
    def __init__(self, layer: Any) -> None:  # noqa: ANN401 - a layer of one of three classes
        attention, mlp = layer.self_attn, layer.mlp
        joined = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv_weight, self.qkv_bias = _concatenate(*joined)
        self.gate_up_weight, _ = _concatenate(mlp.gate_proj, mlp.up_proj)
        self.output_weight, self.down_weight = attention.o_proj.weight, mlp.down_proj.weight

    def qkv(self, normed: Tensor) -> Tensor:
        """(R, D) -> (R, (H + 2K) * W)."""
        return functional.linear(normed, self.qkv_weight, self.qkv_bias)

    def add_output(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """(R, D), (R, H * W) -> (R, D)."""
        return torch.addmm(hidden, attended, self.output_weight.t())

    def gate_up(self, normed: Tensor) -> tuple[Tensor, ...]:
        """(R, D) -> (R, inner), (R, inner)."""
        return functional.linear(normed, self.gate_up_weight).chunk(2, -1)

    def add_down(self, hidden: Tensor, inner: Tensor) -> Tensor:
        """(R, D), (R, inner) -> (R, D)."""
        return torch.addmm(hidden, inner, self.down_weight.t())


class _PackedLayer:
    """One layer's products with packed weights, which cannot be joined."""

    def __init__(self, layer: Any) -> None:  # noqa: ANN401 - a layer of one of three classes
        self._attention, self._mlp = layer.self_attn, layer.mlp

    def qkv(self, normed: Tensor) -> Tensor:
        """(R, D) -> (R, (H + 2K) * W)."""
        attention = self._attention
        parts = (attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed))
        return torch.cat(parts, -1)

    def add_output(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """(R, D), (R, H * W) -> (R, D)."""
        output: Tensor = self._attention.o_proj(attended)
        return output.add_(hidden)

    def gate_up(self, normed: Tensor) -> tuple[Tensor, ...]:
        """(R, D) -> (R, inner), (R, inner)."""
        return self._mlp.gate_proj(normed), self._mlp.up_proj(normed)

    def add_down(self, hidden: Tensor, inner: Tensor) -> Tensor:
        """(R, D), (R, inner) -> (R, D)."""
        down: Tensor = self._mlp.down_proj(inner)
        return down.add_(hidden)


class LlamaPass:
    """A Llama-like LLM's `forward`, written out for one token a row, and for prompts."""

    is_recordable = True
    reads_own_lengths = False

    def __init__(self, llm: PreTrainedModel) -> None:
        """Look at the layers."""
        config, base = llm.config, llm.model
        self._llm, self._rotary = llm, base.rotary_emb
        self._masks = DecodeMasks(config, additive=True)
        self._eps = float(config.rms_norm_eps)
        attention = base.layers[0].self_attn
        self._width = int(attention.head_dim)
        self._n_keys = int(config.num_key_value_heads)
        self._n_queries = int(config.num_attention_heads)
        self._scale = float(attention.scaling)
        is_packed = isinstance(attention.q_proj, PackedLinear)
        self._norms = [
            (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
            for layer in base.layers
        ]
        self._layers = [
            _PackedLayer(layer) if is_packed else JoinedLayer(layer) for layer in base.layers
        ]

    def __call__(self, embeds: Tensor, position_ids: Tensor, slots: KVSlots) -> Tensor:
        """Map embeddings (R, 1, D) at `position_ids` (R, 1) to logits (R, V)."""
        mask = self._masks.build_one(slots, embeds.dtype)
        turns = self._turns(embeds, position_ids)  # (R, 1, W) each
        hidden = embeds[:, 0]
        for layer, (attention_norm, mlp_norm), cache in zip(
            self._layers, self._norms, slots.layers, strict=True
        ):
            joint = layer.qkv(self._norm(hidden, attention_norm))
            heads = joint.unflatten(-1, (-1, self._width))  # (R, H + 2K, W)
            rotated = self._rotate(heads[:, : self._n_queries + self._n_keys], turns)
            keys, values = cache.update(
                rotated[:, self._n_queries :, None],
                heads[:, self._n_queries + self._n_keys :, None],
            )
            # The queries of one key head stand where otherwise a sequence does: no key is copied.
            queries = rotated[:, : self._n_queries].unflatten(1, (self._n_keys, -1))
            attended = functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=self._scale
            )  # (R, K, G, W)
            hidden = layer.add_output(hidden, attended.flatten(1))
            gate, up = layer.gate_up(self._norm(hidden, mlp_norm))
            hidden = layer.add_down(hidden, functional.silu(gate).mul_(up))
        logits: Tensor = self._llm.lm_head(self._norm(hidden, self._llm.model.norm.weight))
        return logits

    def likeliest(self, logits: Tensor) -> Tensor:
        """Find the largest of the logits (R, V), and where; (2, R) float64."""
        return likeliest(logits)

    def prefill(
        self, embeds: Tensor, position_ids: Tensor, slots: KVSlots, lens: Sequence[int]
    ) -> None:
        """Write keys and values of prompts (B, L, D) at `position_ids` (B, L) to their slots."""
        del lens
        count, length, _ = embeds.shape
        if self._masks.window is not None and length > self._masks.window:
            _prefill(self._llm, embeds, position_ids, slots)
            return
        turns = [each[:, :, None] for each in self._turns(embeds, position_ids)]  # (B, L, 1, W)
        n_turned = self._n_queries + self._n_keys
        hidden = embeds.flatten(0, 1)
        last = len(self._layers) - 1
        for number, (layer, norms, cache) in enumerate(
            zip(self._layers, self._norms, slots.layers, strict=True)
        ):
            joint = layer.qkv(self._norm(hidden, norms[0]))
            heads = joint.view(count, length, -1, self._width)  # (B, L, H + 2K, W)
            rotated = self._rotate(heads[:, :, :n_turned], turns).transpose(1, 2)
            keys, values = cache.update(
                rotated[:, self._n_queries :], heads[:, :, n_turned:].transpose(1, 2)
            )
            if number == last:  # nobody reads what a prompt's end says
                return
            # Causal attention alone keeps the padding behind a prompt out of it.
            attended = functional.scaled_dot_product_attention(
                rotated[:, : self._n_queries],
                keys,
                values,
                is_causal=True,
                scale=self._scale,
                enable_gqa=self._n_queries != self._n_keys,
            )  # (B, H, L, W)
            hidden = layer.add_output(hidden, attended.transpose(1, 2).reshape(len(hidden), -1))
            gate, up = layer.gate_up(self._norm(hidden, norms[1]))
            hidden = layer.add_down(hidden, functional.silu(gate).mul_(up))

    def _turns(self, embeds: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """By what positions (B, L) rotate: cosines, and signed sines, (B, L, W) each."""
        cos, sin = self._rotary(embeds, position_ids)
        half = self._width // 2
        return cos, torch.cat((-sin[..., :half], sin[..., half:]), -1)

    def _rotate(self, heads: Tensor, turns: Sequence[Tensor]) -> Tensor:
        cos, sin = turns
        return torch.addcmul(heads * cos, heads.roll(self._width // 2, -1), sin)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(hidden, weight.shape, weight, self._eps)


def _prefill(llm: PreTrainedModel, embeds: Tensor, position_ids: Tensor, slots: KVSlots) -> None:
    # Causal attention alone keeps the padding behind a prompt out of it. The base model has no
    # output layer, whose logits nobody would read.
    llm.base_model(
        inputs_embeds=embeds, position_ids=position_ids, past_key_values=slots, use_cache=True
    )


def _is_llama_like(llm: PreTrainedModel) -> bool:
    """Whether it is one of those that `LlamaPass` was written after, and not altered."""
    config = llm.config
    if type(llm) not in _LLAMA_LIKE or config._attn_implementation != "sdpa":
        return False
    if config.hidden_act != "silu" or len(DecodeMasks(config).kinds) > 1:
        return False
    for layer in llm.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        joined = (attention.q_proj, attention.k_proj, attention.v_proj)
        unbiased = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        kinds = {type(each) for each in (*joined, *unbiased)}
        if kinds not in ({nn.Linear}, {PackedLinear}):  # an adapter's
            return False
        if any(each.bias is not None for each in unbiased):
            return False
    return True


def _concatenate(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of several layers as one; theirs become parts of it."""
    weight = laid_out(torch.cat([each.weight.detach() for each in linears]))
    biases = [each.bias.detach() for each in linears if each.bias is not None]
    start = 0
    for each in linears:
        end = start + each.out_features
        each.weight = nn.Parameter(weight[start:end], requires_grad=False)
        start = end
    return weight, torch.cat(biases) if biases else None
