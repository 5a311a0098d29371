"""Training a tokenizer: images → codes → images (UniTok, section 3; loss weights of the published recipe)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from llamagen_unitok.runtime.checkpoint import find_checkpoint
from llamagen_unitok.runtime.distributed import World
from llamagen_unitok.training.images import TrainingPictures
from llamagen_unitok.training.loop import LoopConfig, train
from llamagen_unitok.training.losses import TOKENIZER_TERMS, weighted_sum
from tokenizer import UniTok, UniTokConfig
from tokenizer.images import psnr


@dataclass(frozen=True)
class TokenizerTraining:
    """Settings of a tokenizer run beside the loop's."""

    images: Path = field(metadata={"help": "folder with one subfolder of pictures for each class"})
    init: str | None = field(default=None, metadata={"help": "start from the weights of this bundle or tokenizer"})
    freeze_encoder: bool = field(
        default=False, metadata={"help": "train what follows the codes only, so that codes already made stay valid"}
    )
    crop_scale: float = field(default=1.0, metadata={"help": "smallest area of random crops, 0 to 1; 1 = centre crop"})
    flip: bool = field(default=False, metadata={"help": "mirror half of the pictures"})
    l1: float = field(default=0.2, metadata={"help": "weight of the mean absolute error"})
    l2: float = field(default=1.0, metadata={"help": "weight of the mean squared error"})
    vq: float = field(default=1.0, metadata={"help": "weight of the codebook and commitment terms"})
    restart_every: int = field(
        default=0, metadata={"help": "steps between moves of unused codebook entries onto features; 0 = never"}
    )
    restart_until: float = field(default=0.5, metadata={"help": "share of the run, 0 to 1, after which moves stop"})

    def __post_init__(self) -> None:
        if self.freeze_encoder and not self.init:
            raise ValueError("--freeze-encoder needs --init, the tokenizer whose encoder is kept")
        if not 0 < self.crop_scale <= 1:
            raise ValueError(f"--crop-scale must lie in (0, 1], not {self.crop_scale}")
        for name in TOKENIZER_TERMS:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name} must be 0 or above, not {getattr(self, name)}")
        if not any(getattr(self, name) for name in TOKENIZER_TERMS):
            raise ValueError(f"all weights of the loss are 0: give one of --{', --'.join(TOKENIZER_TERMS)}")
        if self.restart_every < 0:
            raise ValueError(f"--restart-every must be 0 or above, not {self.restart_every}")
        if not 0 <= self.restart_until <= 1:
            raise ValueError(f"--restart-until must lie in [0, 1], not {self.restart_until}")


class TokenizerObjective(nn.Module):
    """forward(images (B, 3, H, W)) → (loss, terms to log). Nothing is drawn per sample: `draws` are not looked at."""

    def __init__(self, tokenizer: UniTok, settings: TokenizerTraining, loop: LoopConfig):
        super().__init__()
        self.tokenizer = tokenizer.to(memory_format=torch.channels_last)
        self.weights = {name: getattr(settings, name) for name in TOKENIZER_TERMS}
        self.restart_every = 0 if settings.freeze_encoder else settings.restart_every
        if settings.freeze_encoder:
            tokenizer.freeze_encoder()
        # No term of the loss reads an embedding. Left trainable, what makes them would have no gradient: DDP would wait
        # for it for ever, and a checkpoint would lack its moments.
        tokenizer.freeze_embeddings()
        self.last_restart = int(settings.restart_until * loop.steps)
        self.seed = loop.seed
        self._latents: Tensor | None = None

    def forward(self, images: Tensor, draws: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        images = images.contiguous(memory_format=torch.channels_last)
        result = self.tokenizer(images)
        self._latents = result.latents.detach()
        loss, terms = weighted_sum(self.weights, result, images)
        with torch.no_grad():
            decibels = psnr(result.images.clamp(-1, 1), images).mean()
            usage = self.tokenizer.quantizer.usage().mean()
        return loss, {"loss": loss, **terms, "psnr": decibels, "usage": usage}

    def blocks(self) -> list[nn.Module]:
        """None: a tokenizer is small enough to be replicated."""
        return []

    @torch.no_grad()
    def after_step(self, step: int, world: World) -> None:
        """Move unused codebook entries, alike on every process."""
        done = step + 1
        if not self.restart_every or done % self.restart_every or done > self.last_restart:
            return
        quantizer = self.tokenizer.quantizer
        generator = torch.Generator().manual_seed(self.seed * 0x9E3779B1 + step)
        quantizer.restart_unused(self._latents, generator)
        for tensor in quantizer.state_dict().values():
            world.broadcast(tensor)


def train_tokenizer(
    config: UniTokConfig, settings: TokenizerTraining, loop: LoopConfig, *, out: Path, resume: str, world: World
) -> Path:
    """Train a tokenizer and leave it as a model folder; returns ``OUT/tokenizer``, rewritten at every checkpoint."""
    torch.manual_seed(loop.seed)
    tokenizer = UniTok(config)
    tokenizer.init_weights()
    if settings.init and world.share_outcome(lambda: find_checkpoint(out, resume)) is None:
        tokenizer.start_from(settings.init)
    pictures = TrainingPictures(
        settings.images, config.img_size, crop_scale=settings.crop_scale, flip=settings.flip, seed=loop.seed
    )

    def pass_on(state: dict[str, Tensor], step: int) -> None:
        with torch.device("meta"):
            passed = UniTok(config)
        passed.load_exactly({name.removeprefix("tokenizer."): tensor for name, tensor in state.items()}, out)
        passed.save_pretrained(out / "tokenizer")

    meta = {
        "model": dataclasses.asdict(config),
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k != "images"},
        "pictures": len(pictures),
    }
    train(
        TokenizerObjective(tokenizer, settings, loop),
        pictures,
        loop,
        out=out,
        resume=resume,
        world=world,
        meta=meta,
        on_save=pass_on,
    )
    return out / "tokenizer"
