"""Means and covariances as a stream, in float64, and merged exactly over processes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_BLOCK_ROWS = 1024  # rows that wait for one matrix product: a product for every small batch would be bound by memory


class Gaussian(NamedTuple):
    """mean: (E,) float64; cov: (E, E) float64, symmetric, maybe of deficient rank."""

    mean: np.ndarray
    cov: np.ndarray


class GaussianStatistics:
    """Mean and unbiased covariance of rows of `width` numbers that come batch by batch.

    Rows and other statistics may come in any order and any cut; only the last digits know. Pairwise updates: Chan,
    Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self._mean = np.zeros(width)
        self._scatter = np.zeros((width, width))  # Σ (x − mean)(x − mean)ᵀ
        self._waiting: list[np.ndarray] = []
        self._waiting_rows = 0

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return len(self._mean)

    def update(self, batch: np.ndarray) -> None:
        """Add the rows of `batch` (n, width)."""
        if batch.ndim != 2 or batch.shape[1] != self.width:
            raise ValueError(f"expected rows of {self.width} numbers, got an array {batch.shape}")
        self._waiting.append(np.array(batch, dtype=np.float64))
        self._waiting_rows += len(batch)
        if self._waiting_rows >= _BLOCK_ROWS:
            self._flush()

    def merge(self, other: GaussianStatistics) -> None:
        """Add all rows that `other` has seen."""
        self._flush()
        other._flush()
        self._add(other.count, other._mean, other._scatter)

    @property
    def mean(self) -> np.ndarray:
        """(width,) float64. ValueError before the first row."""
        self._flush()
        if not self.count:
            raise ValueError("there is no mean of no rows")
        return self._mean

    @property
    def cov(self) -> np.ndarray:
        """(width, width) float64, divided by count − 1 as numpy.cov does. ValueError for fewer than 2 rows."""
        self._flush()
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, and there are {self.count}")
        return self._scatter / (self.count - 1)

    def gaussian(self) -> Gaussian:
        """Mean and covariance."""
        return Gaussian(self.mean, self.cov)

    def state(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Count (1,), mean and scatter, all float64, for another process; `from_state` is the way back."""
        self._flush()
        return np.array([float(self.count)]), self._mean, self._scatter

    @classmethod
    def from_state(cls, count: np.ndarray, mean: np.ndarray, scatter: np.ndarray) -> GaussianStatistics:
        """The statistics that `state` described."""
        statistics = cls(len(mean))
        statistics._add(int(count[0]), mean, scatter)
        return statistics

    def _flush(self) -> None:
        if self._waiting_rows:
            rows = np.concatenate(self._waiting)
            self._waiting, self._waiting_rows = [], 0
            mean = rows.mean(axis=0)
            rows -= mean
            self._add(len(rows), mean, rows.T @ rows)

    def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self.count + count
        if count:
            step = mean - self._mean
            self._scatter += scatter
            self._scatter += np.outer(step, step * (self.count * count / total))
            self._mean = self._mean + step * (count / total)
        self.count = total
