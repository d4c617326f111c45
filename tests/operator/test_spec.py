"""What a call is refused for, and how: the class of the exception, and a text that names the argument, what was
expected and what came."""

import numpy
import pytest
import torch
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from fastattn import BlockMask, attention, explain, scaled_dot_product_attention
from fastattn.spec import checks, make_spec


def q(*shape, **options):
    return torch.randn(shape or (2, 4, 7, 8), **options)


def kv(*shape, **options):
    return torch.randn(shape or (2, 2, 9, 8), **options)


GOOD = {"q": q, "k": kv, "v": kv}

# (arguments in place of good ones, exception, text). The first three are made anew for every case.
TENSORS = {
    "q is a list": ({"q": [1.0]}, TypeError, "q: expected a Tensor, got list"),
    "k is None": ({"k": None}, TypeError, "k: expected a Tensor, got NoneType"),
    "v is an array": ({"v": numpy.zeros((2, 2, 9, 8))}, TypeError, "v: expected a Tensor, got ndarray"),
    "q of 3 dimensions": (
        {"q": q(4, 7, 8)},
        ValueError,
        "q: expected 4 dimensions (batch, heads, length, head_dim), got shape (4, 7, 8)",
    ),
    "k of 5 dimensions": (
        {"k": kv(1, 2, 2, 9, 8)},
        ValueError,
        "k: expected 4 dimensions (batch, heads, length, head_dim), got shape (1, 2, 2, 9, 8)",
    ),
    "v without dimensions": (
        {"v": torch.tensor(1.0)},
        ValueError,
        "v: expected 4 dimensions (batch, heads, length, head_dim), got shape ()",
    ),
    "integers": (
        {name: torch.ones(2, 2, 7, 8, dtype=torch.int64) for name in "qkv"},
        TypeError,
        "q.dtype: expected float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "bool": (
        {"q": q() > 0},
        TypeError,
        "q.dtype: expected float16, bfloat16, float32 or float64, got torch.bool",
    ),
    "complex": (
        {"q": q(dtype=torch.complex64)},
        TypeError,
        "q.dtype: expected float16, bfloat16, float32 or float64, got torch.complex64",
    ),
    "eight bits": (
        {"q": q().to(torch.float8_e4m3fn)},
        TypeError,
        "q.dtype: expected float16, bfloat16, float32 or float64, got torch.float8_e4m3fn",
    ),
    "k of another dtype": (
        {"k": kv().half()},
        TypeError,
        "k.dtype: expected q.dtype == torch.float32, got torch.float16",
    ),
    "v of another dtype": (
        {"v": kv().double()},
        TypeError,
        "v.dtype: expected q.dtype == torch.float32, got torch.float64",
    ),
    "k on another device": ({"k": kv(device="meta")}, ValueError, "k.device: expected q.device == cpu, got meta"),
    "v on another device": ({"v": kv(device="meta")}, ValueError, "v.device: expected q.device == cpu, got meta"),
    "batch of k": ({"k": kv(3, 2, 9, 8)}, ValueError, "k.shape[0]: expected q.shape[0] == 2, got 3"),
    "batch of v": ({"v": kv(1, 2, 9, 8)}, ValueError, "v.shape[0]: expected q.shape[0] == 2, got 1"),
    "head dim of k": ({"k": kv(2, 2, 9, 6)}, ValueError, "k.shape[-1]: expected q.shape[-1] == 8, got 6"),
    "no head dim": (
        {"q": q(2, 4, 7, 0), "k": kv(2, 2, 9, 0)},
        ValueError,
        "q.shape[-1]: expected at least 1, got 0",
    ),
    "no value dim": ({"v": kv(2, 2, 9, 0)}, ValueError, "v.shape[-1]: expected at least 1, got 0"),
    "length of v": (
        {"v": kv(2, 2, 8, 8)},
        ValueError,
        "v.shape[1:3]: expected k.shape[1:3] == (2, 9), got (2, 8)",
    ),
    "heads of v": ({"v": kv(2, 4, 9, 8)}, ValueError, "v.shape[1:3]: expected k.shape[1:3] == (2, 9), got (4, 9)"),
    "heads do not divide": (
        {"q": q(2, 3, 7, 8)},
        ValueError,
        "q.shape[1]: expected a positive multiple of k.shape[1] == 2 heads, got 3",
    ),
    "fewer heads than keys": (
        {"q": q(2, 1, 7, 8)},
        ValueError,
        "q.shape[1]: expected a positive multiple of k.shape[1] == 2 heads, got 1",
    ),
    "no heads": (
        {"q": q(2, 0, 7, 8)},
        ValueError,
        "q.shape[1]: expected a positive multiple of k.shape[1] == 2 heads, got 0",
    ),
    "no heads at all": (
        {"q": q(2, 0, 7, 8), "k": kv(2, 0, 9, 8), "v": kv(2, 0, 9, 8)},
        ValueError,
        "q.shape[1]: expected a positive multiple of k.shape[1] == 0 heads, got 0",
    ),
    "sparse q": ({"q": q().to_sparse()}, TypeError, "q: expected a dense strided tensor, got layout torch.sparse_coo"),
    "nested q": (
        {"q": torch.nested.nested_tensor([q(4, 7, 8), q(4, 7, 8)])},
        TypeError,
        "q: expected a dense strided tensor, got a nested tensor",
    ),
}

