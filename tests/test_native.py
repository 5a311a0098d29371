"""Native code: each row by itself bit for bit, on every instruction set, from one byte a weight; built once."""

import logging
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagen_unitok import generate
from llamagen_unitok.sampling import building, decode, engine_name, engines, native
from llamagen_unitok.sampling.building import BuildError, load_library
from llamagen_unitok.sampling.engines import engine_class
from llamagen_unitok.sampling.kept import Kept
from llamagen_unitok.sampling.native import Int8Engine, NativeEngine, declared
from llamagen_unitok.sampling.steps import EagerEngine, Run
from tests.compiler import needs_compiler
from tests.tiny_generator import GROUPED, SINGLE, random_batch, tiny_gpt

WIDE = {"width": 256, "codebook_size": 1024, "num_positions": 4}
# Widths that fill no vector, heads that share keys, normed queries.
ODD = {"width": 72, "heads": 6, "kv_heads": 3, "ffn_multiple": 7, "codebook_size": 13, "qk_norm": True}


def logits_of(gpt, labels, codes, engine, library=None, scale=1.0) -> torch.Tensor:
    """Logits (B, L, K, V) for given codes; `scale` guides the first half of the positions."""
    config, seen = gpt.config, []
    guided = config.num_positions // 2 + 1

    def forced(logits, position, codebook):
        seen.append(logits.clone())
        return codes[:, position, codebook]

    run = Run(labels, (scale,) * guided + (1.0,) * (config.num_positions - guided), forced)
    with torch.inference_mode():
        steps = engine(gpt, run, Kept(), *([library] if library else []))
        for p in range(config.num_positions):
            steps.position(p)
    return torch.stack(seen, 1).unflatten(1, (config.num_positions, config.num_codebooks)).clone()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("changes", [WIDE, ODD, SINGLE, GROUPED], ids=["wide", "odd", "K=1", "grouped"])
def test_a_rows_logits_are_the_same_bits_in_every_batch_and_with_any_number_of_threads(changes, dtype):
    gpt = tiny_gpt(**changes).to(torch.float32 if dtype == torch.int8 else dtype)
    engine = Int8Engine if dtype == torch.int8 else NativeEngine
    labels, codes = random_batch(gpt, 19)
    together = logits_of(gpt, labels, codes, engine, scale=1.5)
    for rows in ([3], [0, 1], [4, 5, 6], [7, 8, 9, 10, 11], list(range(11, 19))):
        assert torch.equal(logits_of(gpt, labels[rows], codes[rows], engine, scale=1.5), together[rows])
    threads = torch.get_num_threads()
    try:
        for other in (1, 3):
            torch.set_num_threads(other)
            assert torch.equal(logits_of(gpt, labels, codes, engine, scale=1.5), together)
    finally:
        torch.set_num_threads(threads)


@needs_compiler
@settings(max_examples=15, deadline=None)
@given(
    head_width=st.sampled_from([4, 12, 16, 20, 64]),
    kv_heads=st.sampled_from([1, 2, 4]),
    grid=st.integers(1, 5),
    ffn_multiple=st.integers(1, 50),
    entries=st.integers(2, 40),
    batch=st.integers(1, 10),
    qk_norm=st.booleans(),
)
def test_logits_are_those_of_the_plain_engine_whatever_the_shape(
    head_width, kv_heads, grid, ffn_multiple, entries, batch, qk_norm
):
    gpt = tiny_gpt(
        width=4 * head_width,
        kv_heads=kv_heads,
        num_positions=grid * grid,
        ffn_multiple=ffn_multiple,
        codebook_size=entries,
        qk_norm=qk_norm,
    )
    labels, codes = random_batch(gpt, batch)
    expected = logits_of(gpt, labels, codes, EagerEngine, scale=1.5)
    torch.testing.assert_close(logits_of(gpt, labels, codes, NativeEngine, scale=1.5), expected, atol=5e-5, rtol=1e-5)


@needs_compiler
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names instruction sets of x86")
@pytest.mark.parametrize("target", ["x86-64", "haswell"])
def test_older_instruction_sets_compute_the_same(target):
    if target == "haswell" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX2")
    library = declared(load_library(native.SOURCE, target))
    assert library.lanes() == {"x86-64": 4, "haswell": 8}[target]
    for changes in (WIDE, ODD):
        gpt = tiny_gpt(**changes)
        labels, codes = random_batch(gpt, 6)
        for dtype, engine, tolerance in (
            (torch.float32, NativeEngine, 5e-5), (torch.bfloat16, NativeEngine, 2e-2), (torch.float32, Int8Engine, 1e-4)
        ):  # fmt: skip
            gpt = gpt.to(dtype)
            expected = logits_of(gpt, labels, codes, engine)
            found = logits_of(gpt, labels, codes, engine, library)
            torch.testing.assert_close(found, expected, atol=tolerance * expected.abs().max().item(), rtol=0)


