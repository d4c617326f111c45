"""Text from a trained model: greedy search, sampling and beam search over a KV cache."""

from fastattn.inference.generate import BeamSearch, Generated, Sampling, generate, stream

__all__ = ["BeamSearch", "Generated", "Sampling", "generate", "stream"]
