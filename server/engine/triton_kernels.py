"""The kernels of `fused_pass`, in Triton.

Axis legend: R rows, T tokens of all prompts, H query heads, K key heads, W head width, I inner
width. Pointers are to contiguous tensors; where a stride is passed, its dimensions are named.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_block(keys_ptr, values_ptr, start, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A row's tokens from `start` to before `column`: keys in two halves, values, which are there.

    (W / 2, BLOCK), (W / 2, BLOCK), (BLOCK, W), (BLOCK,).
    """
    half: tl.constexpr = WIDTH // 2
    low = tl.arange(0, half)
    whole = tl.arange(0, WIDTH)
    tokens = start + tl.arange(0, BLOCK)
    is_there = tokens < column
    key_ptr = keys_ptr + tokens[None, :] * WIDTH + low[:, None]
    key_low = tl.load(key_ptr, mask=is_there[None, :], other=0.0)
    key_high = tl.load(key_ptr + half, mask=is_there[None, :], other=0.0)
    value_ptr = values_ptr + tokens[:, None] * WIDTH + whole[None, :]
    value = tl.load(value_ptr, mask=is_there[:, None], other=0.0)
    return key_low, key_high, value, is_there


@triton.jit
def _take_in(
    query_low, query_high, key_low, key_high, value, is_there, scale, largest, total, attended
):
    """Attend to a block besides: keys (W / 2, BLOCK) in two halves, values (BLOCK, W)."""
    scores = tl.dot(query_low, key_low, input_precision="ieee")
    scores += tl.dot(query_high, key_high, input_precision="ieee")
    scores = tl.where(is_there[None, :], scores * scale, float("-inf"))
    larger = tl.maximum(largest, tl.max(scores, 1))
    weights = tl.exp(scores - larger[:, None])
    shrunk = tl.exp(largest - larger)
    attended = attended * shrunk[:, None]
    attended += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return larger, total * shrunk + tl.sum(weights, 1), attended