@needs_compiler
def test_weights_are_read_where_they_lie():
    gpt = tiny_gpt(**WIDE)
    labels, codes = random_batch(gpt, 2)
    run = Run(labels, (1.0,) * 4, lambda logits, p, k: codes[:, p, k])
    with torch.inference_mode():
        weights = NativeEngine(gpt, run, Kept()).weights
    held = {tensor.data_ptr() for tensor in weights._held if isinstance(tensor, torch.Tensor)}
    matrices = [p for p in gpt.parameters() if p.ndim == 2 and p not in set(gpt.tok_embeddings.parameters())]
    assert {gpt.layers[0].attention.wqkv.weight.data_ptr(), gpt.output.linear_head.weight.data_ptr()} <= held
    own = sum(t.nbytes for t in weights._held if t.data_ptr() not in {p.data_ptr() for p in gpt.parameters()})
    assert own < 0.5 * sum(matrix.nbytes for matrix in matrices)  # the caches


@needs_compiler
def test_caches_are_only_read_up_to_the_position():
    gpt = tiny_gpt()
    labels, codes = random_batch(gpt, 2)
    run = Run(labels, (1.0,) * 9, lambda logits, p, k: codes[:, p, k])
    with torch.inference_mode():
        engine = NativeEngine(gpt, run, Kept())
        parameters = {p.data_ptr() for p in gpt.parameters()}
        for tensor in engine.weights._held:
            if tensor.ndim == 4 and tensor.data_ptr() not in parameters:
                tensor.fill_(torch.nan)
        for p in range(9):
            engine.position(p)
        assert engine.finite


@needs_compiler
def test_a_position_past_the_end_is_refused():
    gpt = tiny_gpt()
    with pytest.raises(IndexError, match="no position 9 of 9"):
        decode(gpt, torch.tensor([0]), lambda logits, p, k: logits.argmax(-1), [1.0] * 10, engine="native")


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")]
)
def test_the_callers_default_number_type_and_device_change_nothing(dtype, device):
    gpt = tiny_gpt()
    labels, codes = random_batch(gpt, 2)
    expected = logits_of(gpt, labels, codes, NativeEngine)
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        found = logits_of(gpt, labels, codes, NativeEngine)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(found, expected)


@needs_compiler
def test_weights_of_other_types_are_read_as_float32():
    gpt = tiny_gpt(**WIDE).half()
    labels, codes = random_batch(gpt, 2)
    exact = logits_of(gpt.float(), labels, codes, NativeEngine)
    torch.testing.assert_close(logits_of(gpt.half(), labels, codes, NativeEngine), exact, atol=0.02, rtol=0)


@needs_compiler
@pytest.mark.parametrize("changes", [WIDE, {**WIDE, **SINGLE}, {**WIDE, **GROUPED}], ids=["K=3", "K=1", "grouped"])
def test_logits_from_one_byte_a_weight_are_near_the_exact_ones(changes):
    gpt = tiny_gpt(**changes)
    labels, codes = random_batch(gpt, 5)
    exact = gpt(labels, codes)
    off = (logits_of(gpt, labels, codes, Int8Engine) - exact).square().mean().sqrt()
    assert 0 < off < 0.03 * exact.std()  # half a step of 1/127 of a row's largest weight, through four blocks
    with torch.no_grad():
        gpt.layers[0].attention.wo.weight[3] = 0
        gpt.layers[0].attention.wo.weight[4] *= 1e-20
    assert logits_of(gpt, labels, codes, Int8Engine).isfinite().all()


@needs_compiler
def test_the_exact_engine_of_the_same_generator_stays_exact():
    gpt = tiny_gpt()
    expected = generate(gpt, [0, 1], engine="native")
    generate(gpt, [0, 1], engine="int8")
    assert torch.equal(generate(gpt, [0, 1], engine="native"), expected)


@needs_compiler
def test_auto_is_native_and_codes_do_not_depend_on_the_batch_size():
    assert engine_name("auto", "cpu") == engine_name("auto", "cpu", large_run=True) == "native"
    gpt = tiny_gpt(**WIDE)
    together = generate(gpt, [0, 1, 2, 3, 4], cfg_scale=2.0, top_k=100)
    assert torch.equal(torch.cat([generate(gpt, [label], cfg_scale=2.0, top_k=100) for label in range(5)]), together)


def test_native_code_is_for_a_cpu():
    for name in ("native", "int8"):
        with pytest.raises(ValueError, match=f"--engine {name} runs on a CPU only, not on cuda"):
            engine_class(name, "cuda")


# --- building


@pytest.fixture
def fresh(monkeypatch, own_cache):
    """As in a process that has not asked for native code yet, with an empty cache."""
    monkeypatch.delenv("LLAMAGEN_UNITOK_CACHE", raising=False)
    native.built.cache_clear()
    engines._best_on_cpu.cache_clear()
    yield
    native.built.cache_clear()
    engines._best_on_cpu.cache_clear()