OPTIONS = {
    "mask is a list": ({"mask": [True]}, TypeError, "mask: expected a Tensor, got list"),
    "mask of floats": (
        {"mask": torch.ones(7, 9)},
        TypeError,
        "mask.dtype: expected bool (True takes part), got torch.float32; pass what is added to the scores as bias=",
    ),
    "mask is a function": (
        {"mask": lambda b, h, i, j: i >= j},
        TypeError,
        "mask: expected a Tensor, got function; BlockMask.from_predicate makes a mask from a function",
    ),
    "mask is a block mask": (
        {"mask": BlockMask.from_mask(torch.ones(7, 9) > 0)},
        TypeError,
        "mask: expected a Tensor, got BlockMask; it goes to block_mask=",
    ),
    "mask of bytes": (
        {"mask": torch.ones(7, 9, dtype=torch.uint8)},
        TypeError,
        "mask.dtype: expected bool (True takes part), got torch.uint8; mask.bool() if 1 takes part",
    ),
    "mask on another device": (
        {"mask": torch.ones(7, 9, dtype=torch.bool, device="meta")},
        ValueError,
        "mask.device: expected cpu, got meta",
    ),
    "mask is sparse": (
        {"mask": (torch.ones(7, 9) > 0).to_sparse()},
        TypeError,
        "mask: expected a dense strided tensor, got layout torch.sparse_coo",
    ),
    "mask of another length": (
        {"mask": torch.ones(7, 8) > 0},
        ValueError,
        "mask.shape: expected broadcastable to (B, Hq, Lq, Lk) == (2, 4, 7, 9), got (7, 8)",
    ),
    "mask of the key heads": (
        {"mask": torch.ones(2, 2, 7, 9) > 0},
        ValueError,
        "mask.shape: expected broadcastable to (B, Hq, Lq, Lk) == (2, 4, 7, 9), got (2, 2, 7, 9)",
    ),
    "mask transposed": (
        {"mask": torch.ones(9, 7) > 0},
        ValueError,
        "mask.shape: expected broadcastable to (B, Hq, Lq, Lk) == (2, 4, 7, 9), got (9, 7)",
    ),
    "mask of one row per batch entry": (
        {"mask": torch.ones(2, 9) > 0},
        ValueError,
        "mask.shape: expected broadcastable to (B, Hq, Lq, Lk) == (2, 4, 7, 9), got (2, 9); "
        "one row per batch entry is mask[:, None, None, :]",
    ),
    "mask of 5 dimensions": (
        {"mask": torch.ones(1, 1, 1, 7, 9) > 0},
        ValueError,
        "mask.shape: expected broadcastable to (B, Hq, Lq, Lk) == (2, 4, 7, 9), got (1, 1, 1, 7, 9)",
    ),
    "empty mask": (
        {"mask": torch.ones(0, 9) > 0},
        ValueError,
        "mask.shape: expected broadcastable to (B, Hq, Lq, Lk) == (2, 4, 7, 9), got (0, 9)",
    ),
    "bias is a number": ({"bias": 1.0}, TypeError, "bias: expected a Tensor, got float"),
    "bias of bools": (
        {"bias": torch.ones(7, 9) > 0},
        TypeError,
        "bias.dtype: expected a floating-point dtype, got torch.bool; it goes to mask=",
    ),
    "bias of integers": (
        {"bias": torch.ones(7, 9, dtype=torch.int32)},
        TypeError,
        "bias.dtype: expected a floating-point dtype, got torch.int32",
    ),
    "bias on another device": (
        {"bias": torch.ones(7, 9, device="meta")},
        ValueError,
        "bias.device: expected cpu, got meta",
    ),
    "bias of another batch": (
        {"bias": torch.ones(3, 1, 7, 9)},
        ValueError,
        "bias.shape: expected broadcastable to (B, Hq, Lq, Lk) == (2, 4, 7, 9), got (3, 1, 7, 9)",
    ),
    "bias is sparse": (
        {"bias": torch.ones(7, 9).to_sparse()},
        TypeError,
        "bias: expected a dense strided tensor, got layout torch.sparse_coo",
    ),
    "causal is a string": ({"causal": "no"}, TypeError, "causal: expected a bool, got str"),
    "causal is None": ({"causal": None}, TypeError, "causal: expected a bool, got NoneType"),
    "causal is a tensor": ({"causal": torch.tensor(True)}, TypeError, "causal: expected a bool, got Tensor"),
    "causal is a number": ({"causal": 1}, TypeError, "causal: expected a bool, got int"),
    "return_lse is a string": ({"return_lse": "no"}, TypeError, "return_lse: expected a bool, got str"),
    "q_offset is a float": (
        {"q_offset": 1.0},
        TypeError,
        "q_offset: expected an int or an integer tensor, got float",
    ),
    "q_offset is a bool": ({"q_offset": True}, TypeError, "q_offset: expected an int or an integer tensor, got bool"),
    "q_offset of floats": (
        {"q_offset": torch.ones(2)},
        TypeError,
        "q_offset.dtype: expected int32 or int64, got torch.float32",
    ),
    "q_offset of bytes": (
        {"q_offset": torch.ones(2, dtype=torch.uint8)},
        TypeError,
        "q_offset.dtype: expected int32 or int64, got torch.uint8",
    ),
    "q_offset of another batch": (
        {"q_offset": torch.ones(3, dtype=torch.int64)},
        ValueError,
        "q_offset.shape: expected (B,) == (2,), got (3,)",
    ),
    "q_offset without dimensions": (
        {"q_offset": torch.tensor(3)},
        ValueError,
        "q_offset.shape: expected (B,) == (2,), got ()",
    ),
    "q_offset on another device": (
        {"q_offset": torch.ones(2, dtype=torch.int64, device="meta")},
        ValueError,
        "q_offset.device: expected cpu, got meta",
    ),
    "q_offset too far": (
        {"q_offset": 1 << 40},
        ValueError,
        "q_offset: expected at most 2**30 in size, got 1099511627776",
    ),
    "dropout_p below 0": ({"dropout_p": -0.1}, ValueError, "dropout_p: expected a probability in [0, 1], got -0.1"),
    "dropout_p above 1": ({"dropout_p": 1.5}, ValueError, "dropout_p: expected a probability in [0, 1], got 1.5"),
    "dropout_p is NaN": (
        {"dropout_p": float("nan")},
        ValueError,
        "dropout_p: expected a probability in [0, 1], got nan",
    ),
    "dropout_p is a string": ({"dropout_p": "0"}, TypeError, "dropout_p: expected a float in [0, 1], got str"),
    "dropout_p is None": ({"dropout_p": None}, TypeError, "dropout_p: expected a float in [0, 1], got NoneType"),
    "dropout_p is a bool": ({"dropout_p": True}, TypeError, "dropout_p: expected a float in [0, 1], got bool"),
    "dropout_p is a tensor": (
        {"dropout_p": torch.tensor(0.5)},
        TypeError,
        "dropout_p: expected a float in [0, 1], got Tensor",
    ),
    "scale is a string": ({"scale": "1"}, TypeError, "scale: expected a float, got str"),
    "scale is complex": ({"scale": 1j}, TypeError, "scale: expected a float, got complex"),
    "scale is a list": ({"scale": [1.0]}, TypeError, "scale: expected a float, got list"),
    # Not even of one element: its gradient would be lost.
    "scale is a tensor": ({"scale": torch.tensor(0.5)}, TypeError, "scale: expected a float, got Tensor"),
    "scale is a parameter": (
        {"scale": torch.nn.Parameter(torch.ones(1))},
        TypeError,
        "scale: expected a float, got Parameter",
    ),
    "window is a number": ({"window": 3}, TypeError, "window: expected (left, right), each an int or None, got 3"),
    "window of three": (
        {"window": (1, 2, 3)},
        TypeError,
        "window: expected (left, right), each an int or None, got (1, 2, 3)",
    ),
    "window of floats": (
        {"window": (1.0, 2)},
        TypeError,
        "window: expected (left, right), each an int or None, got (1.0, 2)",
    ),
    "window of another package's open sides": (
        {"window": (-1, -1)},
        ValueError,
        "window: expected sides other than -1, got (-1, -1); None leaves a side open",
    ),
    "window with one such side": (
        {"window": (3, -1), "causal": True},
        ValueError,
        "window: expected sides other than -1, got (3, -1); None leaves a side open",
    ),
    "window that forbids everything": (
        {"window": (-3, 2)},
        ValueError,
        "window: expected left + right >= 0, since it forbids everything otherwise, got (-3, 2); "
        "None leaves a side open",
    ),
    "window that forbids everything with causal": (
        {"window": (-3, 8), "causal": True},
        ValueError,
        "window: expected left + right >= 0, since it forbids everything otherwise, got (-3, 8) with causal; "
        "None leaves a side open",
    ),
    "softcap too small": (
        {"softcap": 1e-40},
        ValueError,
        "softcap: expected at least 2**-126, float32's smallest normal number, got 1e-40",
    ),
    "scale is nan": ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
    "scale too small": (
        {"scale": 1e-40},
        ValueError,
        "scale: expected 0 or at least 2**-126 in size, float32's smallest normal number, got 1e-40",
    ),
    "negative scale too small": (
        {"scale": -1e-40},
        ValueError,
        "scale: expected 0 or at least 2**-126 in size, float32's smallest normal number, got -1e-40",
    ),
    "scale is infinite": ({"scale": float("inf")}, ValueError, "scale: expected a finite number, got inf"),
    "softcap is 0": ({"softcap": 0.0}, ValueError, "softcap: expected a positive finite number or None, got 0.0"),
    "softcap is a string": ({"softcap": "5"}, TypeError, "softcap: expected a float or None, got str"),
    "slopes of another size": (
        {"alibi_slopes": torch.ones(3)},
        ValueError,
        "alibi_slopes.shape: expected (4,) or (2, 4) for 4 query heads, got (3,)",
    ),
    "slopes of integers": (
        {"alibi_slopes": torch.ones(4, dtype=torch.int64)},
        TypeError,
        "alibi_slopes.dtype: expected a floating-point dtype, got torch.int64",
    ),
    "slopes are a list": ({"alibi_slopes": [1.0] * 4}, TypeError, "alibi_slopes: expected a Tensor, got list"),
    "sinks of the key heads": (
        {"sinks": torch.ones(2)},
        ValueError,
        "sinks.shape: expected (4,) for 4 query heads, got (2,)",
    ),
    "sinks on another device": (
        {"sinks": torch.ones(4, device="meta")},
        ValueError,
        "sinks.device: expected cpu, got meta",
    ),
}


