"""The generator: a class-conditional autoregressive transformer over image positions, with a head over codebooks.

LlamaGen (arXiv 2406.06525) for the trunk, UniTok (arXiv 2502.20321) for summed code embeddings and the depth head.
- the class embedding is the whole prefix; the output at sequence position p predicts image token p
- RMSNorm, SwiGLU, 2-D rotary positions, optional grouped-query heads, no biases but the depth head's output
- K = 1 without depth layers is the original LlamaGen
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from llamagen_unitok.config import GPTConfig
from llamagen_unitok.cross_entropy import LossTerms, cross_entropy, loss_terms
from llamagen_unitok.depth_head import DepthHead, LinearHead
from llamagen_unitok.layers import Block, KVCache, RMSNorm
from llamagen_unitok.official import published_state, read_config
from llamagen_unitok.rope import RotaryTable
from modelfolder import ModelFolder
from modelfolder.folder import check_state


class ClassEmbedding(nn.Module):
    """The class prefix; the table's last row is the null class where there is one."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + config.has_null_class, config.width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class SummedEmbedding(nn.Module):
    """K > 1: a token's embedding is the sum of its codes' embeddings, each from its own table."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.codebooks = nn.ModuleList(
            nn.Embedding(config.codebook_size, config.width) for _ in range(config.num_codebooks)
        )

    def forward(self, codes: Tensor) -> Tensor:
        total = self.codebooks[0](codes[..., 0])
        for k, table in enumerate(self.codebooks[1:], start=1):
            total = total + table(codes[..., k])
        return total


class SingleEmbedding(nn.Embedding):
    """K = 1: one table, under the original LlamaGen's key."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config.codebook_size, config.width)

    def forward(self, codes: Tensor) -> Tensor:
        return super().forward(codes[..., 0])


