"""From a causal-LM checkpoint to a smaller, measured and published artifact."""

__version__ = "0.1.0"
