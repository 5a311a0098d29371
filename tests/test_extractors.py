"""Networks: their table, and Inception's figures against torch-fidelity and against formulas on its features."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from llamagen_unitok.evaluation import extractors
from llamagen_unitok.evaluation.extractors import EXTRACTORS, make_extractor
from llamagen_unitok.evaluation.figures import evaluate_samples
from llamagen_unitok.evaluation.metrics import METRICS
from llamagen_unitok.evaluation.npz import write_npz
from tests.tiny_extractor import pictures

pytestmark = [
    pytest.mark.filterwarnings("ignore::llamagen_unitok.evaluation.figures.BiasedFigureWarning"),
    pytest.mark.usefixtures("own_cache"),
]


def test_a_pickle_that_runs_code_is_not_run(tmp_path, monkeypatch):
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(Runs(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights.pth cannot be read as weights"):
        make_extractor("inception", tmp_path / "weights.pth", check_hash=False)
    assert not (tmp_path / "ran").exists()


def test_the_table_names_networks_that_torch_fidelity_has():
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    assert set(EXTRACTORS) - {"inception", "efficientnet-lite0"} <= set(FEATURE_EXTRACTORS_REGISTRY)
    with pytest.raises(ValueError, match="no extractor 'resnet': choose from inception, efficientnet-lite0, vgg16"):
        make_extractor("resnet")


def test_another_network_of_torch_fidelity_goes_through_the_same_table(monkeypatch):
    import torch_fidelity.feature_extractor_vgg16 as module

    class SmallVGG(torch.nn.Module):
        def __init__(self, **options):
            super().__init__()
            torch.manual_seed(0)
            first, second, last = torch.nn.Linear(3, 16), torch.nn.Linear(16, 12), torch.nn.Linear(12, 4)
            rest = torch.nn.ReLU(), torch.nn.Dropout()
            self.classifier = torch.nn.Sequential(first, *rest, second, *rest, last)

        def forward(self, x):
            return self.classifier(x.mean(dim=(2, 3)))

    monkeypatch.setattr(module, "torchvision_load_pretrained_vgg16", SmallVGG)
    extractor = make_extractor("vgg16")
    features = extractor(pictures(2))
    assert (extractor.name, extractor.frechet_name, extractor.width) == ("vgg16", "FD-vgg16", 12)
    assert features.pool.shape == (2, 12) and features.logits is features.spatial is None
    assert extractor.weights_hash == make_extractor("vgg16").weights_hash and len(extractor.weights_hash) == 64
    with pytest.raises(ValueError, match="takes no file of weights"):
        make_extractor("vgg16", Path("weights.pth"))


def test_efficientnet_gives_its_own_figures_offline(tmp_path, capsys):
    random = np.random.default_rng(0)
    for name in ("samples", "real"):
        write_npz(tmp_path / f"{name}.npz", {"arr_0": random.integers(0, 256, (11, 16, 16, 3), dtype=np.uint8)})
    arguments = (tmp_path / "samples.npz", "--reference", tmp_path / "real.npz", "--features", "efficientnet-lite0")
    assert evaluate.main([*map(str, arguments), "--json", str(tmp_path / "figures.json"), "--device", "cpu"]) == 0
    record = json.loads((tmp_path / "figures.json").read_text())
    assert {"FD-EfficientNet", "IS-EfficientNet"} <= set(record["figures"])
    assert not {"FID", "sFID", "IS", "KID"} & set(record["figures"])
    assert "FD-EfficientNet of 11 samples is biased upwards" in capsys.readouterr().err
    extractor = make_extractor("efficientnet-lite0")
    pixels = random.integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    features = extractor(pixels)
    picture = Image.fromarray(pixels[1]).resize((224, 224), Image.Resampling.BICUBIC)
    image = torch.from_numpy(np.asarray(picture).copy()).float().permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        logits = extractor._network((image - 0.5) / 0.5)
    np.testing.assert_allclose(features.logits[1], logits[0].numpy(), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory) -> Path:
    """Seeded random weights of torch-fidelity's Inception, scaled so that signals neither die nor grow."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **o: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=False)
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, std=0.1)
    torch.nn.init.normal_(network.fc.weight, std=1)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


class AsTensors(torch.utils.data.Dataset):
    """Pictures for torch-fidelity: uint8 (3, H, W)."""

    def __init__(self, pixels):
        self.pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.pixels[i]


