"""How right is right: the one tolerance rule, and the comparison of any backend with the specification.

The rule: the error of a result against float64 may be at most **twice** the error that plain eager PyTorch makes in
the same dtype on the same inputs, plus the rounding floor of that dtype. Both the largest error and the RMS error are
held to it. No tolerance is chosen by hand. One evaluation may be exact by luck, so that of a call of attention is the
worst of several, whose scores add up the same products in another order: ``ORDERS``. In float64, where the
specification is rounded as well, they also add up rows and keys in another order than it.

The weights of a row sum to 1 (less beside a sink, about 1 under dropout) however large scores and values are. So calls
are checked with one column of values, and of the gradient that flows in, that is 1: the sums appear in the output and
in dv, and are held to the rule by themselves.
"""

from fastattn.testing.cache import check_kvcache
from fastattn.testing.calls import ORDERS, check_attention
from fastattn.testing.rule import FACTOR, assert_parity, rounding_floor

__all__ = ["FACTOR", "ORDERS", "assert_parity", "check_attention", "check_kvcache", "rounding_floor"]
