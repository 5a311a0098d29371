"""Which training pictures a sample is nearest to: by features of pictures, or by the codes themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from llamagen_unitok.training.data import CodeShards

BLOCK_ROWS = 16_384  # reference rows whose similarities are in memory at once
BLOCK_BYTES = 1 << 21  # of comparisons of codes in memory at once: what fits a processor's cache
SAMPLE_ROWS = 128


class FeatureMatches(NamedTuple):
    """similarity: (N, count) float32, cosine, largest first.   rows: (N, count) int64, of the reference."""

    similarity: Tensor
    rows: Tensor


def nearest_by_features(features: Tensor, reference: Tensor, count: int = 1) -> FeatureMatches:
    """The `count` reference rows of largest cosine similarity. features: (N, E), reference: (M, E), of any length.

    Memory for N × 16,384 similarities, whatever M is. Raises ValueError when the reference has fewer than `count` rows
    or features that are not finite.
    """
    if len(reference) < count:
        raise ValueError(f"{count} nearest pictures are asked for, but there are only {len(reference)} to compare with")
    if not (bool(torch.isfinite(features).all()) and bool(torch.isfinite(reference).all())):
        raise ValueError("the features of some pictures are not finite: the extractor or its input is damaged")
    unit = F.normalize(features.float(), dim=1)
    similarity = unit.new_empty(len(unit), 0)
    rows = torch.empty(len(unit), 0, dtype=torch.int64, device=unit.device)
    for start in range(0, len(reference), BLOCK_ROWS):
        block = F.normalize(reference[start : start + BLOCK_ROWS].float(), dim=1).to(unit.device)
        numbers = torch.arange(start, start + len(block), device=unit.device).expand(len(unit), -1)
        similarity, rows = torch.cat((similarity, unit @ block.T), dim=1), torch.cat((rows, numbers), dim=1)
        similarity, order = similarity.topk(min(count, similarity.shape[1]), dim=1)
        rows = rows.gather(1, order)
    return FeatureMatches(similarity, rows)


def retrieved(
    features: Tensor, labels: Sequence[int] | Tensor, reference: Tensor, reference_labels: Sequence[int] | Tensor
) -> Tensor:
    """(N,) bool: whether the nearest reference picture has the picture's own class; their mean is the accuracy."""
    rows = nearest_by_features(features, reference).rows[:, 0].cpu()
    return torch.as_tensor(reference_labels)[rows] == torch.as_tensor(labels)


class CodeMatches(NamedTuple):
    """The nearest training entries of N samples, nearest first; the first entry of equals.

    share: (N, count) float64, of equal codes.   entries, views: (N, count) int64, places in the shards; a view is the
    nearest of its entry's. Where there are too few entries, the share is -1 and the entry no entry.
    """

    share: np.ndarray
    entries: np.ndarray
    views: np.ndarray


def nearest_by_codes(
    codes: np.ndarray,
    shards: CodeShards,
    entries: np.ndarray,
    count: int = 1,
    *,
    not_entry: np.ndarray | None = None,
) -> CodeMatches:
    """For each of codes (N, L, K): the `count` of the training `entries` that have most codes in common with it.

    A code counts as common when the same position and codebook hold the same one; of an entry the best view counts.
    entries: (M,), read in blocks, with progress on stderr.   not_entry: (N,), an entry that each is not compared with:
    for codes that are themselves training entries.   Raises ValueError for codes of another shape.
    """
    meta = shards.meta
    shape = (meta.num_positions, meta.num_codebooks)
    if codes.shape[1:] != shape:
        raise ValueError(f"codes {codes.shape} are not (N, L, K) with (L, K) = {shape}, as in {shards.folder}")
    flat = codes.reshape(len(codes), -1).astype(np.uint16)
    total = flat.shape[1]
    best = CodeMatches(
        np.full((len(flat), count), -1, dtype=np.int64),
        np.full((len(flat), count), -1, dtype=np.int64),
        np.full((len(flat), count), -1, dtype=np.int64),
    )
    at_once = max(1, BLOCK_BYTES // (SAMPLE_ROWS * len(meta.views) * total))
    with tqdm(total=len(entries), desc="comparing codes", unit="picture", dynamic_ncols=True) as bar:
        for start in range(0, len(entries), at_once):
            numbers = np.asarray(entries[start : start + at_once])
            block = shards.entries(numbers)[1].reshape(-1, total)  # (M·A, L·K)
            for first in range(0, len(flat), SAMPLE_ROWS):
                rows = slice(first, first + SAMPLE_ROWS)
                equal = _count_equal(flat[rows], block).reshape(-1, len(numbers), len(meta.views))
                views = equal.argmax(axis=2)
                equal = equal.max(axis=2)
                if not_entry is not None:
                    equal[numbers[None] == not_entry[rows, None]] = -1
                found = CodeMatches(equal, np.broadcast_to(numbers, equal.shape), views)
                for mine, merged in zip(best, _merged(CodeMatches(*(part[rows] for part in best)), found), strict=True):
                    mine[rows] = merged
            bar.update(len(numbers))
    return CodeMatches(np.where(best.share < 0, -1.0, best.share / total), best.entries, best.views)


def _count_equal(codes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N, T) and (M, T) → (N, M) int64."""
    # bytes add up several times faster than booleans do, and the faster the narrower the sum
    narrow = np.uint16 if codes.shape[1] <= np.iinfo(np.uint16).max else np.uint32
    return (codes[:, None] == others).view(np.uint8).sum(axis=-1, dtype=narrow).astype(np.int64)


def _merged(best: CodeMatches, found: CodeMatches) -> tuple[np.ndarray, ...]:
    """The nearest of both, as many as in `best`; those in `best` first where they are equally near."""
    both = [np.concatenate(pair, axis=1) for pair in zip(best, found, strict=True)]
    order = np.argsort(-both[0], axis=1, kind="stable")[:, : best.share.shape[1]]
    return tuple(np.take_along_axis(part, order, axis=1) for part in both)
