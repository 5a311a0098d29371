"""A sweep's report: what is compared with what, what is said of guidance, and labels that can be read."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from llamagen_unitok.evaluation.report import comparable, differing, guidance_sentence, labelled_lines, write_report
from llamagen_unitok.evaluation.sweep_plots import plot_scatter
from tests.tiny_extractor import TinyExtractor

DEFAULTS = {
    "checkpoint": "a", "cfg_scale": 1.0, "cfg_schedule": "constant", "cfg_power": 1.0, "cfg_interval": None,
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_samples": 100, "seed": 0, "labels": "balanced", "batch_size": 32,
    "engine": "packed", "decoder": "plain", "dtype": "float32", "device": "cpu", "generator_hash": "1" * 64,
    "tokenizer_hash": "2" * 64, "extractor": "tiny", "FID": 10.0, "IS": 5.0, "precision": 0.5, "recall": 0.5,
    "warnings": [],
}  # fmt: skip


def row(**changes) -> dict:
    made = {**DEFAULTS, **changes}
    return {"key": str(sorted((name, str(value)) for name, value in made.items())), **made}


CONDITIONS = {
    "num_samples": 50, "seed": 1, "labels": "random", "resize": {"side": 256, "method": "area"}, "batch_size": 8,
    "engine": "eager", "decoder": "fast", "dtype": "bfloat16", "device": "cuda", "gpu": "H100",
    "generator_hash": "3" * 64, "tokenizer_hash": "4" * 64,
}  # fmt: skip


@pytest.mark.parametrize("name", CONDITIONS)
def test_rows_that_differ_in_a_condition_are_not_compared_and_show_it(tmp_path, name):
    """The row of another condition has the least distance, yet the others keep a best one of their own."""
    other = row(cfg_scale=2.0, FID=1.0, **{name: CONDITIONS[name]})
    rows = [row(), row(cfg_scale=2.0, FID=8.0), row(cfg_scale=3.0, FID=9.0), other]
    assert differing(rows) == [name]
    assert comparable(rows) == [rows[:3], [other]]
    report = write_report(rows, TinyExtractor(), tmp_path).read_text()
    assert "do not compare" in report and "**8** at cfg 2" in report and "**1** at cfg 2" in report
    heads, values = {"resize": ("resize", "256 area"), "gpu": ("GPU", "H100")}.get(name, (None, None))
    table = [line for line in report.splitlines() if line.startswith("|")]
    if heads:
        assert heads in table[0] and sum(values in line for line in table) == 1
    assert all(len(line.split("|")) == len(table[0].split("|")) for line in table)
    assert "FID falls from 10 without guidance to 8 at 2" in report


def test_bundles_with_models_of_their_own_are_compared():
    rows = [row(), row(checkpoint="b", generator_hash="5" * 64, tokenizer_hash="6" * 64)]
    assert differing(rows) == [] and comparable(rows) == [rows]


def test_lines_are_joined_within_settings_and_start_without_guidance():
    plain, steady, growing = row(), row(cfg_scale=2.0), row(cfg_scale=2.0, cfg_schedule="linear")
    assert labelled_lines([plain, steady, growing]) == [
        ("schedule constant", [plain, steady]),
        ("schedule linear", [plain, growing]),
    ]


def test_what_guidance_does_is_said_from_the_numbers():
    line = [row(), row(cfg_scale=1.5, FID=7.0, IS=6.0), row(cfg_scale=3.0, FID=30.0, IS=4.0)]
    assert guidance_sentence(line, "", "FID", "IS") == (
        "Over the guidance scales 1, 1.5, 3, FID falls from 10 without guidance to 7 at 1.5, "
        "and IS rises from 5 without guidance to 6 at 1.5."
    )
    worse = [row(), row(cfg_scale=3.0, FID=30.0, IS=4.0)]
    assert guidance_sentence(worse, "temperature 1", "FID", "IS") == (
        "Over the guidance scales 1, 3 (temperature 1), FID is nowhere below its 10 without guidance and is 30 at 3, "
        "and IS is nowhere above its 5 without guidance and is 4 at 3."
    )
    assert guidance_sentence([row()], "", "FID", "IS") == ""


def test_a_figure_that_some_rows_lack_is_shown_for_the_others(tmp_path):
    rows = [row(), row(cfg_scale=2.0, KID=0.25)]
    report = write_report(rows, TinyExtractor(), tmp_path).read_text()
    assert "| KID |" in report and "| 0.25 |" in report and "| - |" in report


def test_labels_cover_no_point_and_no_other_label():
    random = np.random.default_rng(0)
    places = np.concatenate([random.normal(0, 1, (12, 2)), random.normal(6, 0.2, (6, 2))])
    rows = [row(cfg_scale=1 + i / 4, IS=x, FID=y) for i, (x, y) in enumerate(places.tolist())]
    figure = plot_scatter([("", rows)], "IS", "FID", front=True)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in axes.texts]  # without the lines to them
    assert [text.get_text() for text in axes.texts] == [f"cfg {1 + i / 4:g}" for i in range(len(rows))]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    points = axes.transData.transform([(r["IS"], r["FID"]) for r in rows])
    assert not any(box.contains(x, y) for box in boxes for x, y in points)
    frame = axes.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