def compiler_that(tmp_path: Path, script: str) -> str:
    path = tmp_path / "g++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "no C++ compiler was found (looked for g++, c++ and $CXX)"),
        ("echo note >&2; echo 'a.cpp:3: error: no such thing' >&2; exit 1", "failed: a.cpp:3: error: no such thing"),
        ("exit 1", "failed: no reason given"),
        ("for last; do :; done; echo text > \"$last\"", "does not load"),
    ],
)  # fmt: skip
def test_without_native_code_auto_is_packed_and_says_why_once(fresh, script, message, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if script is not None:
        compiler_that(tmp_path, script)
    gpt = tiny_gpt()
    with caplog.at_level(logging.WARNING):
        codes = generate(gpt, [0, 1])
        assert engine_name("auto", "cpu") == "packed"
    assert torch.equal(codes, generate(gpt, [0, 1], engine="packed"))
    told = [record.getMessage() for record in caplog.records if "packed" in record.getMessage()]
    assert len(told) == 1 and message in told[0] and "\n" not in told[0]
    for name in ("native", "int8"):
        with pytest.raises(ValueError, match=f"^--engine {name} is not there: .*use --engine packed$"):
            generate(gpt, [0], engine=name)


SMALL = 'extern "C" int answer() { return 42; }\n'


@needs_compiler
def test_a_library_is_built_once_for_each_source_and_cpu(fresh, tmp_path, monkeypatch, caplog):
    source = tmp_path / "small.cpp"
    source.write_text(SMALL)
    assert load_library(source).answer() == 42
    assert "building small.cpp" in caplog.text
    kept = list((tmp_path / "user-cache" / "llamagen-unitok" / "kernels").iterdir())
    assert [path.suffix for path in kept] == [".so"]
    with monkeypatch.context() as patch:
        patch.setattr(building, "_compile", lambda command: pytest.fail("built again"))
        assert load_library(source).answer() == 42
    built = []
    compile_ = building._compile
    monkeypatch.setattr(building, "_compile", lambda command: built.append(command) or compile_(command))
    monkeypatch.setattr(building, "_machine", lambda: "another")
    load_library(source)
    source.write_text(SMALL.replace("42", "43"))
    assert load_library(source).answer() == 43
    assert len(built) == 2
    # Loading half a library would end the process.
    for path in list(kept[0].parent.iterdir()):
        half = path.with_suffix(".half")  # not in place: this process has the whole one mapped
        half.write_bytes(path.read_bytes()[:-5000])
        half.replace(path)
    assert load_library(source).answer() == 43
    assert len(built) == 3


@pytest.mark.skipif(not os.path.exists("/proc"), reason="looks at processes in /proc")
def test_a_compiler_that_hangs_is_ended_with_what_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "LONGEST", 1.0)
    started = tmp_path / "started"
    with pytest.raises(BuildError, match="did not end within 1 s"):
        building._compile([compiler_that(tmp_path, f"sleep 600 & echo $! > {started}; wait")])
    state = Path(f"/proc/{started.read_text().strip()}/stat")
    for _ in range(50):
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("it still runs")


@needs_compiler
def test_a_cache_that_cannot_be_written_costs_only_the_building(fresh, tmp_path, monkeypatch):
    source, file = tmp_path / "small.cpp", tmp_path / "file"
    source.write_text(SMALL)
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert load_library(source).answer() == 42


@needs_compiler
def test_a_compiler_that_fails_leaves_it_to_the_next_and_may_be_several_words(fresh, tmp_path, monkeypatch):
    source = tmp_path / "small.cpp"
    source.write_text(SMALL)
    monkeypatch.setenv("CXX", "false --with arguments")
    assert load_library(source).answer() == 42
    monkeypatch.setenv("CXX", 'g++ "')
    assert load_library(source).answer() == 42
    monkeypatch.setenv("CXX", "env VARIABLE=1 g++")
    tried = []
    monkeypatch.setattr(building, "_compile", lambda command: tried.append(command[1:3]) or Path(command[-1]).touch())
    with pytest.raises(BuildError, match="does not load"):
        monkeypatch.setattr(building, "COMPILERS", ())
        load_library(source)
    assert tried == [["VARIABLE=1", "g++"]]


@needs_compiler
def test_a_user_without_a_home_builds_for_the_process(fresh, tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    source = tmp_path / "small.cpp"
    source.write_text(SMALL)
    monkeypatch.setattr(building, "cache_folder", no_home)
    assert load_library(source).answer() == 42


@needs_compiler
def test_processes_that_build_at_once_leave_one_whole_library(fresh, tmp_path):
    source = tmp_path / "small.cpp"
    source.write_text(SMALL)
    program = (
        "import sys, pathlib; from llamagen_unitok.sampling.building import load_library; "
        "print(load_library(pathlib.Path(sys.argv[1])).answer())"
    )
    running = [subprocess.Popen([sys.executable, "-c", program, source], stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in running] == [b"42"] * 2
    assert len(list((tmp_path / "user-cache" / "llamagen-unitok" / "kernels").iterdir())) == 1


def test_a_build_error_is_one_line():
    with pytest.raises(BuildError, match=r"^c\+\+-that-is-not-there does not run: No such file or directory$"):
        building._compile(["c++-that-is-not-there"])
