"""Streamed .npz files: what numpy reads and writes, cut in any way, and nothing half-written."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagen_unitok.evaluation.npz import ArrayStream, NpzReader, write_npz

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 4, 5, 3), dtype=np.uint8)


@given(cuts=st.lists(st.integers(0, 10), max_size=5), rows=st.integers(1, 12))
@settings(deadline=None, max_examples=25)
def test_the_file_does_not_depend_on_how_it_was_cut(tmp_path_factory, cuts, rows):
    folder = tmp_path_factory.mktemp("npz")
    stream = ArrayStream(PIXELS.shape, PIXELS.dtype, np.split(PIXELS, sorted(cuts)))
    write_npz(folder / "cut.npz", {"arr_0": stream, "label": np.arange(10)})
    write_npz(folder / "whole.npz", {"arr_0": PIXELS, "label": np.arange(10)})
    assert (folder / "cut.npz").read_bytes() == (folder / "whole.npz").read_bytes()
    read = list(NpzReader(folder / "cut.npz").batches("arr_0", rows))
    assert all(len(batch) == rows for batch in read[:-1])
    np.testing.assert_array_equal(np.concatenate(read), PIXELS)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_part_is_read_by_its_rows(tmp_path, save):
    save(tmp_path / "a.npz", arr_0=PIXELS)
    for start, stop in ((0, 4), (3, 8), (7, None), (9, 50), (5, 5)):
        read = list(NpzReader(tmp_path / "a.npz").batches("arr_0", 2, start, stop))
        np.testing.assert_array_equal(np.concatenate([PIXELS[:0], *read]), PIXELS[start:stop])


def test_numpy_reads_what_we_write_and_we_read_what_numpy_writes(tmp_path):
    write_npz(tmp_path / "ours.npz", {"arr_0": PIXELS, "meta": np.array("a note")})
    with np.load(tmp_path / "ours.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], PIXELS)
        assert str(file["meta"]) == "a note"
    np.savez_compressed(tmp_path / "theirs.npz", arr_0=PIXELS, mu=np.ones(3))
    reader = NpzReader(tmp_path / "theirs.npz")
    assert reader.shapes == {"arr_0": PIXELS.shape, "mu": (3,)}
    np.testing.assert_array_equal(reader.read("arr_0"), PIXELS)


@pytest.mark.parametrize("bad", [[PIXELS[:3]], [PIXELS, PIXELS[:1]], [PIXELS.astype(np.int64)], [PIXELS[:, :2]]])
def test_batches_that_do_not_fit_leave_no_file(tmp_path, bad):
    with pytest.raises(ValueError, match="arr_0"):
        write_npz(tmp_path / "a.npz", {"arr_0": ArrayStream(PIXELS.shape, PIXELS.dtype, bad)})
    assert not list(tmp_path.iterdir())


def test_damaged_files_and_missing_arrays_are_named(tmp_path):
    write_npz(tmp_path / "a.npz", {"arr_0": PIXELS})
    with pytest.raises(ValueError, match=r"no array 'label', only arr_0"):
        NpzReader(tmp_path / "a.npz").read("label")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:300])
    np.savez(tmp_path / "pickled.npz", arr_0=np.array([{}], dtype=object))
    for name in ("cut.npz", "pickled.npz", "none.npz"):
        with pytest.raises(ValueError, match=name):
            NpzReader(tmp_path / name)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), length=st.integers(1, 30))
@settings(deadline=None, max_examples=150)
def test_whatever_is_damaged_is_told_with_the_name_of_the_file(tmp_path_factory, save, place, byte, length):
    folder = tmp_path_factory.mktemp("npz")
    save(folder / "a.npz", arr_0=PIXELS, mu=np.ones(3))
    data = bytearray((folder / "a.npz").read_bytes())
    start = int(place * len(data))
    data[start : start + length] = bytes([byte]) * len(data[start : start + length])
    (folder / "a.npz").write_bytes(data)
    try:
        reader = NpzReader(folder / "a.npz")
        for name in reader.shapes:
            reader.read(name)
    except ValueError as error:
        assert "a.npz" in str(error) and "\n" not in str(error)


def test_an_unclosed_header_a_broken_stream_and_an_unknown_compression_are_told(tmp_path):
    """What numpy's tokenizer, zlib and zipfile raise by themselves is no ValueError."""
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=PIXELS)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"(10, 4, 5, 3)", b"(10, 4, 5, 3(", 1))
    with pytest.raises(ValueError, match=r"a\.npz cannot be read"):
        NpzReader(path)
    directory = bytearray(whole)
    directory[whole.rindex(b"PK\x01\x02") + 10] = 99
    path.write_bytes(directory)
    with pytest.raises(ValueError, match=r"a\.npz cannot be read"):
        NpzReader(path)
    np.savez_compressed(path, arr_0=np.random.default_rng(0).integers(0, 9, 100_000))
    packed = bytearray(path.read_bytes())
    packed[len(packed) // 2 : len(packed) // 2 + 200] = b"\xff" * 200
    path.write_bytes(packed)
    with pytest.raises(ValueError, match=r"a\.npz cannot be read"):
        NpzReader(path).read("arr_0")


def test_an_error_of_whoever_takes_the_batches_is_not_blamed_on_the_file(tmp_path):
    write_npz(tmp_path / "a.npz", {"arr_0": PIXELS})
    batches = NpzReader(tmp_path / "a.npz").batches("arr_0", 2)
    next(batches)
    with pytest.raises(RuntimeError, match="mine"):
        batches.throw(RuntimeError("mine"))
