"""The kernels, compiled for a GPU that is not here: what Triton interprets, it may not compile."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import torch
from transformers import AutoModelForCausalLM, Qwen2Config
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from server.engine import fused_pass, packed_linear
from server.engine.kv_slots import KVSlots, layer_shapes, plan_slots
from server.engine.packed_prompts import PromptBuffers


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0


compiled = set()


def compile_only(kernel, grid):
    def call(*args, **options):
        compiled.add(kernel.warmup(*args, grid=grid, **options).hash)

    return call


driver.set_active(Driver())
JITFunction.__getitem__ = compile_only
packed_linear._MOST_TURNED_BYTES = 0
fused_pass._can_overlap = lambda _device: True
config = Qwen2Config(
    vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32,
)
llm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
decoder_pass = fused_pass.FusedPass(llm)


@torch.inference_mode()
def run(rows):
    plan = plan_slots(
        layer_shapes(llm), llm.dtype, slot_tokens=256, max_slots=rows, budget_bytes=1 << 30
    )
    slots = KVSlots(plan, "cpu")
    prompts = torch.zeros(rows, 40, 128, dtype=llm.dtype)
    positions = torch.arange(40).expand(rows, -1)
    slots.begin_prefill(rows)
    decoder_pass.prefill(prompts, positions, slots, [40] * rows)
    buffers = PromptBuffers(256, prompts)
    buffers.fill(256, prompts, positions, slots, [40] * rows)
    decoder_pass.prefill_packed(buffers.first(256), slots)
    columns = torch.full((rows,), 40)
    slots.begin_padded(columns, 256)
    decoder_pass.likeliest(decoder_pass(prompts[:, :1], columns[:, None], slots))


for rows in (1, 3):
    run(rows)
print(len(compiled))
"""


def test_what_a_pass_launches_compiles(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 8  # some kernels are compiled for one row and for more
