"""The engine for CPUs with a GNU C++ compiler: a step of the trunk, or of the depth head, in one call of native.cpp.

Float32 and bfloat16 weights are read where they lie, so there is no second copy of them and nothing to prepare; the
8-bit engine makes matrices of one byte a weight. Activations are float32; keys and values are bfloat16 beside such
weights, else float32. A row's logits follow from it alone, bit for bit, whatever the batch size and the number of
threads.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_float, c_int, c_void_p
from pathlib import Path

import torch
from torch import Tensor, nn

from llamagen_unitok.gpt import GPT
from llamagen_unitok.layers import Block
from llamagen_unitok.sampling.building import BuildError, load_library
from llamagen_unitok.sampling.kept import Kept
from llamagen_unitok.sampling.steps import Run, SteppedEngine
from modelfolder.compact import round_rows

SOURCE = Path(__file__).with_name("native.cpp")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # of stored weights


class _Matrix(Structure):
    _fields_ = (("weights", c_void_p), ("scales", c_void_p))


class _Block(Structure):
    _fields_ = (
        *((name, _Matrix) for name in ("wqkv", "wo", "w1", "w3", "w2")),
        *((name, c_void_p) for name in ("attention_norm", "ffn_norm", "q_norm", "k_norm", "keys", "values")),
    )


class _Stack(Structure):
    _fields_ = (
        *((name, c_int) for name in ("kind", "blocks_count", "C", "F", "H", "G", "D", "length", "V", "threads")),
        ("eps", c_float),
        ("blocks", POINTER(_Block)),
        ("norm", c_void_p),
        ("output", _Matrix),
        ("bias", c_void_p),
    )


@functools.cache
def built() -> ctypes.CDLL | BuildError:
    """The library, or why there is none; asked once a process, since building takes seconds."""
    try:
        return declared(load_library(SOURCE))
    except BuildError as error:
        return error


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """A library of native.cpp that knows the types of its functions."""
    library.lanes.argtypes, library.lanes.restype = (), c_int
    library.step.argtypes = (POINTER(_Stack), c_int, c_int, c_void_p, c_void_p, c_void_p, c_void_p)
    library.step.restype = None
    return library


class _NativeWeights:
    """Both stacks as native.cpp reads them, with caches for `rows` sequences. Tensors are held as long as this is."""

    def __init__(self, library: ctypes.CDLL, gpt: GPT, dtype: torch.dtype, rows: int, threads: int) -> None:
        config, head = gpt.config, gpt.output
        self._held: list[object] = []
        self._dtype, self._rows, self._lanes = dtype, rows, library.lanes()
        sizes = {
            "kind": KINDS[dtype],
            "C": config.width,
            "F": config.ffn_width,
            "H": config.heads,
            "G": config.kv_heads,
            "D": config.head_width,
            "threads": threads,
            "eps": config.norm_eps,
        }
        several = not isinstance(head, nn.Linear)
        with torch.no_grad():
            self.trunk = self._stack(gpt.layers, config.num_positions, sizes)
            self.trunk.norm = self._floats(gpt.norm.weight)
            self.head = self._stack(head.layers if several else (), config.num_codebooks, sizes)
            self.head.norm = self._floats(head.norm.weight) if several else None
            output = head.linear_head if several else head
            self.head.output, self.head.bias = self._matrix(output.weight), self._floats(output.bias)
            self.head.V = config.codebook_size
        # The layout is that of `run` in native.cpp.
        inner = config.heads * config.head_width
        shared = 2 * inner + 2 * config.kv_heads * config.head_width + 2 * config.ffn_width
        longest = max(config.num_positions, config.num_codebooks)
        own = rows * config.width + self._padded(longest) + self._padded(config.head_width)
        self.scratch = torch.empty(rows * shared + threads * own, dtype=torch.float32, device="cpu")
        self.turns = gpt.rope.table  # (1 + L, D/2, 2) float32

    def _stack(self, blocks: nn.ModuleList | tuple[()], length: int, sizes: dict[str, float]) -> _Stack:
        array = (_Block * len(blocks))(*(self._block(block, length, sizes["G"], sizes["D"]) for block in blocks))
        return _Stack(blocks_count=len(blocks), length=length, blocks=array, **sizes)

    def _block(self, block: Block, length: int, heads: int, width: int) -> _Block:
        attention, ffn = block.attention, block.feed_forward
        dtype = torch.bfloat16 if self._dtype == torch.bfloat16 else torch.float32
        keys = torch.zeros(self._rows, heads, self._padded(length), width, dtype=dtype, device="cpu")
        values = torch.zeros(self._rows, heads, length, self._padded(width), dtype=dtype, device="cpu")
        return _Block(
            wqkv=self._matrix(attention.wqkv.weight),
            wo=self._matrix(attention.wo.weight),
            w1=self._matrix(ffn.w1.weight),
            w3=self._matrix(ffn.w3.weight),
            w2=self._matrix(ffn.w2.weight),
            attention_norm=self._floats(block.attention_norm.weight),
            ffn_norm=self._floats(block.ffn_norm.weight),
            q_norm=self._floats(attention.q_norm and attention.q_norm.weight),
            k_norm=self._floats(attention.k_norm and attention.k_norm.weight),
            keys=self._hold(keys),
            values=self._hold(values),
        )

    def _matrix(self, weight: Tensor) -> _Matrix:
        """A matrix as it is stored for this engine: the generator's own memory where it can be read as it is."""
        if self._dtype != torch.int8:
            return _Matrix(self._hold(weight.to(self._dtype)), None)
        rounded, scales = round_rows(weight)
        return _Matrix(self._hold(rounded), self._hold(scales))

    def _floats(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else self._hold(tensor.float())

    def _hold(self, tensor: Tensor) -> int:
        """The address of the tensor's numbers, which stay there."""
        tensor = tensor.detach().contiguous()
        self._held.append(tensor)
        return tensor.data_ptr()

    def _padded(self, count: int) -> int:
        return -(-count // self._lanes) * self._lanes


class NativeEngine(SteppedEngine):
    """Steps in native code. Raises ValueError where there is none for this machine."""

    name = "native"

    @staticmethod
    def stored(dtype: torch.dtype) -> torch.dtype:
        """How weights of this type are read; types that native.cpp does not know are copied to float32."""
        return dtype if dtype == torch.bfloat16 else torch.float32

    def __init__(self, gpt: GPT, run: Run, kept: Kept, library: ctypes.CDLL | BuildError | None = None) -> None:
        """library: instead of the one built for this CPU."""
        super().__init__(gpt, run, kept)
        self.library = built() if library is None else library
        if isinstance(self.library, BuildError):
            raise ValueError(f"--engine {self.name} is not there: {self.library}; use --engine packed")
        dtype, threads = self.stored(gpt.norm.weight.dtype), torch.get_num_threads()
        key = (run.rows, dtype, threads, self.library.lanes())
        self.weights = kept.get("native", key, lambda: _NativeWeights(self.library, gpt, dtype, run.rows, threads))

    def trunk(self, x: Tensor, p: int) -> Tensor:
        return self._step(self.weights.trunk, x, p, self.weights.turns[p].data_ptr(), x.shape[1])

    def head(self, x: Tensor, k: int) -> Tensor:
        return self._step(self.weights.head, x, k, None, self.weights.head.V)

    def _step(self, stack: _Stack, x: Tensor, p: int, turn: int | None, width: int) -> Tensor:
        """x (rows, C) → (rows, width) float32."""
        if not 0 <= p < stack.length or len(x) > self.run.rows:
            raise IndexError(f"there is no position {p} of {stack.length}, or no row {len(x)} of {self.run.rows}")
        x = x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)  # it is overwritten
        y = torch.empty(len(x), width, dtype=torch.float32, device="cpu")
        self.library.step(stack, len(x), p, x.data_ptr(), turn, y.data_ptr(), self.weights.scratch.data_ptr())
        return y


class Int8Engine(NativeEngine):
    """Steps over weights of one byte, each row of a matrix rounded symmetrically with a scale of its own.

    That moves logits by about a hundredth of their spread: codes are not those of the other engines, so it is never
    chosen by itself.
    """

    name = "int8"

    @staticmethod
    def stored(dtype: torch.dtype) -> torch.dtype:
        return torch.int8
