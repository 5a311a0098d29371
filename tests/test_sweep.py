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
from llamagen_unitok.evaluation import figures, images, samples
from llamagen_unitok.evaluation import sweep as sweep_library
from llamagen_unitok.evaluation.sweep import GOLDEN, by_scale, golden_section, grid
from llamagen_unitok.evaluation.sweep_plots import pareto_front
from tests.compiler import AUTO_ON_CPU
from tests.conftest import NAMES
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
    np.savez("small.npz", arr_0=pictures(40, seed=3))
    np.savez("statistics.npz", mu=np.zeros(6), sigma=np.eye(6))
    np.savez("damaged.npz", mu=np.full(6, np.nan), sigma=np.eye(6))

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


def test_a_sweep_for_one_metric_has_the_distance_that_best_settings_are_chosen_by(run):
    code, _, err = run(*GRID, "--metrics", "recall")
    assert code == 0, err
    assert all({"FID", "precision", "recall"} <= row.keys() and "IS" not in row for row in rows())
    assert not Path("sweep/front.png").exists() and Path("sweep/guidance.png").exists()


@pytest.mark.parametrize("kept", [False, True])
def test_a_row_that_lacks_a_figure_asked_for_is_measured_again_and_loses_none(run, monkeypatch, kept):
    keep = ["--keep-samples"] if kept else []
    assert run(*GRID, "--metrics", "recall", *keep)[0] == 0
    before, sampled, real = rows(), [], samples.generate
    monkeypatch.setattr(samples, "generate", lambda *a, **k: sampled.append(1) or real(*a, **k))
    code, out, err = run(*GRID, "--metrics", "KID", *keep)
    assert code == 0, err
    assert "4 settings measured now, 4 in the table" in out
    assert bool(sampled) is not kept
    for old, new in zip(before, rows(), strict=True):
        assert {"KID", "FID", "recall"} <= new.keys()
        assert all(new[name] == old[name] for name in ("key", "FID", "recall", "generator_hash"))
    assert "0 settings measured now" in run(*GRID, "--metrics", "KID,recall")[1]


