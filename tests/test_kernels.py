"""GPU kernels without a GPU: interpreted they do what plain PyTorch does, and they compile for one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
triton = pytest.importorskip("triton")


def test_interpreted_they_do_what_plain_pytorch_does():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.interpreted_kernels"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


def compiled_for_hopper(kernel, constants, **kinds):
    """A kernel compiled for a GPU that is not here; arguments whose kind is not given are whole numbers."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("vocabulary", [4096, 16384])
def test_choosing_compiles_for_a_gpu(vocabulary, filtered):
    from llamagen_unitok.sampling.kernels import choose_kernel

    switches = dict.fromkeys(("GUIDED", "SCALED", "TOP_K", "TOP_P", "CHECKED"), filtered)
    floats = dict.fromkeys(("uniforms_ptr", "scales_ptr"), "*fp32") | dict.fromkeys(("temperature", "top_p"), "fp32")
    compiled = compiled_for_hopper(
        choose_kernel,
        {**switches, "GREEDY": False, "BLOCK": vocabulary},
        logits_ptr="*bf16",
        position_ptr="*i64",
        chosen_ptr="*i64",
        finite_ptr="*i1",
        **floats,
    )
    assert compiled.asm["cubin"] and compiled.metadata.shared < 48 << 10


@pytest.mark.parametrize("kind", ["*bf16", "*fp32"])
@pytest.mark.parametrize(("queries", "turning", "width"), [(True, True, 64), (True, False, 100), (False, False, 64)])
def test_attention_compiles_for_a_gpu(kind, queries, turning, width):
    from llamagen_unitok.sampling.kernels import attend_kernel

    block = triton.next_power_of_2(width)
    compiled = compiled_for_hopper(
        attend_kernel,
        {"QUERIES": queries, "TURNING": turning, "WIDTH": width, "BLOCK_D": block, "BLOCK_T": 64},
        **dict.fromkeys(("qkv_ptr", "cache_ptr", "y_ptr"), kind),
        turns_ptr="*fp32",
        position_ptr="*i64",
        scale="fp32",
    )
    assert compiled.asm["cubin"] and compiled.metadata.shared < 48 << 10
