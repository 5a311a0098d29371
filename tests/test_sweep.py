"""Sweeps: every combination once, nothing twice, the same table after a kill, and a report of what was measured."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import sweep
from llamagen_unitok.evaluation import figures, samples
from llamagen_unitok.evaluation.report import pareto_front
from llamagen_unitok.evaluation.sweep import GOLDEN, by_scale, golden_section, grid
from tests.tiny_extractor import NamelessExtractor, TinyExtractor, pictures


@pytest.fixture(autouse=True)
def tiny_extractors(monkeypatch):
    monkeypatch.setitem(figures.EXTRACTORS, "inception", TinyExtractor)
    monkeypatch.setitem(figures.EXTRACTORS, "efficientnet-lite0", NamelessExtractor)


@pytest.fixture
def run(bundle, tmp_path, monkeypatch, capsys):
    """Run sweep.py on the tiny bundle: arguments → (exit code, stdout, stderr); OUT is ./sweep."""
    monkeypatch.chdir(tmp_path)
    np.savez("real.npz", arr_0=pictures(40, seed=3, size=48))

    def call(*arguments) -> tuple[int, str, str]:
        fixed = ["--checkpoint", bundle, "--reference", "real.npz", "--out", "sweep", "--device", "cpu"]
        try:
            code = sweep.main([*map(str, [*fixed, "--batch-size", 5, *arguments])])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def rows() -> list[dict]:
    return [json.loads(line) for line in Path("sweep/results.jsonl").read_text().splitlines()]


GRID = ["--cfg", "1.0,1.5", "--temperature", "0.9,1.0", "--num-samples", "15"]


def test_a_grid_gives_a_row_a_combination_with_plots_and_report(run):
    code, out, err = run(*GRID)
    assert code == 0, err
    table = rows()
    assert [(row["cfg_scale"], row["temperature"]) for row in table] == [(1.0, 0.9), (1.0, 1.0), (1.5, 0.9), (1.5, 1.0)]
    wanted = {"FID", "sFID", "IS", "precision", "recall", "KID", "generator_hash", "weights_hash", "code_version"}
    assert all(wanted <= row.keys() and math.isfinite(row["FID"]) for row in table)
    with open("sweep/results.csv", newline="") as file:
        assert [float(row["FID"]) for row in csv.DictReader(file)] == [row["FID"] for row in table]
    report = Path("sweep/report.md").read_text()
    best = min(table, key=lambda row: row["FID"])
    assert f"**{best['FID']:.4g}** at cfg {best['cfg_scale']:g}, temperature {best['temperature']:g}" in report
    for name in ("guidance.png", "precision_recall.png", "front.png", "best.png"):
        assert f"({name})" in report
        with Image.open(f"sweep/{name}") as picture:
            assert np.asarray(picture.convert("RGB")).std() > 5
    assert "4 settings measured now, 4 in the table" in out
    assert list(Path("sweep/samples").iterdir()) == []
    assert len(list(Path("sweep/pictures").iterdir())) == 4


def test_a_killed_sweep_started_again_gives_the_same_table_and_samples_nothing_twice(run, monkeypatch):
    run(*GRID)
    whole = Path("sweep/results.csv").read_bytes()
    Path("sweep").rename("whole")
    made, killed, real = [], [], samples.generate
    monkeypatch.setattr(samples, "PART_PICTURES", 5)

    def until_killed(gpt, labels, **settings):
        batch = (settings["cfg_scale"], settings["temperature"], tuple(settings["indices"]))
        if len(made) == 5 and not killed:  # before the third batch of the second setting
            killed.append(batch)
            raise KeyboardInterrupt
        made.append(batch)
        return real(gpt, labels, **settings)

    monkeypatch.setattr(samples, "generate", until_killed)
    assert run(*GRID)[0] == 130
    assert len(rows()) == 1
    code, out, err = run(*GRID)
    assert code == 0, err
    assert Path("sweep/results.csv").read_bytes() == whole
    assert len(set(made)) == len(made) == 12 and killed[0] in made
    assert "3 settings measured now, 4 in the table" in out
    code, out, _ = run(*GRID)
    assert code == 0 and "0 settings measured now" in out and len(made) == 12


def test_refining_searches_between_the_neighbours_of_the_best_scale_and_confirms_with_more_samples(run):
    code, _, err = run("--cfg", "0.5,1.0,3.0", "--budget", 10, "--refine", 3, "--num-samples", 20, "--keep-samples")
    assert code == 0, err
    table = rows()
    quick = [row for row in table if row["num_samples"] == 10]
    assert len(quick) == 6 and len(table) == 7
    scales = [row["cfg_scale"] for row in quick]
    best = min(quick[:3], key=lambda row: row["FID"])["cfg_scale"]
    low, high = {0.5: (0.5, 1.0), 1.0: (0.5, 3.0), 3.0: (1.0, 3.0)}[best]
    assert all(low < scale < high for scale in scales[3:])
    assert table[-1]["num_samples"] == 20
    assert table[-1]["cfg_scale"] == min(quick, key=lambda row: row["FID"])["cfg_scale"]
    assert len(list(Path("sweep/samples").glob("*.npz"))) == 7


def test_another_extractors_figures_are_rows_of_their_own_under_their_own_name(run):
    run("--num-samples", 10)
    code, out, err = run("--num-samples", 10, "--features", "efficientnet-lite0")
    assert code == 0, err
    first, second = rows()
    assert "FID" in first and "FID" not in second and "FD-nameless" in second
    assert "FID" not in Path("sweep/report.md").read_text()
    assert "FD-nameless" in out


@given(centre=st.floats(0.5, 7.5), evaluations=st.integers(2, 14))
def test_golden_section_closes_in_on_a_valley_by_the_golden_ratio(centre, evaluations):
    asked = []

    def valley(x):
        asked.append(x)
        return (x - centre) ** 2

    *_, best = golden_section(valley, 0.0, 8.0, evaluations)
    width = 8.0 * GOLDEN ** (evaluations - 1)
    assert abs(best - centre) <= width + 0.02  # scales are rounded to three digits
    assert len(asked) == len(set(asked)) <= evaluations


def test_groups_differ_in_guidance_only(bundle):
    settings = grid([str(bundle)], {"cfg_scale": [1.0, 2.0], "temperature": [1.0, 0.5]}, seed=0)
    groups = by_scale(settings)
    assert [sorted(group) for group in groups] == [[1.0, 2.0], [1.0, 2.0]]
    assert {setting.sampling.temperature for setting in groups[0].values()} == {1.0}


def test_the_front_is_what_no_other_point_beats():
    points = [(1, 1), (2, 2), (3, 3), (2, 3), (0, 5)]
    assert pareto_front(points) == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cfg", "1,x"], "not a list of numbers"),
        (["--cfg", "nan"], "--cfg"),
        (["--top-k", "-1"], "--top-k"),
        (["--cfg-schedule", "none"], "--cfg-schedule"),
        (["--num-samples", "0"], "--num-samples"),
        (["--refine", "-1"], "--refine"),
        (["--checkpoint", "./nowhere"], "no model folder"),
        (["--reference", "gone.npz"], "gone.npz"),
        (["--out", "real.npz"], "real.npz"),
    ],
)
def test_wrong_input_ends_in_one_line_before_any_work(run, monkeypatch, arguments, message):
    monkeypatch.setattr(samples, "generate", lambda *a, **k: pytest.fail("generated"))
    code, _, err = run(*arguments)
    assert code == 2 and message in err and len(err.splitlines()) == 1


def test_guidance_without_a_null_class_is_refused_before_any_work(run, bundle_without_null_class):
    code, _, err = run("--checkpoint", bundle_without_null_class, "--cfg", "1,2")
    assert code == 2 and "null class" in err
    assert not Path("sweep/results.jsonl").exists()


def test_a_damaged_table_is_named(run):
    Path("sweep").mkdir()
    Path("sweep/results.jsonl").write_text('{"key": "a"}\n{"ke')
    code, _, err = run("--num-samples", 5)
    assert code == 2 and "results.jsonl, line 2" in err
