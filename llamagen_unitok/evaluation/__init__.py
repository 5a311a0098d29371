"""Figures of generators and tokenizers: samples, references, metrics, diagnostics and sweeps."""
