"""Text from a trained model: greedy search, sampling and beam search over a KV cache."""

from fastattn.inference.beam import BeamSearch
from fastattn.inference.decoding import Generated
from fastattn.inference.generate import generate, stream
from fastattn.inference.sampling import Sampling

__all__ = ["BeamSearch", "Generated", "Sampling", "generate", "stream"]
