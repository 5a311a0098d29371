"""What convert.py makes computes the published numbers, and making it takes little memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import convert
from llamagen_unitok import ImageGenerator
from modelfolder import content_hash
from tests.published_files import GOLDEN, WRAPPINGS, ddp_file, save, seeded_state, vq_file
from tokenizer.images import to_unit

PEAK = """
import sys
from pathlib import Path
import torch
from llamagen_unitok.published.convert import Conversion, convert
import modelfolder.folder
modelfolder.folder.SHARD_SIZE = sys.argv[4]

def memory(name):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024

before = memory("VmRSS")
convert([Path(sys.argv[1]), Path(sys.argv[2])], Path(sys.argv[3]), Conversion(dtype=sys.argv[5]), device="cpu")
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from Linux's /proc")
@pytest.mark.parametrize(
    ("size", "dtype"),
    [("B", "fp32"), ("B", "bf16"), pytest.param("L", "fp32", marks=pytest.mark.slow)],
)
def test_peak_memory_stays_below_1_3_times_the_file(tmp_path, size, dtype):
    """With shards in the proportion to the file that 512 MB have to XXL's 5.6 GB. B: 0.4 GB, L: 1.4 GB."""
    from llamagen_unitok import GPT, GPTConfig

    with torch.device("meta"):
        gpt = GPT(GPTConfig.preset(size, num_codebooks=1, depth_layers=0, codebook_size=11, num_positions=16))
    state = {name: torch.full(tensor.shape, 0.01) for name, tensor in gpt.state_dict().items()}
    generator, tokenizer = save(ddp_file(state), tmp_path / "g.pt"), save(vq_file(), tmp_path / "vq.pt")
    del state
    file = generator.stat().st_size
    arguments = [generator, tokenizer, tmp_path / "bundle", f"{file // 11_000_000}MB", dtype]
    done = subprocess.run([sys.executable, "-c", PEAK, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(f"peak {int(done.stdout) / file:.2f} × the file")
    # What torch and its kernels take for themselves is nothing beside XXL.
    assert int(done.stdout) < 1.3 * file + 60e6


def blk(field: np.ndarray, kind: str, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Golden order (B, K, L), or (B, L) of one codebook → (B, L, K)."""
    tensor = torch.from_numpy(field).to(dtype)
    return tensor.unsqueeze(2) if kind == "llamagen" else tensor.transpose(1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llamagen", "unitok"])
def test_golden_models_meet_their_numbers_through_files_of_every_layout(tmp_path, kind):
    """GPT-B with seeded weights, written as published, converted, loaded as a bundle: loss, greedy sequences, codes of
    the tokenizer, and its pixels.
    """
    from llamagen_unitok.sampling import decode
    from llamagen_unitok.sampling.guidance import guidance_scales

    if kind == "llamagen":
        state = seeded_state("llamagen_gpt_b_keys.json")
        tokenizer = save({"model": seeded_state("llamagen_vq16_keys.json")}, tmp_path / "vq_ds16_c2i.pt")
    else:
        state = seeded_state("unitok_gpt_b_cls01_keys.json")
        layout = json.loads((GOLDEN / "unitok_vitamin_base_keys.json").read_text())
        published = {"args": layout["config"], "trainer": {"unitok": seeded_state("unitok_vitamin_base_keys.json")}}
        tokenizer = save(published, tmp_path / "unitok_tokenizer.pth")
    hashes = set()
    for number, wrap in enumerate(WRAPPINGS.values()):
        published = wrap(state) if number else ddp_file(state, image_size=256)
        if number == len(WRAPPINGS) - 1:
            published["model"]["freqs_cis"] = torch.zeros(257, 32, 2)
        generator = save(published, tmp_path / "gpt.pt")
        arguments = [generator, tokenizer, "--image-size", 256, "--out", tmp_path / "bundle", "--no-picture"]
        assert convert.main([*map(str, arguments), "--device", "cpu"]) == 0
        hashes.add(content_hash(tmp_path / "bundle" / "generator"))
    assert len(hashes) == 1
    bundle = ImageGenerator.from_pretrained(tmp_path / "bundle", device="cpu")
    with np.load(GOLDEN / f"{kind}_gpt_b_seed0.npz") as golden:
        expected, forced = (blk(golden[name], kind) for name in ("greedy_cfg2", "codes"))
        labels, loss = torch.from_numpy(golden["labels"]).long(), float(golden["eval_loss"])
    with torch.no_grad():
        assert bundle.gpt.loss(labels, forced).item() == pytest.approx(loss, abs=1e-5)
    scales = guidance_scales(256, 2.0)[: expected.shape[1]]
    assert decode(bundle.gpt, labels, lambda logits, position, codebook: logits.argmax(-1), scales).equal(expected)
    golden_name = "llamagen_vq16_seed0.npz" if kind == "llamagen" else "unitok_vitamin_base_seed0.npz"
    with np.load(GOLDEN / golden_name) as golden:
        codes, encoded, second = (blk(golden[name], kind) for name in ("random_codes", "codes", "codes_second"))
        clear = blk(golden["margin"], kind, torch.float32) > 2e-5
        pixels, stride = torch.from_numpy(golden["random_decoded"]), int(golden["pixel_stride"])
    with np.load(GOLDEN / "unitok_vitamin_base_seed0.npz") as golden:  # both tokenizers' goldens see these
        images = to_unit(torch.from_numpy(golden["image_uint8"]))
    found = bundle.tokenizer.encode(images)
    assert found[clear].equal(encoded[clear]) and ((found == encoded) | (found == second)).all()
    decoded = bundle.tokenizer.decode(codes)[:, :, ::stride, ::stride]
    torch.testing.assert_close(decoded, pixels.clamp(-1, 1), rtol=0, atol=3e-5)
