"""A Llama-like LLM's decode step on a CUDA device in few kernels of its own, written in Triton.

A step of a small model reads its weights in less time than it takes to launch what torch has for
it, CUDA graph or not: every kernel costs a microsecond or two besides its work. So what lies
between two matrix products is one kernel here, and at a few rows it is part of the products:

- attention rotates queries and keys, writes the new key and value into their slots, and attends to
  each row's own tokens, without a mask and without what a batch's longest row would add;
- prompts are prefilled one behind another, without padding, each attending to itself;
- for few rows, whose products only read weights, normalisation, activation and residual happen
  within the products; for more, products are cuBLAS's.

Axis legend: R rows, B prompts, L the longest of them, T the tokens of all, D width, H query heads,
K key heads, G queries a key head (H / K), W head width, I inner width, V vocabulary.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

import torch
import triton
from torch import nn
from torch.nn import functional

from server.engine import triton_kernels as kernels
from server.engine.decoder_pass import JoinedLayer, LlamaPass
from server.engine.packed_prompts import pack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.cache_utils import CacheLayerMixin

    from server.engine.kv_slots import KVSlots
    from server.engine.packed_prompts import PackedPrompts

_log = logging.getLogger(__name__)

_MOST_ROWS_OF_OWN_PRODUCTS = 2  # with more, their sums take longer than their weights
_MOST_INPUTS_OF_OWN_PRODUCTS = 8192  # which a program holds in its registers
_PROGRAM_WEIGHTS = 4096
_PRODUCT_ROWS = 16  # of the smallest product of tensor cores
_ATTENDED_BLOCK = 128
_PROMPT_BLOCK = 64
_LOGIT_PARTS, _LOGIT_BLOCK = 32, 1024
_MIN_HEAD_WIDTH = 32
_GATE_BLOCK = 1024


def small_product(  # noqa: PLR0913 - a product's whole input
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    up_weight: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    into: Tensor | None = None,
    overlaps: bool = False,
) -> Tensor:
    """Multiply few rows by a weight.

    Args:
        inputs: (R, n_in).
        weight: (n_out, n_in).
        bias: (n_out,).
        up_weight: (n_out, n_in); what it gives is multiplied by silu of what `weight` gives.
        norm: (n_in,), of an RMS norm of the inputs, which comes first.
        eps: of the norm.
        into: (R, n_out), to which the product is added.
        overlaps: let it begin before the kernel that it follows has ended.

    Returns:
        (R, n_out), or `into`.
    """
    n_out, n_in = weight.shape
    out = inputs.new_empty(len(inputs), n_out) if into is None else into
    block_in = triton.next_power_of_2(n_in)
    is_gated = up_weight is not None
    block_out = max(1, _PROGRAM_WEIGHTS // block_in // (1 + is_gated))
    kernels.multiply[(triton.cdiv(n_out, block_out),)](
        inputs, norm, weight, up_weight, bias, out, len(inputs), n_out, n_in, eps,
        IS_NORMED=norm is not None, IS_BIASED=bias is not None, IS_GATED=is_gated,
        IS_ADDED=into is not None, ROWS=triton.next_power_of_2(len(inputs)), BLOCK_OUT=block_out,
        BLOCK_IN=block_in, OVERLAPS=overlaps, num_warps=8 if block_in > _PROGRAM_WEIGHTS else 4,
        **_launch(overlaps),
    )  # fmt: skip
    return out


def _launch(overlaps: bool) -> dict[str, bool]:
    """Programmatic dependent launch, which Hopper brought."""
    return {"launch_pdl": True} if overlaps else {}


def _gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: (R, 2I) -> (R, I)."""
    rows, inner = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, inner)
    kernels.gate[rows, triton.cdiv(inner, _GATE_BLOCK)](gate_up, out, inner, BLOCK=_GATE_BLOCK)
    return out


