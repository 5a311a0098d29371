"""Recorded and compiled steps, with closures in place of CUDA graphs and with a compiler that only traces."""

import functools
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from llamagen_unitok import generate
from llamagen_unitok.sampling import decode, graphs
from llamagen_unitok.sampling.draws import Draw
from llamagen_unitok.sampling.graphs import GraphEngine
from llamagen_unitok.sampling.kept import Kept
from llamagen_unitok.sampling.steps import Run
from tests.test_engines import SAMPLINGS, VARIANTS
from tests.tiny_generator import SINGLE, tiny_gpt


class Recorder:
    """Records a step as what it is: the function, over the memory that it knew. Warm-ups are run as on a GPU."""

    def __init__(self, monkeypatch) -> None:
        self.count = self.replayed = 0
        monkeypatch.setitem(graphs.RECORDERS, "cpu", self)

    def __call__(self, warm_up, step, beside):
        self.count += 1
        warm_up()
        recorder = self

        class Recording:
            def replay(self):
                recorder.replayed += 1
                step()

        return Recording()


@pytest.fixture
def recorder(monkeypatch):
    return Recorder(monkeypatch)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_recorded_steps_give_the_codes_of_the_plain_engine(recorder, sampling):
    gpt = tiny_gpt()
    expected = generate(gpt, [0, 3, 1], engine="eager", **sampling)
    assert torch.equal(generate(gpt, [0, 3, 1], engine="graph", **sampling), expected)
    assert recorder.replayed == 9
    guided = "cfg_scale" in sampling and sampling.get("cfg_interval") is not None
    assert recorder.count == (4 if guided else 3)  # three lengths, one of them with and without the null class


def test_recordings_are_used_again_and_never_outlive_the_memory_that_they_were_made_on(recorder):
    gpt = tiny_gpt()
    labels, scales = torch.tensor([0, 3, 1]), [1.0] * 9
    expected = generate(gpt, labels, engine="graph")
    made = recorder.count
    assert torch.equal(generate(gpt, labels, engine="graph"), expected)
    assert recorder.count == made
    # Another shape takes the memory, by a run that records nothing.
    decode(gpt, labels[:2], lambda logits, position, k: logits.argmax(-1), scales, engine="graph")
    assert torch.equal(generate(gpt, labels, engine="graph"), expected)
    assert recorder.count == 2 * made


def test_recordings_of_other_settings_are_made_anew_and_do_not_pile_up(recorder):
    gpt = tiny_gpt()
    for temperature in (0.5, 1.0, 2.0):
        expected = generate(gpt, [0, 3], temperature=temperature, engine="eager")
        assert torch.equal(generate(gpt, [0, 3], temperature=temperature, engine="graph"), expected)
    run = Run(torch.tensor([0, 3]), (1.0,) * 9, Draw(torch.rand(2, 9, 3), 3.0, 0, 1.0))
    with torch.inference_mode():
        kept = Kept()
        for temperature in (1.0, 2.0):
            engine = GraphEngine(gpt, replace(run, chooser=replace(run.chooser, temperature=temperature)), kept)
    assert len(engine.buffers.graphs) == 1


def test_a_recording_that_lacks_memory_leaves_things_usable(recorder, monkeypatch):
    gpt = tiny_gpt()
    expected = generate(gpt, [0, 3], engine="graph")

    def full(*_):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setitem(graphs.RECORDERS, "cpu", full)
        with pytest.raises(torch.OutOfMemoryError):
            generate(gpt, [0, 3, 1], engine="graph")
    assert torch.equal(generate(gpt, [0, 3], engine="graph"), expected)


def test_a_cuda_recording_that_lacks_memory_says_so_and_gives_the_stream_back(monkeypatch):
    streams = []

    class Stream:
        device = "cuda:0"

        def wait_stream(self, other):
            pass

    class Failing:
        """Ends as torch.cuda.graph does after an allocation failed: with an error of its own."""

        def __init__(self, graph, *, pool, stream, capture_error_mode):
            assert capture_error_mode == "thread_local"  # the decoding thread goes on meanwhile

        def __enter__(self):
            pass

        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

    def step():
        raise torch.OutOfMemoryError("tried to allocate")

    here = Stream()
    for name, stub in {
        "current_stream": lambda: here,
        "set_stream": streams.append,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": lambda: None,
        "graph": Failing,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(graphs, "_side_stream", lambda device: Stream())
    with pytest.raises(torch.OutOfMemoryError, match="tried to allocate"):
        graphs.record_cuda_graph(lambda: None, step, None)
    assert streams == [here]


@pytest.fixture
def quick_compiler(monkeypatch):
    """Dynamo traces as it does for a GPU; what it traced runs as it is. Counts compilations by function."""
    counts = Counter()

    def compile_(function, dynamic):
        def backend(graph, inputs):
            counts[function.__name__] += 1
            return graph

        return torch.compile(function, dynamic=dynamic, backend=backend, fullgraph=True)

    torch._dynamo.reset()
    monkeypatch.setattr(graphs._Compiler, "broken", False)
    monkeypatch.setattr(graphs._Compiler, "compiled", staticmethod(functools.cache(lambda f: compile_(f, False))))
    yield counts
    torch._dynamo.reset()


@VARIANTS
def test_compiled_blocks_give_the_codes_of_the_plain_engine(recorder, quick_compiler, changes):
    gpt = tiny_gpt(**{"layers": 4, "depth_layers": 3, **changes})
    for sampling in SAMPLINGS:
        expected = generate(gpt, [0, 3, 1], engine="eager", **sampling)
        assert torch.equal(generate(gpt, [0, 3, 1], engine="compiled", **sampling), expected)
    assert not graphs._Compiler.broken and recorder.replayed == 9 * len(SAMPLINGS)


def test_one_compilation_serves_all_layers_lengths_positions_and_later_runs(recorder, quick_compiler):
    gpt = tiny_gpt(layers=5, depth_layers=4, num_codebooks=4)
    generate(gpt, [0, 3, 1], engine="compiled")
    # Each for the trunk, for a position's first code, which has no queries, and for the others.
    assert quick_compiler == {"enter": 3, "pass_on": 3, "leave": 3}
    generate(gpt, [0, 3, 1], engine="compiled", seed=1, temperature=0.5)
    assert quick_compiler.total() == 9


def test_many_batch_sizes_stay_compiled(quick_compiler):
    gpt = tiny_gpt(layers=2, num_positions=1)
    for batch in range(2, 14):  # more than torch's own limit of eight
        generate(gpt, [0] * batch, engine="compiled")
    assert quick_compiler["leave"] == 3 * 12


@pytest.mark.parametrize("changes", [{}, SINGLE], ids=["K=3", "K=1"])
def test_a_compiler_that_fails_is_one_line_and_the_blocks_run_uncompiled(monkeypatch, caplog, changes):
    def broken(graph, inputs):
        raise RuntimeError("no C compiler\nand much more to say about it")

    torch._dynamo.reset()
    monkeypatch.setattr(graphs._Compiler, "broken", False)
    monkeypatch.setattr(graphs._Compiler, "compiled", staticmethod(lambda f: torch.compile(f, backend=broken)))
    gpt = tiny_gpt(**changes)
    for _ in range(2):
        codes = generate(gpt, [0, 3, 1], engine="compiled")
    assert torch.equal(codes, generate(gpt, [0, 3, 1], engine="eager"))
    (line,) = [record.getMessage() for record in caplog.records if record.name == graphs.__name__]
    assert "torch.compile failed" in line and "blocks run uncompiled" in line and "\n" not in line
    torch._dynamo.reset()