class GPT(ModelFolder, nn.Module):
    """Labels (B,) int64 and codes (B, L, K) int64 → logits (B, L, K, V). State-dict keys are the published ones."""

    part = "generator"
    config_class = GPTConfig

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        several = config.num_codebooks > 1
        self.cls_embedding = ClassEmbedding(config)
        self.tok_embeddings = SummedEmbedding(config) if several else SingleEmbedding(config)
        self.dropout = nn.Dropout(config.token_dropout)
        self.rope = RotaryTable(config.grid, config.head_width, config.rope_base)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.output = DepthHead(config) if several else LinearHead(config)
        self.init_weights()

    def init_weights(self) -> None:
        """Set every parameter, as published, from the global random generator.

        linear and embedding weights  normal, std 0.02
        norm gains                    one
        output layer                  zero, its bias too: training starts at the uniform distribution
        """
        for module in self.modules():
            match module:
                case nn.Linear() | nn.Embedding():
                    nn.init.normal_(module.weight, std=0.02)
                case RMSNorm():
                    nn.init.ones_(module.weight)
        self.output.zero_output()

    def materialize_buffers(self) -> None:
        self.rope.materialize(self.norm.weight.device)

    def forward(
        self,
        labels: Tensor,
        codes: Tensor,
        *,
        return_loss: bool = False,
        return_terms: bool = False,
        head_share: float = 1.0,
        class_dropout: float = 0.0,
        generator: torch.Generator | None = None,
        draws: Tensor | None = None,
    ) -> Tensor | LossTerms:
        """Teacher-forced logits (B, L, K, V), or the mean loss with `return_loss`, or what it is the mean of with
        `return_terms`, (B, L, K) each; the same in train() and eval() but for dropout and `head_share`.

        labels: (B,) int64 in [0, num_classes), or `num_classes` for the null class.   codes: (B, L, K) int64 in [0, V).
        class_dropout: share of labels that become the null class, in train() only; drawn from `generator` (on the
            labels' device) or from the device's global one.
        head_share: in train() and where no logits are returned, the head sees this share of the positions only, at
            least one, without replacement; terms are then (B, n, K). Which ones follows from `draws`, (B,) float32
            uniform in [0, 1), one for each picture; default drawn from `generator`. Every position is as likely as any
            other, so the mean loss and its gradient keep their expectation. CSM (Sesame, 2025) trains its
            depth decoder so, on a sixteenth of the frames, but keeps the first codebook everywhere; here all K codes of
            a position go together.
        The loss goes through here, not through a method beside it, because DDP and FSDP average gradients only for
        what their wrapper's forward ran.
        Raises ValueError for codes of another shape, or for class_dropout without a null class.
        """
        expected = (labels.shape[0], self.config.num_positions, self.config.num_codebooks)
        if tuple(codes.shape) != expected:
            raise ValueError(f"codes have shape {tuple(codes.shape)}, the generator needs (B, L, K) = {expected}")
        if class_dropout and not self.config.has_null_class:
            raise ValueError(
                f"class_dropout {class_dropout} needs a null class (has_null_class=True); this generator has none"
            )
        if self.training and class_dropout:
            draws = torch.rand(labels.shape, generator=generator, device=labels.device)
            labels = labels.masked_fill(draws < class_dropout, self.config.num_classes)
        prefix = self.cls_embedding(labels).unsqueeze(1)  # (B, 1, C)
        x = torch.cat((prefix, self.tok_embeddings(codes[:, :-1])), dim=1)  # (B, L, C)
        hidden = self.trunk(self.dropout(x))
        if not (return_loss or return_terms):
            return self.output(hidden, codes)
        if self.training and head_share < 1:
            if draws is None:
                draws = torch.rand(labels.shape, generator=generator, device=labels.device)
            chosen = random_positions(draws, hidden.shape[1], head_share).unsqueeze(-1)
            hidden, codes = (tensor.gather(1, chosen.expand(-1, -1, tensor.shape[-1])) for tensor in (hidden, codes))
        terms = loss_terms(self.output(hidden, codes), codes)
        return terms if return_terms else terms.nll.mean()

    def trunk(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Embeddings x (B, T, C) → final-normed hidden states (B, T, C).

        Without a cache x starts at the class position; with one it continues after the positions in it.
        """
        start = cache.filled if cache else 0
        rope = self.rope.table[start : start + x.shape[1]]
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, cache.layer(index) if cache else None)
        if cache:
            cache.filled += x.shape[1]
        return self.norm(x)

    def make_cache(self, batch: int) -> KVCache:
        """An empty cache for the trunk: the class token and all image tokens but the last."""
        return KVCache(len(self.layers), batch, self.config.num_positions, self.config, like=self.norm.weight)

    def loss(
        self,
        labels: Tensor,
        codes: Tensor,
        *,
        class_dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean cross-entropy over B, L and K, in nats and float32; see `forward`. Not for a DDP- or FSDP-wrapped model:
        call the wrapper with return_loss=True there."""
        return self(labels, codes, return_loss=True, class_dropout=class_dropout, generator=generator)

    def nll(self, labels: Tensor, codes: Tensor) -> Tensor:
        """Negative log-likelihood of each code, (B, L, K) float32 in nats; their mean is the loss."""
        return cross_entropy(self(labels, codes), codes)

    @classmethod
    def from_official(
        cls,
        state: Mapping[str, object],
        num_classes: int = 1000,
        num_positions: int = 256,
        n_head: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> GPT:
        """Build from a published LlamaGen or LlamaGen-UniTok state dict, bare or wrapped; returned in eval mode.

        Sizes are read off the tensors; n_head only where (layers, width) is no preset's. Tensors that already have
        `dtype` are shared with `state`, not copied.
        Raises ValueError, in one line, for what is no such checkpoint or does not fit the arguments.
        """
        tensors = published_state(state)
        config = read_config(tensors, num_classes=num_classes, num_positions=num_positions, n_head=n_head)
        with torch.device("meta"):
            model = cls(config)
        check_state(model, tensors, "the published state dict")
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
        model.materialize_buffers()
        return model.eval()


def random_positions(draws: Tensor, length: int, share: float) -> Tensor:
    """draws (B,) float32 uniform in [0, 1) → (B, n) int64, n different ones of `length` positions for each picture.

    A picture's positions are a function of its draw alone, whatever the batch, the process and the device.
    """
    count = max(1, round(share * length))
    seeds = (draws.double() * 2**24).long().unsqueeze(1)  # a float32 draw has 24 bits
    keys = _mixed(_mixed(seeds) + torch.arange(length, device=draws.device))
    return keys.topk(count, dim=1).indices


def _mixed(x: Tensor) -> Tensor:
    """A bijection of int64 whose bits look independent of the argument's: the finalizer of SplitMix64, without its last
    shift (Steele, Lea and Flood, OOPSLA 2014)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x