class FusedPass(LlamaPass):
    """A Llama-like LLM's `forward`, one token a row; `can_fuse` says of which."""

    reads_own_lengths = True

    def __init__(self, llm: PreTrainedModel) -> None:
        """Look at the layers."""
        super().__init__(llm)
        self._joined = [layer for layer in self._layers if isinstance(layer, JoinedLayer)]
        self._window = self._masks.window or 0
        n_attended = self._n_queries * self._width
        widest = max(llm.config.hidden_size, llm.config.intermediate_size, n_attended)
        is_narrow = widest <= _MOST_INPUTS_OF_OWN_PRODUCTS
        self._own_product_rows = _MOST_ROWS_OF_OWN_PRODUCTS if is_narrow else 0
        self._overlaps = _can_overlap(llm.device)

    def __call__(self, embeds: Tensor, position_ids: Tensor, slots: KVSlots) -> Tensor:
        """Map embeddings (R, 1, D) at `position_ids` (R, 1) to logits (R, V)."""
        hidden = embeds[:, 0].clone()  # each layer adds to it
        if len(hidden) <= self._own_product_rows:
            return self._run_few(hidden, position_ids, slots)
        for layer, norms, cache in zip(self._joined, self._norms, slots.layers, strict=True):
            joint = layer.qkv(self._norm(hidden, norms[0]))
            attended = self._attend(joint, position_ids, slots, cache)
            hidden.addmm_(attended, layer.output_weight.t())
            normed = self._norm(hidden, norms[1])
            inner = _gated(functional.linear(normed, layer.gate_up_weight))
            hidden.addmm_(inner, layer.down_weight.t())
        logits: Tensor = self._llm.lm_head(self._norm(hidden, self._llm.model.norm.weight))
        return logits

    def _run_few(self, hidden: Tensor, position_ids: Tensor, slots: KVSlots) -> Tensor:
        multiply = partial(small_product, overlaps=self._overlaps)
        eps = self._eps
        for layer, norms, cache in zip(self._joined, self._norms, slots.layers, strict=True):
            joint = multiply(hidden, layer.qkv_weight, layer.qkv_bias, norm=norms[0], eps=eps)
            attended = self._attend(joint, position_ids, slots, cache, overlaps=self._overlaps)
            multiply(attended, layer.output_weight, into=hidden)
            gate, up = layer.gate_up_weight.chunk(2)
            inner = multiply(hidden, gate, up_weight=up, norm=norms[1], eps=eps)
            multiply(inner, layer.down_weight, into=hidden)
        norm = self._llm.model.norm.weight
        return multiply(hidden, self._llm.lm_head.weight, norm=norm, eps=eps)

    def likeliest(self, logits: Tensor) -> Tensor:
        """Find the largest of the logits (R, V), and where; (2, R) float64."""
        rows, n_logits = logits.shape
        part = triton.cdiv(n_logits, _LOGIT_PARTS * _LOGIT_BLOCK) * _LOGIT_BLOCK
        largest = logits.new_empty(rows, _LOGIT_PARTS, dtype=torch.float32)
        ids = logits.new_empty(rows, _LOGIT_PARTS, dtype=torch.int32)
        kernels.largest_of_parts[rows, _LOGIT_PARTS](
            logits, largest, ids, n_logits, part, BLOCK=_LOGIT_BLOCK
        )
        out = logits.new_empty(2, rows, dtype=torch.float64)
        kernels.largest_of_rows[(rows,)](largest, ids, out, rows, PARTS=_LOGIT_PARTS)
        return out

    def prefill(
        self, embeds: Tensor, position_ids: Tensor, slots: KVSlots, lens: Sequence[int]
    ) -> None:
        """Write keys and values of prompts (B, L, D) at `position_ids` (B, L) to their slots."""
        self.prefill_packed(pack(embeds, position_ids, slots, lens), slots)

    def prefill_packed(self, prompts: PackedPrompts, slots: KVSlots) -> None:
        """Write keys and values of prompts to their slots."""
        hidden = prompts.embeds.clone()  # each layer adds to it
        last = len(self._joined) - 1
        for number, (layer, norms, cache) in enumerate(
            zip(self._joined, self._norms, slots.layers, strict=True)
        ):
            joint = layer.qkv(self._norm(hidden, norms[0]))
            self._turn(joint, prompts, slots.plan.n_slots, cache)
            if number == last:  # nobody reads what a prompt's end says
                return
            hidden.addmm_(self._attend_prompts(joint, prompts), layer.output_weight.t())
            normed = self._norm(hidden, norms[1])
            inner = _gated(functional.linear(normed, layer.gate_up_weight))
            hidden.addmm_(inner, layer.down_weight.t())

    def _turn(
        self, joint: Tensor, prompts: PackedPrompts, n_slots: int, cache: CacheLayerMixin
    ) -> None:
        keys, values = cache.keys, cache.values
        kernels.turn[(len(joint),)](
            joint, prompts.position_ids, self._rotary.inv_freq, keys, values, prompts.slots,
            prompts.columns, n_slots, keys.stride(0), keys.stride(1),
            self._rotary.attention_scaling, N_QUERIES=self._n_queries, N_KEYS=self._n_keys,
            WIDTH=self._width, HEADS=triton.next_power_of_2(self._n_queries + 2 * self._n_keys),
        )  # fmt: skip

    def _attend_prompts(self, joint: Tensor, prompts: PackedPrompts) -> Tensor:
        """(T, (H + 2K) * W) -> (T, H * W)."""
        attended = joint.new_empty(len(joint), self._n_queries * self._width)
        blocks = triton.cdiv(len(joint), _PROMPT_BLOCK)
        kernels.attend_prompts[blocks, self._n_queries](
            joint, prompts.begins, attended, len(joint), self._scale, self._window,
            N_QUERIES=self._n_queries, N_KEYS=self._n_keys, WIDTH=self._width,
            BLOCK=_PROMPT_BLOCK,
        )  # fmt: skip
        return attended

    def _attend(
        self,
        joint: Tensor,
        position_ids: Tensor,
        slots: KVSlots,
        cache: CacheLayerMixin,
        *,
        overlaps: bool = False,
    ) -> Tensor:
        """(R, (H + 2K) * W) -> (R, H * W); writes the new keys and values."""
        rows, _, columns = slots.decode_step()
        keys, values = cache.keys[rows], cache.values[rows]
        attended = joint.new_empty(len(joint), self._n_queries * self._width)
        group = triton.next_power_of_2(self._n_queries // self._n_keys)
        kernels.attend[len(joint), self._n_keys](
            joint, position_ids, self._rotary.inv_freq, keys, values, columns, attended,
            keys.stride(0), keys.stride(1), self._rotary.attention_scaling, self._scale,
            self._window,
            N_QUERIES=self._n_queries, N_KEYS=self._n_keys, WIDTH=self._width,
            GROUP=max(_PRODUCT_ROWS, group), BLOCK=_ATTENDED_BLOCK, OVERLAPS=overlaps,
            num_stages=1,  # a program that takes less memory begins earlier
            **_launch(overlaps),
        )  # fmt: skip
        return attended


def _can_overlap(device: torch.device) -> bool:
    """Whether kernels may begin before those that they follow have ended: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def can_fuse(llm: PreTrainedModel) -> bool:
    """Whether a Llama-like LLM's heads are such as the kernels can compute."""
    attention, rotary = llm.model.layers[0].self_attn, llm.model.rotary_emb
    width = int(attention.head_dim)
    head = llm.lm_head
    if type(head) is not nn.Linear or getattr(head, "bias", None) is not None:  # an adapter's
        return False
    if width < _MIN_HEAD_WIDTH or width & (width - 1):
        return False
    # Frequencies that change with the sequence are transformers' to compute.
    return rotary.rope_type not in {"dynamic", "longrope"} and rotary.inv_freq.numel() == width // 2


@torch.inference_mode()
def can_compile(llm: PreTrainedModel) -> bool:
    """Whether a kernel, compiled here for the LLM's device and dtype, gives the right sums.

    Triton needs a C compiler and Python's headers, which many images of a server have not, and
    knows some devices without some dtypes.
    """
    generator = torch.Generator(llm.device).manual_seed(0)
    inputs, weight = (
        torch.randn(2, 64, generator=generator, device=llm.device).to(llm.dtype) for _ in range(2)
    )
    try:
        product = small_product(inputs, weight, overlaps=_can_overlap(llm.device))
        torch.testing.assert_close(product, functional.linear(inputs, weight), rtol=0.1, atol=0.1)
    except Exception as error:  # noqa: BLE001 - compilers, drivers and devices fail in many ways
        reason = (str(error).splitlines() or [""])[0]
        _log.warning(
            "Triton's kernels cannot be used, and the LLM runs slower without them: %s: %s",
            type(error).__name__,
            reason,
        )
        return False
    return True