@pytest.mark.parametrize("function", [attention, explain, make_spec], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", [*TENSORS, *OPTIONS])
def test_refused_by_attention(case, function):
    """By `explain` with the same words."""
    changes, exception, text = {**TENSORS, **OPTIONS}[case]
    arguments = {**{name: make() for name, make in GOOD.items()}, **changes}
    with pytest.raises(exception) as error:
        function(**arguments)
    assert type(error.value) is exception and str(error.value) == text


# Here tensors of other ranks and batches broadcast: what is left of that to refuse has words of its own.
SAME_IN_SDPA = [case for case in TENSORS if "dimensions" not in case and not case.startswith("batch of")]


@pytest.mark.parametrize("case", SAME_IN_SDPA)
def test_refused_by_scaled_dot_product_attention(case):
    """In the same words, with PyTorch's names of the arguments."""
    changes, exception, text = TENSORS[case]
    names = {"q": "query", "k": "key", "v": "value"}
    arguments = {names[name]: changes.get(name, make()) for name, make in GOOD.items()}
    for short, long in names.items():
        text = text.replace(f"{short}.", f"{long}.").replace(f"{short}:", f"{long}:")
    with pytest.raises(exception) as error:
        scaled_dot_product_attention(**arguments, enable_gqa=True)
    assert type(error.value) is exception and str(error.value) == text


SDPA = {
    "query of 1 dimension": (
        {"query": torch.ones(8)},
        ValueError,
        "query: expected at least 2 dimensions (length, head_dim), got shape (8,)",
    ),
    "value without dimensions": (
        {"value": torch.tensor(1.0)},
        ValueError,
        "value: expected at least 2 dimensions (length, head_dim), got shape ()",
    ),
    "heads without enable_gqa": (
        {"key": kv(), "value": kv()},
        ValueError,
        "key.shape[:-2]: expected broadcastable with query.shape[:-2] == (2, 4) unless enable_gqa=True, got (2, 2)",
    ),
    "batch of key": (
        {"key": kv(3, 4, 9, 8), "value": kv(3, 4, 9, 8)},
        ValueError,
        "key.shape[:-2]: expected broadcastable with query.shape[:-2] == (2, 4), got (3, 4)",
    ),
    "batch of value": (
        {"value": kv(3, 4, 9, 8)},
        ValueError,
        "value.shape[:-2]: expected broadcastable with query.shape[:-2] == (2, 4), got (3, 4)",
    ),
    "attn_mask is a list": ({"attn_mask": [True]}, TypeError, "attn_mask: expected a Tensor, got list"),
    "attn_mask of integers": (
        {"attn_mask": torch.ones(7, 9, dtype=torch.int64)},
        TypeError,
        "attn_mask.dtype: expected bool (True takes part) or a floating-point dtype, got torch.int64",
    ),
    "boolean attn_mask of another length": (
        {"attn_mask": torch.ones(7, 8) > 0},
        ValueError,
        "attn_mask.shape: expected broadcastable to (B, Hq, Lq, Lk) == (2, 4, 7, 9), got (7, 8)",
    ),
    "float attn_mask of another length": (
        {"attn_mask": torch.ones(9, 7)},
        ValueError,
        "attn_mask.shape: expected broadcastable to (B, Hq, Lq, Lk) == (2, 4, 7, 9), got (9, 7)",
    ),
    "attn_mask on another device": (
        {"attn_mask": torch.ones(7, 9, device="meta")},
        ValueError,
        "attn_mask.device: expected cpu, got meta",
    ),
    "is_causal is a string": ({"is_causal": "no"}, TypeError, "is_causal: expected a bool, got str"),
    "dropout_p above 1": ({"dropout_p": 2}, ValueError, "dropout_p: expected a probability in [0, 1], got 2"),
    "scale is a tensor": ({"scale": torch.ones(())}, TypeError, "scale: expected a float, got Tensor"),
}


@pytest.mark.parametrize("case", SDPA)
def test_refused_by_scaled_dot_product_attention_alone(case):
    changes, exception, text = SDPA[case]
    arguments = {"query": q(), "key": kv(2, 4, 9, 8), "value": kv(2, 4, 9, 8), **changes}
    with pytest.raises(exception) as error:
        scaled_dot_product_attention(**arguments)
    assert type(error.value) is exception and str(error.value) == text


def test_attn_mask_of_five_dimensions_beside_a_larger_batch():
    x = q(2, 3, 4, 7, 8)
    with pytest.raises(ValueError, match=r"attn_mask\.shape\[:-3\]: expected broadcastable to \(2, 3\), got \(5, 1\)"):
        scaled_dot_product_attention(x, x, x, torch.ones(5, 1, 1, 7, 7) > 0)


@pytest.mark.parametrize("function", [attention, explain, scaled_dot_product_attention], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["attention_mask", "is_casual", "softmax_scale", "dropout"])
def test_unknown_keywords_raise(function, name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        function(q(), q(), q(), **{name: None})


def test_options_by_position_raise():
    with pytest.raises(TypeError, match="takes 3 positional arguments but 4 were given"):
        attention(q(), kv(), kv(), True)


@pytest.mark.parametrize(
    ("options", "right"),
    [
        ({"causal": True}, 0),
        ({"causal": True, "q_offset": 0}, 0),
        ({"causal": True, "q_offset": 7}, 0),
        ({"causal": True, "q_offset": 8}, None),
        ({"causal": True, "q_offset": 100}, None),
        ({"q_offset": -5}, None),
    ],
    ids=str,
)
def test_causal_that_forbids_nothing_is_dropped(options, right):
    """So that decoding one query takes the same path as a call without causal."""
    spec = make_spec(q(), kv(), kv(), **options)
    assert spec.right == right and spec.causal == (right == 0)
    assert make_spec(q(2, 4, 1, 8), kv(), kv(), causal=True).right is None


def test_normalisation():
    """Masks and biases become 4-D views, the scale a float, an offset an int or a contiguous tensor."""
    mask, bias = torch.ones(9) > 0, torch.ones(4, 7, 1)
    offsets = torch.tensor([1, 0, 2, 0])[::2]
    spec = make_spec(q(), kv(), kv(), mask=mask, bias=bias, q_offset=offsets, scale=1)
    assert spec.mask.shape == (1, 1, 1, 9) and spec.mask.data_ptr() == mask.data_ptr()
    assert spec.bias.shape == (1, 4, 7, 1) and spec.bias.data_ptr() == bias.data_ptr()
    assert spec.q_offset_tensor.is_contiguous() and spec.q_offset_tensor.tolist() == [1, 2]
    assert spec.scale == 1.0 and isinstance(spec.scale, float)
    assert make_spec(q(), kv(), kv()).scale == 8**-0.5
    assert make_spec(q(), kv(), kv()).q_offset == 2
    assert make_spec(q(), kv(), kv(), scale=numpy.float32(0.5)).scale == 0.5


@pytest.mark.parametrize("good", [0, 1, 0.0, 0.5, 1.0])
def test_probabilities_that_are_accepted(good):
    assert make_spec(q(), kv(), kv(), dropout_p=good).dropout_p == good


@pytest.mark.parametrize(
    ("function", "name", "ours"),
    [
        (attention, "softmax_scale", "scale"),
        (attention, "attn_mask", "mask"),
        (attention, "is_causal", "causal"),
        (explain, "window_size", "window"),
        (attention, "key_padding_mask", "mask"),
        (attention, "enable_gqa", "no argument, since shapes say"),
        (attention, "block_table", "block_table of fastattn.attention_with_kvcache"),
        (scaled_dot_product_attention, "window", "window of fastattn.attention"),
        (scaled_dot_product_attention, "causal", "is_causal"),
        (scaled_dot_product_attention, "mask", "attn_mask"),
    ],
)
def test_the_keyword_of_another_package_is_answered_with_ours(function, name, ours):
    with pytest.raises(TypeError, match=rf"{name}'; here it is {ours}"):
        function(q(), kv(), kv(), **{name: None})


# Tensor subclasses


@pytest.mark.parametrize("lengths", [(4, 6), (6, 4), (5, 5)], ids=str)
@pytest.mark.parametrize("backend", [None, "reference", "triton"], ids=str)
@pytest.mark.parametrize("argument", ["mask", "bias"])
@pytest.mark.parametrize("kind", ["upper_left", "lower_right"])
def test_a_causal_bias_is_causal_order(kind, argument, backend, lengths):
    """As a plain tensor it is memory that nobody has written."""
    q_len, kv_len = lengths
    query, key = torch.randn(2, 2, q_len, 8), torch.randn(2, 2, kv_len, 8)
    bias = {"upper_left": causal_upper_left, "lower_right": causal_lower_right}[kind](q_len, kv_len)
    q_offset = 0 if kind == "upper_left" else kv_len - q_len
    expected = attention(query, key, key, causal=True, q_offset=q_offset, backend=backend)
    assert torch.equal(attention(query, key, key, **{argument: bias}, backend=backend), expected)
    if argument == "mask" and backend is None:
        expected = attention(query, key, key, causal=True, q_offset=q_offset)
        assert torch.equal(scaled_dot_product_attention(query, key, key, bias), expected)


def test_a_causal_bias_of_another_order_or_length():
    query, key = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match=r"bias: expected a CausalBias for \(Lq, Lk\) == \(4, 6\), got \(6, 4\)"):
        attention(query, key, key, bias=causal_upper_left(6, 4))
    with pytest.raises(ValueError, match=r"bias: expected a CausalBias in the order of q_offset == 2, got .* == 0"):
        attention(query, key, key, bias=causal_upper_left(4, 6), causal=True)
    with pytest.raises(ValueError, match="attn_mask: expected a CausalBias in the order of q_offset == 0"):
        scaled_dot_product_attention(query, key, key, causal_lower_right(4, 6), is_causal=True)


class Logged(torch.Tensor):
    """Its functions mean something else than those of its memory."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "bias", "alibi_slopes", "sinks"])
def test_other_subclasses_are_refused(name):
    given = {
        "q": torch.randn(1, 2, 4, 8), "k": torch.randn(1, 2, 4, 8), "v": torch.randn(1, 2, 4, 8),
        "mask": torch.ones(4, 4) > 0, "bias": torch.zeros(4, 4), "alibi_slopes": torch.ones(2), "sinks": torch.ones(2),
    }  # fmt: skip
    with pytest.raises(TypeError, match=rf"{name}: expected a plain Tensor, got .*Logged"):
        attention(**{**given, name: given[name].as_subclass(Logged)})
    attention(**{**given, name: torch.nn.Parameter(given[name], requires_grad=given[name].is_floating_point())})


def test_a_square_mask_as_large_as_the_batch_is_pointed_out_once(recwarn):
    checks._warned.clear()
    x = torch.randn(5, 1, 5, 8)
    for _ in range(2):
        attention(x, x, x, mask=torch.ones(5, 5) > 0)
    (warning,) = recwarn
    assert "mask[:, None, None, :]" in str(warning.message) and warning.filename == __file__
