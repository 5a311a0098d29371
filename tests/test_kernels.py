"""The GPU kernel for draws, without a GPU: interpreted it draws what filters.py says, and it compiles for a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
triton = pytest.importorskip("triton")


def test_interpreted_it_draws_what_the_filters_say():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.interpreted_kernels"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("vocabulary", [4096, 32768])
def test_it_compiles_for_a_gpu_that_is_not_here(vocabulary, filtered):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from llamagen_unitok.sampling.kernels import choose_kernel

    switches = dict.fromkeys(("GUIDED", "SCALED", "TOP_K", "TOP_P", "CHECKED"), filtered)
    switches |= {"GREEDY": False, "BLOCK": vocabulary}
    kinds = {
        "logits_ptr": "*bf16",
        **dict.fromkeys(("uniforms_ptr", "scales_ptr"), "*fp32"),
        **dict.fromkeys(("position_ptr", "chosen_ptr"), "*i64"),
        "finite_ptr": "*i1",
        **dict.fromkeys(("temperature", "top_p"), "fp32"),
    }
    signature = {name: "constexpr" if name in switches else kinds.get(name, "i32") for name in choose_kernel.arg_names}
    compiled = triton.compile(
        ASTSource(choose_kernel, signature, constexprs=switches),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 16},
    )
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared < 48 << 10
