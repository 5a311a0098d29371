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