def test_a_row_without_the_distance_is_not_reported_on(run):
    """Such rows come from versions that did not always measure it."""
    assert run(*GRID)[0] == 0
    table = rows()
    del table[0]["FID"]
    Path("sweep/results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    code, _, err = run("--cfg", "1.5", "--temperature", "0.9", "--num-samples", 15)
    assert code == 0, err
    assert len([line for line in Path("sweep/report.md").read_text().splitlines() if line.startswith("| 1")]) == 3


def test_settings_without_effect_are_sampled_once(bundle):
    values = {
        "cfg_scale": [1.0, 2.0], "cfg_schedule": ["constant", "power-cosine"], "cfg_power": [1.0, 2.0],
        "cfg_interval": [None, 3], "temperature": [0.0, 1.0], "top_k": [0, 5],
    }  # fmt: skip
    settings = [setting.sampling for setting in grid([str(bundle)], values, seed=0)]
    plain = [(one.temperature, one.top_k) for one in settings if one.cfg_scale == 1]
    assert sorted(plain) == [(0.0, 0), (1.0, 0), (1.0, 5)]
    # at scale 2: constant has no power, power-cosine has two, each with and without an interval
    assert len([one for one in settings if one.cfg_scale == 2]) == 3 * 2 * len(plain)
    assert len(set(settings)) == len(settings)


def test_a_list_of_intervals_may_hold_none(run):
    code, _, err = run("--cfg", "2", "--cfg-interval", "none,2", "--num-samples", 10)
    assert code == 0, err
    assert [row["cfg_interval"] for row in rows()] == [None, 2]


def test_what_has_no_guidance_is_on_the_line_of_every_schedule(bundle):
    values = {"cfg_scale": [1.0, 2.0, 3.0], "cfg_schedule": ["constant", "linear"]}
    first, second = by_scale(grid([str(bundle)], values, seed=0))
    assert sorted(first) == sorted(second) == [1.0, 2.0, 3.0] and first[1.0] == second[1.0]
    assert second[2.0].at_scale(2.5).sampling.cfg_schedule == "linear"
    assert second[2.0].at_scale(1.0) == second[1.0]


def test_a_budget_searches_unless_told_otherwise(run):
    code, _, err = run("--cfg", "0.5,3.0", "--budget", 10, "--num-samples", 12)
    assert code == 0, err
    assert len(rows()) == 2 + 4 + 1
    Path("sweep").rename("first")
    assert run("--cfg", "0.5,3.0", "--budget", 10, "--num-samples", 12, "--refine", 0)[0] == 0
    assert len(rows()) == 2 + 1


def test_a_finished_sweep_reads_no_weights(run, monkeypatch):
    assert run(*GRID)[0] == 0
    monkeypatch.setattr(sweep_library.ImageGenerator, "from_pretrained", lambda *a, **k: pytest.fail("read"))
    code, out, err = run(*GRID)
    assert code == 0, err
    assert "0 settings measured now" in out


def test_the_reference_is_hashed_once_in_a_sweep(run, monkeypatch):
    hashed, real = [], images.file_hash
    monkeypatch.setattr(images, "file_hash", lambda file: hashed.append(file) or real(file))
    assert run(*GRID)[0] == 0
    assert hashed == [Path("real.npz")]


def test_the_network_gets_as_many_pictures_at_a_time_as_asked(run, monkeypatch):
    given = []

    class Watched(TinyExtractor):
        def __call__(self, pixels):
            given.append(len(pixels))
            return super().__call__(pixels)

    monkeypatch.setitem(figures.EXTRACTORS, "inception", Watched)
    assert run("--num-samples", 10, "--features-batch-size", 8)[0] == 0
    assert given == [8] * 5 + [8, 2]  # the reference, the samples


def test_a_settings_picture_shows_samples_of_all_classes(run, monkeypatch):
    monkeypatch.setattr(sweep_library, "SHOWN", 5)
    shown = []
    real = sweep_library.labelled_grid
    monkeypatch.setattr(sweep_library, "labelled_grid", lambda groups: shown.append(groups) or real(groups))
    assert run("--num-samples", 25, "--keep-samples")[0] == 0
    (groups,) = shown
    assert [name for name, _ in groups] == NAMES
    with np.load(next(Path("sweep/samples").glob("*.npz"))) as made:
        for label, (_, (picture,)) in enumerate(groups):
            assert any(np.array_equal(picture, one) for one in made["arr_0"][made["label"] == label])


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
        (["--metrics", "FIT"], "no metric 'FIT'"),
        (["--num-samples", "9"], "IS needs at least 10 samples, not 9"),
        (["--num-samples", "20", "--budget", "9"], "IS needs at least 10 samples, not 9"),
        (["--resize", "24"], "pictures of 48×48 pixels, the samples of 24×24"),
        (["--reference", "small.npz"], "pictures of 8×8 pixels, the samples of 48×48"),
        (["--reference", "damaged.npz"], "mu and sigma are no finite mean and covariance of 6 features"),
        (["--reference", "statistics.npz", "--metrics", "recall"], "it cannot give pool_rows"),
        (["--features", "efficientnet-lite0", "--metrics", "sFID"], "gives no spatial features"),
        (["--cfg-interval", "2,some"], "'2,some' is not a list of values"),
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


def test_rows_name_engine_decoder_and_batch_size_and_a_proposal_stays_that_of_the_table(run, monkeypatch):
    monkeypatch.setattr(sweep_library, "propose_batch_size", lambda gpt, guided: 4)
    flags = ["--num-samples", "15", "--batch-size", "auto", "--decoder", "fast"]
    assert run(*flags, "--cfg", "1.0")[0] == 0
    monkeypatch.setattr(sweep_library, "propose_batch_size", lambda gpt, guided: 2)
    code, out, err = run(*flags, "--cfg", "1.0,1.5")
    assert code == 0, err
    assert "1 settings measured now, 2 in the table" in out
    assert [(row["batch_size"], row["engine"], row["decoder"]) for row in rows()] == [(4, AUTO_ON_CPU, "fast")] * 2
    assert run(*flags, "--cfg", "1.0", "--engine", "eager")[0] == 0
    assert rows()[-1]["engine"] == "eager"
    code, _, err = run("--batch-size", "some")
    assert code == 2 and "'some' is neither a whole number nor auto" in err
