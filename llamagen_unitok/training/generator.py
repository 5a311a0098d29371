"""Training a generator: code shards → GPT (LlamaGen, arXiv 2406.06525; UniTok, arXiv 2502.20321, section 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from llamagen_unitok.config import GPTConfig
from llamagen_unitok.gpt import GPT
from llamagen_unitok.runtime.distributed import World
from llamagen_unitok.training.data import CodeShards, TrainingCodes
from llamagen_unitok.training.loop import LoopConfig, train


@dataclass(frozen=True)
class GeneratorTraining:
    """Settings of a generator run beside the loop's. Shapes that are None come from the size that --model names."""

    codes: Path = field(metadata={"help": "folder of code shards that extract_codes.py wrote"})
    model: str = field(default="B", metadata={"help": "size: B, L, XL, XXL, XXXL, 1B, 3B, 7B"})
    layers: int | None = field(default=None, metadata={"help": "trunk layers, if not the size's"})
    heads: int | None = field(default=None, metadata={"help": "attention heads, if not the size's"})
    width: int | None = field(default=None, metadata={"help": "channels, if not the size's"})
    depth_layers: int = field(default=4, metadata={"help": "layers of the depth head; 0 with one codebook"})
    ffn_multiple: int = field(default=256, metadata={"help": "feed-forward width is rounded up to a multiple of this"})
    dropout: float = field(default=0.1, metadata={"help": "on embeddings, residual branches and feed-forward, 0 to 1"})
    class_dropout: float = field(
        default=0.1, metadata={"help": "share of labels dropped, 0 to 1; 0 = a generator without guidance"}
    )
    init: str | None = field(default=None, metadata={"help": "start from the weights of this bundle or generator"})
    verify: bool = field(default=False, metadata={"help": "check the shards' checksums before training"})

    def __post_init__(self) -> None:
        for name in ("dropout", "class_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must lie in [0, 1), not {getattr(self, name)}")

    def architecture(self, shards: CodeShards) -> GPTConfig:
        """The generator for these codes."""
        changes = {name: value for name in ("layers", "heads", "width") if (value := getattr(self, name)) is not None}
        return GPTConfig.preset(
            self.model,
            **changes,
            num_classes=len(shards.meta.class_names),
            has_null_class=self.class_dropout > 0,
            num_positions=shards.meta.num_positions,
            num_codebooks=shards.meta.num_codebooks,
            codebook_size=shards.meta.codebook_size,
            depth_layers=self.depth_layers,
            ffn_multiple=self.ffn_multiple,
            token_dropout=self.dropout,
            residual_dropout=self.dropout,
            ffn_dropout=self.dropout,
        )


class GeneratorObjective(nn.Module):
    """forward(labels (B,), codes (B, L, K)) → (loss, terms to log)."""

    def __init__(self, gpt: GPT, class_dropout: float):
        super().__init__()
        self.gpt, self.class_dropout = gpt, class_dropout

    def forward(self, labels: Tensor, codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.gpt(labels, codes, return_loss=True, class_dropout=self.class_dropout)
        return loss, {"loss": loss}

    def after_step(self, step: int, world: World) -> None:
        """Nothing to look after."""


def train_generator(
    settings: GeneratorTraining,
    loop: LoopConfig,
    *,
    out: Path,
    resume: str,
    world: World,
    preview: Callable[[GPT, Path], None] | None = None,
) -> Path:
    """Train a generator and leave it as a model folder; returns ``OUT/generator``, rewritten at every checkpoint.

    preview(gpt, png): called with the weights to pass on after each checkpoint, to draw pictures of them. The trainer
    knows no tokenizer; whoever calls it does.
    """
    shards = CodeShards(settings.codes)
    if settings.verify:
        shards.verify()
    config = settings.architecture(shards)
    torch.manual_seed(loop.seed)
    gpt = GPT(config)
    if settings.init:
        gpt.start_from(settings.init)
    dataset = TrainingCodes(shards, loop.seed)

    def pass_on(state: dict[str, Tensor], step: int) -> None:
        with torch.random.fork_rng():
            passed = GPT(config)
        passed.load_state_dict({name.removeprefix("gpt."): tensor for name, tensor in state.items()})
        passed.save_pretrained(out / "generator")
        if preview:
            preview(passed.to(world.device).eval(), out / "previews" / f"step-{step:08d}.png")

    train(
        GeneratorObjective(gpt, settings.class_dropout),
        dataset,
        loop,
        out=out,
        resume=resume,
        world=world,
        meta={
            "model": dataclasses.asdict(config),
            "class_dropout": settings.class_dropout,
            "init": settings.init,
            "tokenizer_hash": shards.meta.tokenizer_hash,
            "pictures": len(shards),
        },
        on_save=pass_on,
    )
    return out / "generator"