@triton.jit
def attend(
    joint_ptr,
    positions_ptr,
    frequencies_ptr,
    keys_ptr,
    values_ptr,
    columns_ptr,
    out_ptr,
    slot_stride,
    head_stride,
    amplitude,
    scale,
    window,
    N_QUERIES: tl.constexpr,
    N_KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Attend with the queries of one row and key head; (R, (H + 2K) * W) -> (R, H * W).

    Queries and the new key are rotated before, and the new key and value written to their slot.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    per_key: tl.constexpr = N_QUERIES // N_KEYS
    half: tl.constexpr = WIDTH // 2
    low = tl.arange(0, half)
    whole = tl.arange(0, WIDTH)
    column = tl.load(columns_ptr + row).to(tl.int32)
    dtype = keys_ptr.dtype.element_ty
    slot = row.to(tl.int64) * slot_stride + head * head_stride
    keys_ptr += slot
    values_ptr += slot
    # What stands in the slot already depends on nothing: the first of it comes before all else.
    first = 0
    if window > 0:
        first = tl.maximum(column - window + 1, 0)
    block_low, block_high, block, is_there = _load_block(
        keys_ptr, values_ptr, first, column, WIDTH, BLOCK
    )
    angle = tl.load(positions_ptr + row).to(tl.float32) * tl.load(frequencies_ptr + low)
    # Rounded as transformers does.
    cos = (tl.cos(angle) * amplitude).to(dtype).to(tl.float32)
    sin = (tl.sin(angle) * amplitude).to(dtype).to(tl.float32)
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    joint_ptr += row * (N_QUERIES + 2 * N_KEYS) * WIDTH

    key_ptr = joint_ptr + (N_QUERIES + head) * WIDTH
    key_low = tl.load(key_ptr + low).to(tl.float32)
    key_high = tl.load(key_ptr + half + low).to(tl.float32)
    new_low = (key_low * cos - key_high * sin).to(dtype)
    new_high = (key_high * cos + key_low * sin).to(dtype)
    new_value = tl.load(joint_ptr + (N_QUERIES + N_KEYS + head) * WIDTH + whole)
    tl.store(keys_ptr + column * WIDTH + low, new_low)
    tl.store(keys_ptr + column * WIDTH + half + low, new_high)
    tl.store(values_ptr + column * WIDTH + whole, new_value)

    query = tl.arange(0, GROUP)
    is_query = query < per_key
    query_ptr = joint_ptr + (head * per_key + query)[:, None] * WIDTH + low[None, :]
    query_low = tl.load(query_ptr, mask=is_query[:, None], other=0.0).to(tl.float32)
    query_high = tl.load(query_ptr + half, mask=is_query[:, None], other=0.0).to(tl.float32)
    turned_low = (query_low * cos[None, :] - query_high * sin[None, :]).to(dtype)
    turned_high = (query_high * cos[None, :] + query_low * sin[None, :]).to(dtype)

    # The new token first, from registers: what was just stored may not be there to be loaded yet.
    own = tl.sum(turned_low.to(tl.float32) * new_low.to(tl.float32)[None, :], 1)
    own += tl.sum(turned_high.to(tl.float32) * new_high.to(tl.float32)[None, :], 1)
    largest = own * scale
    total = tl.full((GROUP,), 1.0, tl.float32)
    attended = tl.zeros((GROUP, WIDTH), tl.float32) + new_value.to(tl.float32)[None, :]
    largest, total, attended = _take_in(
        turned_low, turned_high, block_low, block_high, block, is_there,
        scale, largest, total, attended,
    )  # fmt: skip
    for start in range(first + BLOCK, column, BLOCK):
        block_low, block_high, block, is_there = _load_block(
            keys_ptr, values_ptr, start, column, WIDTH, BLOCK
        )
        largest, total, attended = _take_in(
            turned_low, turned_high, block_low, block_high, block, is_there,
            scale, largest, total, attended,
        )  # fmt: skip
    out = out_ptr + (row * N_QUERIES + head * per_key + query)[:, None] * WIDTH + whole[None, :]
    tl.store(out, (attended / total[:, None]).to(dtype), mask=is_query[:, None])


@triton.jit
def multiply(
    inputs_ptr,
    norm_ptr,
    weight_ptr,
    up_ptr,
    bias_ptr,
    out_ptr,
    n_rows,
    n_out,
    n_in,
    eps,
    IS_NORMED: tl.constexpr,
    IS_BIASED: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Few rows (R, n_in) times a weight (n_out, n_in): [norm] product [+ bias] [gated] [+ out]."""
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    column = tl.arange(0, BLOCK_IN)
    is_out = out < n_out
    is_in = column < n_in
    dtype = weight_ptr.dtype.element_ty
    place = out.to(tl.int64)[:, None] * n_in + column[None, :]
    is_weight = is_out[:, None] & is_in[None, :]
    if OVERLAPS:
        # Weights depend on nothing: they come while the kernel before this one still computes.
        tl.extra.cuda.gdc_launch_dependents()
    weight = tl.load(weight_ptr + place, mask=is_weight, other=0.0)
    if IS_GATED:
        up = tl.load(up_ptr + place, mask=is_weight, other=0.0)
    if IS_NORMED:
        norm = tl.load(norm_ptr + column, mask=is_in, other=0.0).to(tl.float32)
    if IS_BIASED:
        bias = tl.load(bias_ptr + out, mask=is_out, other=0.0).to(tl.float32)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    for row in tl.static_range(ROWS):
        is_row = tl.full((1,), row, tl.int32) < n_rows
        inputs = tl.load(inputs_ptr + row * n_in + column, mask=is_in & is_row, other=0.0)
        factor = 1.0
        if IS_NORMED:
            exact = inputs.to(tl.float32)
            factor = tl.rsqrt(tl.sum(exact * exact, 0) / n_in + eps)
            inputs = (exact * factor * norm).to(dtype)
        widened = inputs.to(tl.float32)[None, :]
        sums = tl.sum(weight.to(tl.float32) * widened, 1)
        if IS_BIASED:
            sums += bias
        if IS_GATED:
            sums = sums * tl.sigmoid(sums) * tl.sum(up.to(tl.float32) * widened, 1)
        target_ptr = out_ptr + row * n_out + out
        if IS_ADDED:
            sums += tl.load(target_ptr, mask=is_out & is_row, other=0.0).to(tl.float32)
        tl.store(target_ptr, sums.to(dtype), mask=is_out & is_row)


@triton.jit
def turn(
    joint_ptr,
    positions_ptr,
    frequencies_ptr,
    keys_ptr,
    values_ptr,
    slots_ptr,
    columns_ptr,
    n_slots,
    slot_stride,
    head_stride,
    amplitude,
    N_QUERIES: tl.constexpr,
    N_KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Rotate one token's queries and keys in (T, (H + 2K) * W); keep its keys and values.

    Of a token whose slot is none of the `n_slots`, nothing is kept.
    """
    token = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = WIDTH // 2
    head = tl.arange(0, HEADS)[:, None]
    low = tl.arange(0, half)[None, :]
    dtype = keys_ptr.dtype.element_ty
    angle = tl.load(positions_ptr + token).to(tl.float32) * tl.load(frequencies_ptr + low)
    cos = (tl.cos(angle) * amplitude).to(dtype).to(tl.float32)
    sin = (tl.sin(angle) * amplitude).to(dtype).to(tl.float32)
    joint_ptr += token * (N_QUERIES + 2 * N_KEYS) * WIDTH + head * WIDTH + low
    is_turned = (head < N_QUERIES + N_KEYS) & (low < half)
    is_head = (head < N_QUERIES + 2 * N_KEYS) & (low < half)
    first = tl.load(joint_ptr, mask=is_head, other=0.0)
    second = tl.load(joint_ptr + half, mask=is_head, other=0.0)
    exact_first, exact_second = first.to(tl.float32), second.to(tl.float32)
    turned_first = (exact_first * cos - exact_second * sin).to(dtype)
    turned_second = (exact_second * cos + exact_first * sin).to(dtype)
    tl.store(joint_ptr, turned_first, mask=is_turned)
    tl.store(joint_ptr + half, turned_second, mask=is_turned)
    slot = tl.load(slots_ptr + token)
    is_kept = slot < n_slots
    place = slot * slot_stride + tl.load(columns_ptr + token) * WIDTH + low
    key_ptr = keys_ptr + place + (head - N_QUERIES) * head_stride
    is_key = is_turned & (head >= N_QUERIES) & is_kept
    tl.store(key_ptr, turned_first, mask=is_key)
    tl.store(key_ptr + half, turned_second, mask=is_key)
    value_ptr = values_ptr + place + (head - N_QUERIES - N_KEYS) * head_stride
    is_value = is_head & (head >= N_QUERIES + N_KEYS) & is_kept
    tl.store(value_ptr, first, mask=is_value)
    tl.store(value_ptr + half, second, mask=is_value)


@triton.jit
def attend_prompts(
    joint_ptr,
    begins_ptr,
    out_ptr,
    n_tokens,
    scale,
    window,
    N_QUERIES: tl.constexpr,
    N_KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Attend from each token of a block to its prompt's before it; (T, (H + 2K) * W) -> (T, H * W).

    Queries and keys are rotated. A token's prompt begins at `begins`.
    """
    head = tl.program_id(1)
    row_width: tl.constexpr = (N_QUERIES + 2 * N_KEYS) * WIDTH
    key_head = head // (N_QUERIES // N_KEYS)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_token = token < n_tokens
    whole = tl.arange(0, WIDTH)
    dtype = joint_ptr.dtype.element_ty
    begin = tl.load(begins_ptr + token, mask=is_token, other=n_tokens).to(tl.int32)
    if window > 0:
        begin = tl.maximum(begin, token - window + 1)
    place = token.to(tl.int64)[:, None] * row_width + head * WIDTH + whole[None, :]
    query = tl.load(joint_ptr + place, mask=is_token[:, None], other=0.0)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    attended = tl.zeros((BLOCK, WIDTH), tl.float32)
    end = tl.minimum((tl.program_id(0) + 1) * BLOCK, n_tokens)
    for start in range(tl.min(begin, 0), end, BLOCK):
        other = start + tl.arange(0, BLOCK)
        is_other = other < n_tokens
        other_ptr = joint_ptr + other.to(tl.int64) * row_width + (N_QUERIES + key_head) * WIDTH
        key_ptr = other_ptr[None, :] + whole[:, None]
        scores = tl.dot(
            query, tl.load(key_ptr, mask=is_other[None, :], other=0.0), input_precision="ieee"
        )
        is_seen = (other[None, :] >= begin[:, None]) & (other[None, :] <= token[:, None])
        scores = tl.where(is_seen, scores * scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        # A row that has seen nothing yet has no largest.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp(scores - base[:, None])
        shrunk = tl.exp(largest - base)
        value_ptr = other_ptr[:, None] + N_KEYS * WIDTH + whole[None, :]
        value = tl.load(value_ptr, mask=is_other[:, None], other=0.0)
        attended = attended * shrunk[:, None]
        attended += tl.dot(weights.to(dtype), value, input_precision="ieee")
        total = total * shrunk + tl.sum(weights, 1)
        largest = larger
    out = out_ptr + (token.to(tl.int64)[:, None] * N_QUERIES + head) * WIDTH + whole[None, :]
    tl.store(out, (attended / total[:, None]).to(dtype), mask=is_token[:, None])


@triton.jit
def gate(gate_up_ptr, out_ptr, inner, BLOCK: tl.constexpr):
    """silu(gate) * up of one row's block: (R, 2I) -> (R, I)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = column < inner
    gate_ptr = gate_up_ptr + row * 2 * inner + column
    gate = tl.load(gate_ptr, mask=is_there, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + inner, mask=is_there, other=0.0).to(tl.float32)
    gated = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * inner + column, gated.to(out_ptr.dtype.element_ty), mask=is_there)


@triton.jit
def largest_of_parts(logits_ptr, largest_ptr, ids_ptr, n_logits, part, BLOCK: tl.constexpr):
    """The largest of a part of a row, and where it stands first; a NaN counts as infinity."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * part
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    ids = tl.zeros((BLOCK,), tl.int32)
    for start in range(begin, tl.minimum(begin + part, n_logits), BLOCK):
        place = start + tl.arange(0, BLOCK)
        logits_place = logits_ptr + row * n_logits + place
        logits = tl.load(logits_place, mask=place < n_logits, other=float("-inf")).to(tl.float32)
        logits = tl.where(logits == logits, logits, float("inf"))  # noqa: PLR0124 - false for NaN
        is_larger = logits > largest
        largest = tl.where(is_larger, logits, largest)
        ids = tl.where(is_larger, place, ids)
    best = tl.max(largest, 0)
    first = tl.min(tl.where(largest == best, ids, n_logits), 0)
    out = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(largest_ptr + out, best)
    tl.store(ids_ptr + out, first)


@triton.jit
def largest_of_rows(largest_ptr, ids_ptr, out_ptr, n_rows, PARTS: tl.constexpr):
    """Of the largest of each row's parts, the largest, and where it stands; (2, R) float64."""
    row = tl.program_id(0).to(tl.int64)
    part = row * PARTS + tl.arange(0, PARTS)
    largest = tl.load(largest_ptr + part)
    best = tl.max(largest, 0)
    first = tl.min(tl.where(largest == best, tl.load(ids_ptr + part), 2147483647), 0)
    tl.store(out_ptr + row, best.to(tl.float64))
    tl.store(out_ptr + n_rows + row, first.to(tl.float64))