def fidelity_and_ours(weights: Path, folder: Path, metrics: list[str], **asked) -> tuple[dict, dict]:
    """Figures of 16 samples against 14 real pictures, by torch-fidelity and by us."""
    from torch_fidelity import calculate_metrics

    sets = [pictures(n, seed, size=20) for n, seed in ((16, 8), (14, 9))]
    for name, pixels in zip(("samples", "real"), sets, strict=True):
        write_npz(folder / f"{name}.npz", {"arr_0": pixels})
    theirs = calculate_metrics(
        input1=AsTensors(sets[0]), input2=AsTensors(sets[1]), feature_extractor_weights_path=str(weights), cuda=False,
        feature_extractor="inception-v3-compat", batch_size=8, kid_subset_size=14, verbose=False, cache=False,
        save_cpu_ram=True, **asked,
    )  # fmt: skip
    extractor = make_extractor("inception", weights, check_hash=False)
    ours = evaluate_samples(
        folder / "samples.npz", folder / "real.npz", extractor, metrics=metrics, batch_size=8, progress=False
    )
    return theirs, ours


def check_all_but_fid(theirs: dict, ours: dict) -> None:
    assert ours["IS"] - 1 == pytest.approx(theirs["inception_score_mean"] - 1, rel=1e-5)
    # the network does tell pictures apart; splits of one picture score 1, so the mean is little more
    assert ours["IS"] > 1 + 5e-4 and ours["precision"] > 0 and ours["recall"] > 0
    # float32 kernels on their side
    assert ours["KID"] == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)
    for name in ("precision", "recall"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-6)  # their mean is float32


def test_inception_figures_equal_torch_fidelity(inception_weights, tmp_path):
    metrics = ["IS", "KID", "precision-recall"]
    check_all_but_fid(*fidelity_and_ours(inception_weights, tmp_path, metrics, isc=True, kid=True, prc=True))


def low_rank_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of rows (n, E) and (m, E), without an E × E matrix.

    With centred rows A and B the trace of the root of AᵀA·BᵀB is the sum of the singular values of A Bᵀ, an n × m one.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    step = a.mean(axis=0) - b.mean(axis=0)
    a, b = ((rows - rows.mean(axis=0)) / np.sqrt(len(rows) - 1) for rows in (a, b))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return step @ step + (a**2).sum() + (b**2).sum() - 2 * cross


def test_fid_and_sfid_equal_a_formula_on_torch_fidelitys_own_features(inception_weights, tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(inception_weights)
    )
    places = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: places.append(output))
    pooled, spatial = {}, {}
    for name, count, seed in (("samples", 12, 8), ("real", 9, 9)):
        pixels = pictures(count, seed, size=20)
        write_npz(tmp_path / f"{name}.npz", {"arr_0": pixels})
        with torch.no_grad():
            pooled[name] = network(torch.from_numpy(pixels).movedim(-1, 1))[0].numpy()
        spatial[name] = places.pop()[:, :7].permute(0, 2, 3, 1).reshape(count, 7 * 17 * 17).numpy()
    ours = evaluate_samples(
        tmp_path / "samples.npz",
        tmp_path / "real.npz",
        make_extractor("inception", inception_weights, check_hash=False),
        metrics=["FID", "sFID"],
        batch_size=5,
        progress=False,
    )
    assert ours["FID"] == pytest.approx(low_rank_distance(pooled["samples"], pooled["real"]), rel=1e-5)
    assert ours["sFID"] == pytest.approx(low_rank_distance(spatial["samples"], spatial["real"]), rel=1e-5)
    assert ours["FID"] > 0 and ours["sFID"] > 0


@pytest.mark.slow
def test_fid_and_all_other_figures_equal_torch_fidelity(inception_weights, tmp_path):
    theirs, ours = fidelity_and_ours(inception_weights, tmp_path, list(METRICS), isc=True, kid=True, prc=True, fid=True)
    check_all_but_fid(theirs, ours)
    assert ours["FID"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert ours["sFID"] > 0


def test_spatial_features_are_seven_channels_of_mixed_6_channels_last(inception_weights):
    """The branch computed by hand, from its input: convolution, batch norm, ReLU."""
    extractor = make_extractor("inception", inception_weights, check_hash=False)
    inputs = []
    branch = extractor._network.Mixed_6d.branch1x1
    branch.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    features = extractor(pictures(2))
    assert features.pool.shape == (2, 2048) and features.logits.shape == (2, 1008)
    assert features.spatial.shape == (2, 2023)
    x = torch.einsum("oi,bihw->bhwo", branch.conv.weight[:7, :, 0, 0], inputs[0])
    norm = branch.bn
    x = (x - norm.running_mean[:7]) / (norm.running_var[:7] + norm.eps).sqrt() * norm.weight[:7] + norm.bias[:7]
    np.testing.assert_allclose(features.spatial, x.clamp_min(0).flatten(1).numpy(), rtol=1e-3, atol=1e-4)
    assert extractor.weights_hash == extractors.file_hash(inception_weights)
    weight = extractor._network.fc.weight.numpy()
    np.testing.assert_allclose(features.logits, features.pool @ weight.T, rtol=1e-3, atol=1e-4)
