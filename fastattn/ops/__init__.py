"""The operators, registered with PyTorch. Only this package and integrations/activate.py use dispatch keys."""

from fastattn.ops.attention import attention
from fastattn.ops.autograd import attend, draw_seed, seed_of_part
from fastattn.ops.direct import Way, watched, way, without_autocast
from fastattn.ops.implementations import repeated
from fastattn.ops.kvcache import attention_kvcache, turns_in_append
from fastattn.ops.plain import decompositions
from fastattn.ops.schema import Backward, CacheCall, DoubleBackward, Forward, flatten, unflatten
from fastattn.ops.torch_kernel import add_second_derivative

__all__ = [
    "Backward",
    "CacheCall",
    "DoubleBackward",
    "Forward",
    "Way",
    "add_second_derivative",
    "attend",
    "attention",
    "attention_kvcache",
    "decompositions",
    "draw_seed",
    "flatten",
    "repeated",
    "seed_of_part",
    "turns_in_append",
    "unflatten",
    "watched",
    "way",
    "without_autocast",
]
