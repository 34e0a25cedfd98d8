"""Every kernel compiles for a GPU that need not be there; the interpreter checks no types."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
import torch
from torch.nn.functional import gelu
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vlm_prune.kernels.attention_received import attention_received
from vlm_prune.kernels.compact_tokens import compact_tokens
from vlm_prune.kernels.dispatch import backend
from vlm_prune.kernels.greedy_select import greedy_select
from vlm_prune.kernels.pairwise_cosine import pairwise_cosine
from vlm_prune.kernels.text_guided_score import text_guided_score
from vlm_prune.kernels.token_sensitivity import closed_form, monte_carlo, weight_kernel, weight_root


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


driver.set_active(Driver())
run, compiled = JITFunction.run, set()


def compile_only(self, *args, grid, warmup, **kwargs):
    binary = run(self, *args, grid=grid, warmup=True, **kwargs)
    assert binary.asm["cubin"]
    compiled.add(self.fn.__name__)


JITFunction.run = compile_only
dtype = getattr(torch, sys.argv[2])
with backend("triton"):
    query = torch.ones(1, 70, 4, 128, dtype=dtype).transpose(1, 2)
    key = torch.ones(1, 2, 90, 128, dtype=dtype)
    at, key_at = torch.arange(20, 90)[None], torch.arange(90)[None]
    attention_received(query, key)
    text_guided_score(query, key, at, key_at >= 0, 0.1)
    attention_received(query, key, at, key_at, window=30)
    text_guided_score(query, key, at, key_at >= 0, 0.1, window=30)
    w1, w2, x = (torch.ones(size, dtype=dtype) for size in ((96, 64), (80, 96), (2, 70, 64)))
    monte_carlo(x, w1, w1[:, 0], gelu, weight_root(w2), x[0, :5], 0.01)
    closed_form(x, w1, w1[:, 0], gelu, weight_kernel(w1, w2))
    pairwise_cosine(x, x)
    compact_tokens(key_at >= 5, key[:, 0], key_at, key_at >= 3)
    for rule in ("diverse", "farthest", "dpp", "coverage"):
        greedy_select(torch.ones(1, 70, 70), torch.ones(1, 70), 9, rule)
print(*sorted(compiled))
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kernel_compiles(capability, dtype):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM, capability, dtype], env=environment, cwd="/",
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr[-2000:]
    assert set(out.stdout.split()) == {
        "_compact_kernel",
        "_cosine_kernel",
        "_cover_kernel",
        "_differences_kernel",
        "_lse_kernel",
        "_prior_kernel",
        "_row_roots_kernel",
        "_select_kernel",
        "_slopes_kernel",
        "_weighted_columns_kernel",
    }
