"""The views of a picture that code shards hold."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llamagen_unitok.runtime.distributed import World
from llamagen_unitok.training.images import VIEWS, PictureViews, ten_crop
from llamagen_unitok.training.sources import SourceOptions, open_source
from tokenizer.images import adm_centre_crop


@given(width=st.integers(20, 90), height=st.integers(20, 90), crop_range=st.sampled_from([1.0, 1.05, 1.1, 1.5]))
@settings(deadline=None, max_examples=25)
def test_ten_crops_are_corners_and_middle_of_the_enlarged_adm_crop_and_of_its_mirror_image(width, height, crop_range):
    rng = np.random.default_rng(width * 100 + height)
    picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    size, large = 20, int(20 * crop_range)
    square = np.asarray(adm_centre_crop(picture, large))
    far, mid = large - size, round((large - size) / 2)
    places = [(0, 0), (0, far), (far, 0), (far, far), (mid, mid)]
    both = [square, square[:, ::-1]]
    ten = [side[top : top + size, left : left + size] for side in both for top, left in places]
    views = [np.asarray(view) for view in ten_crop(picture, size, crop_range)]
    for view, expected in zip(views, ten, strict=True):
        assert np.array_equal(view, expected)


def test_two_crop_ranges_are_two_sets_of_ten_views(tmp_path):
    (tmp_path / "ant").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (70, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "ant" / "0.png")
    source = open_source(tmp_path, SourceOptions(), World(0, 1, torch.device("cpu")))
    both = VIEWS["ten-crop"]([1.1, 1.05])
    assert len(set(both.names)) == 20
    views = PictureViews(source, 48, both)[0]
    for start, crop_range in ((0, 1.1), (10, 1.05)):
        alone = PictureViews(source, 48, VIEWS["ten-crop"]([crop_range]))[0]
        assert np.array_equal(views[start : start + 10], alone)
    assert not np.array_equal(views[:10], views[10:])
