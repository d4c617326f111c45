"""The rule that all parity tests rest on: that it lets rounding pass, and that it can fail.

A rule that never fails proves nothing, so every kind of mistake a kernel can make is made here on purpose.
"""

import functools

import pytest
import torch

from fastattn import reference, testing
from fastattn.testing import FACTOR, assert_parity, calls, check_attention, rounding_floor
from fastattn.testing import cache as cache_checks
from fastattn.testing.orders import OtherOrders
from tests.support.attention_cases import BFLOAT, DOUBLE, DTYPE_NAMES, HALF, SINGLE, make_bias, make_mask, make_qkv

DTYPES = [HALF, BFLOAT, SINGLE]


def truth(size=1000):
    """A result in float64 and what eager PyTorch made of it: a known error of 1e-2 everywhere."""
    expected = torch.randn(size, dtype=DOUBLE)
    eager = expected + 1e-2 * torch.where(torch.arange(size) % 2 == 0, 1.0, -1.0)
    return expected, eager


def bound_of(expected, eager, dtype):
    largest, rms = rounding_floor(expected, dtype)
    error = (eager - expected).abs().max().item()
    return FACTOR * error + largest, FACTOR * error + rms


def test_the_factor_is_two():
    assert FACTOR == 2.0


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
def test_rounding_alone_passes(dtype):
    """Even where the peer makes no error at all."""
    expected = torch.randn(10_000, dtype=DOUBLE)
    assert_parity(expected.to(dtype), expected, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
def test_two_roundings_too_many_do_not(dtype):
    expected = torch.randn(10_000, dtype=DOUBLE)
    wrong = (expected * (1.0 + 4.0 * torch.finfo(dtype).eps)).to(dtype)
    with pytest.raises(AssertionError, match=r"error .* against float64 exceeds"):
        assert_parity(wrong, expected, expected)


def test_the_largest_error_is_held_to_the_bound():
    """One element on either side of it; the RMS error is far inside."""
    expected, eager = truth()
    bound, _ = bound_of(expected, eager, DOUBLE)
    actual = expected.clone()
    actual[17] += bound * 0.999
    assert_parity(actual, expected, eager)
    actual[17] = expected[17] + bound * 1.001
    with pytest.raises(AssertionError, match="largest error"):
        assert_parity(actual, expected, eager)


def test_the_rms_error_is_held_to_its_own_bound():
    """An error everywhere that no single element shows: the peer has one large outlier."""
    expected = torch.randn(1000, dtype=DOUBLE)
    eager = expected + 1e-3
    eager[3] += 1.0
    with pytest.raises(AssertionError, match="RMS error"):
        assert_parity(expected + 0.5, expected, eager)


def test_figures_in_the_message():
    expected, eager = truth()
    with pytest.raises(AssertionError) as error:
        assert_parity(expected + 0.5, expected, eager, "dq")
    text = str(error.value)
    assert text.startswith("dq: largest error 5.000e-01 against float64 exceeds 2.000e-02 = 2 x 1.000e-02")


def test_shapes_must_agree():
    x = torch.zeros(2, 3)
    with pytest.raises(AssertionError, match=r"out: expected shape \(2, 3\), got \(3, 2\)"):
        assert_parity(x.t(), x, x, "out")
    with pytest.raises(AssertionError, match="expected shape"):
        assert_parity(x[:1], x, x)  # would broadcast


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nothing_but_numbers_where_numbers_are_expected(value):
    expected = torch.zeros(5)
    actual = expected.clone()
    actual[2] = value
    with pytest.raises(AssertionError, match="1 elements are not finite"):
        assert_parity(actual, expected, actual)  # not even if the peer fails alike


def test_infinities_must_be_the_same():
    expected = torch.tensor([1.0, -torch.inf])
    assert_parity(expected, expected, expected)
    for wrong in (0.0, torch.inf, torch.nan, -1e38):
        with pytest.raises(AssertionError, match="differ at infinity"):
            assert_parity(torch.tensor([1.0, wrong]), expected, expected)


def test_nan_is_never_expected():
    x = torch.tensor([1.0, torch.nan])
    with pytest.raises(AssertionError):
        assert_parity(x, x, x)


def test_empty_results_pass():
    x = torch.zeros(0, 3)
    assert_parity(x, x, x)


def test_the_floor_of_half_precision_is_its_own():
    """float32 results get no allowance for half precision."""
    expected = torch.randn(1000, dtype=DOUBLE)
    error = expected * torch.finfo(HALF).eps / 4
    assert_parity((expected + error).to(HALF), expected, expected)
    with pytest.raises(AssertionError):
        assert_parity((expected + error).to(SINGLE), expected, expected)


@pytest.mark.parametrize("per_element", [False, True], ids=["one_size", "size_per_element"])
def test_what_cancels_on_the_way_is_allowed_for(per_element):
    """A result near 0 from terms near 1000: float32 leaves 1000 roundings."""
    expected = torch.zeros(100, dtype=DOUBLE)
    actual = torch.full((100,), 900 * torch.finfo(SINGLE).eps)
    with pytest.raises(AssertionError):
        assert_parity(actual, expected, expected)
    assert_parity(actual, expected, expected, intermediate=torch.full((100,), 1000.0) if per_element else 1000.0)


def test_an_error_that_was_stored_counts_like_the_peers():
    expected = torch.zeros(100, dtype=DOUBLE)
    actual = torch.full((100,), 1.5)
    with pytest.raises(AssertionError):
        assert_parity(actual, expected, expected)
    assert_parity(actual, expected, expected, stored=torch.ones(100))
    with pytest.raises(AssertionError):
        assert_parity(actual * 2, expected, expected, stored=torch.ones(100))


def break_results(monkeypatch, name, change):
    """Let the reference backend make a mistake in the buffer called `name`, after it has filled it."""
    forward, backward = reference.forward, reference.backward

    def wrong_forward(out, lse, *args):
        forward(out, lse, *args)
        if name in ("out", "lse"):
            change({"out": out, "lse": lse}[name])

    def wrong_backward(gradients, *args):
        backward(gradients, *args)
        if name not in ("out", "lse"):
            change(getattr(gradients, name))

    monkeypatch.setattr(reference, "forward", wrong_forward)
    monkeypatch.setattr(reference, "backward", wrong_backward)


MISTAKES = {
    "five percent": lambda x: x.mul_(1.05),  # bfloat16 rounds to 0.4 percent
    "an unwritten element": lambda x: x.view(-1)[-1:].fill_(torch.nan),
    "a row of another batch entry": lambda x: x[0, :, 0].copy_(x[1, :, 0].clone()),
    "a row twice": lambda x: x[:, :, 0].mul_(2.0),
    "heads exchanged": lambda x: x.copy_(x.flip(1)),
    "sign": lambda x: x.neg_(),
    "zeroed tail": lambda x: x[:, :, -1].zero_(),
    "a row in float32": lambda x: x[:, :, 5].copy_(x[:, :, 5].float()),
}


@pytest.mark.parametrize(
    ("mistake", "dtype"),
    [
        *((mistake, HALF) for mistake in [*MISTAKES][:-1]),
        ("five percent", BFLOAT),
        ("a row twice", SINGLE),
        ("a row in float32", DOUBLE),
    ],
    ids=lambda value: DTYPE_NAMES.get(value, value),
)
@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv", "dbias"])
def test_every_mistake_in_every_result_is_found(monkeypatch, name, mistake, dtype):
    q, k, v = make_qkv("cpu", (17, 40), batch=2, dtype=dtype)
    bias = make_bias("cpu", (2, 2, 17, 40), DOUBLE if dtype == DOUBLE else SINGLE, requires_grad=True)
    break_results(monkeypatch, name, MISTAKES[mistake])
    with pytest.raises(AssertionError, match=rf"^{name}: "):
        check_attention(q, k, v, backend="reference", causal=True, bias=bias)


@pytest.mark.parametrize("name", ["out", "dq", "dv"])
def test_weights_that_do_not_sum_to_one_are_found(monkeypatch, name):
    """However large the scores are: here eager PyTorch loses nothing, because all of them are alike."""
    q, k, v = make_qkv("cpu", (17, 40), dtype=SINGLE)
    bias = torch.full((17, 40), -1e9)
    check_attention(torch.zeros_like(q), k, v, backend="reference", bias=bias)
    break_results(monkeypatch, name, lambda x: x.mul_(1.001))
    with pytest.raises(AssertionError, match=rf"^{name}: "):
        check_attention(torch.zeros_like(q), k, v, backend="reference", bias=bias)


def test_float64_may_add_up_in_any_order():
    """The specification has an order of sums, and an error of its own with it: 158 rows per key, as it adds them up."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = make_qkv("cpu", (158, 37), batch=1, dtype=DOUBLE)
    inputs = {"q": q, "k": k, "v": v, "dout": torch.randn(q.shape, generator=generator, dtype=DOUBLE)}
    found = []
    for _ in range(4):
        found.append(calls.run_specification(inputs, {}, 0, DOUBLE, sums=OtherOrders(generator)))
        calls.hold_to_the_rule(found[-1], inputs, {}, 0, lse_gradient=False)
    dv = [x[4] for x in found]
    assert not torch.equal(dv[0], dv[1])
    with pytest.raises(AssertionError, match=r"^dv: largest error"):  # far less than float32 would lose
        calls.hold_to_the_rule([*found[0][:4], dv[0] * (1.0 + 1e-13)], inputs, {}, 0, lse_gradient=False)


def use_other_arguments(monkeypatch, **changes):
    """Let the reference backend compute another call than the one it was asked for."""
    for direction in ("forward", "backward"):
        original = getattr(reference, direction)

        def wrong(*args, original=original):
            *others, options = args
            original(*others, options._replace(**changes))

        monkeypatch.setattr(reference, direction, wrong)


@pytest.mark.parametrize(
    "changes",
    [{"right": None}, {"right": 1}, {"q_offset": 36}, {"scale": 0.251}, {"dropout_p": 0.19}, {"dropout_p": 0.0}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [*DTYPES, DOUBLE], ids=DTYPE_NAMES.get)
def test_another_call_is_found(monkeypatch, changes, dtype):
    """Also where forward and backward are consistently wrong: one key too many, a scale off by 0.4 percent."""
    q, k, v = make_qkv("cpu", (33, 70), dtype=dtype)
    options = {"causal": True, "q_offset": 37, "dropout_p": 0.2, "backend": "reference"}
    check_attention(q, k, v, **options)
    use_other_arguments(monkeypatch, **changes)
    with pytest.raises(AssertionError, match=r"^(out|lse): "):
        check_attention(q, k, v, **options)


def test_a_mask_that_is_ignored_for_one_key_is_found(monkeypatch):
    q, k, v = make_qkv("cpu", (33, 70))
    mask = make_mask("cpu", (1, 1, 1, 70))
    mask[..., 69] = False
    original = reference.forward

    def wrong(*args):
        *others, operands, options = args
        mask = operands.mask.index_fill(-1, torch.tensor([69]), True)
        original(*others, operands._replace(mask=mask), options)

    monkeypatch.setattr(reference, "forward", wrong)
    with pytest.raises(AssertionError, match=r"^out: "):
        check_attention(q, k, v, backend="reference", mask=mask)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=DTYPE_NAMES.get)
def test_lse_in_half_precision_is_found(monkeypatch, dtype):
    """It is float32 whatever the inputs are, and held to float32's error."""
    break_results(monkeypatch, "lse", lambda x: x.copy_(x.to(dtype)))
    with pytest.raises(AssertionError, match=r"^lse: "):
        check_attention(*make_qkv("cpu", (33, 70), dtype=dtype), backend="reference")


def test_a_gradient_of_another_dtype_is_found(monkeypatch):
    """float16 where the bias is float32: the values alone would pass in half precision."""
    break_results(monkeypatch, "dbias", lambda x: x.copy_(x.half()))
    bias = make_bias("cpu", (1, 2, 33, 70), requires_grad=True)
    with pytest.raises(AssertionError, match=r"^dbias: "):
        check_attention(*make_qkv("cpu", (33, 70), dtype=SINGLE), backend="reference", bias=bias)


def test_uninitialised_memory_is_nan():
    """What tests/conftest.py promises: an element that nobody wrote cannot pass for a number."""
    for dtype in (*DTYPES, DOUBLE):
        assert torch.empty(100, dtype=dtype).isnan().all()
        assert torch.ones(3, dtype=dtype).new_empty(2, 2).isnan().all()
        assert torch.empty_like(torch.ones(3, dtype=dtype)).isnan().all()


def test_without_lse_the_gradient_through_it_is_left_out():
    """As for backends that do not return it."""
    q, k, v = make_qkv("cpu", (33, 70), dtype=SINGLE)
    check_attention(q, k, v, backend="torch", lse_gradient=False)
    with pytest.raises(ValueError, match="does not return lse"):
        check_attention(q, k, v, backend="torch")


def test_inputs_are_left_alone():
    q, k, v = make_qkv("cpu", (5, 7))
    bias = make_bias("cpu", (5, 7), requires_grad=True)
    copies = [x.detach().clone() for x in (q, k, v, bias)]
    check_attention(q, k, v, backend="reference", bias=bias)
    assert all(torch.equal(x, copy) for x, copy in zip((q, k, v, bias), copies, strict=True))
    assert bias.grad is None and not q.requires_grad


def test_a_wrong_cache_is_found(monkeypatch):
    q, cache, new = torch.randn(2, 2, 1, 8), torch.full((2, 16, 2, 8), torch.nan), torch.randn(2, 2, 3, 8)

    def check():
        testing.check_kvcache(q, cache.clone(), cache.clone(), new, new, cache_lens=torch.tensor([0, 5]))

    cache[1, :5] = 0.5
    check()
    right = cache_checks.attention_with_kvcache

    def wrong(damage):
        def function(q, k_cache, v_cache, *arguments, **options):
            out, lse = right(q, k_cache, v_cache, *arguments, **options)
            return damage(k_cache, v_cache, out, lse) or (out, lse)

        return function

    damages = {
        "k_cache: not the new rows": lambda k_cache, v_cache, out, lse: k_cache[0, 9].zero_() is None,
        "v_cache: not the new rows": lambda k_cache, v_cache, out, lse: v_cache[1, 7].mul_(2) is None,
        "out: largest error": lambda k_cache, v_cache, out, lse: (1.01 * out, lse),
        "lse: largest error": lambda k_cache, v_cache, out, lse: (out, 1.01 * lse),
    }
    for text, damage in damages.items():
        monkeypatch.setattr(cache_checks, "attention_with_kvcache", wrong(damage))
        with pytest.raises(AssertionError, match=text):
            check()


# Mistakes that hide behind the size of the scores: eager PyTorch loses much there, and its weights sum to 1 even so.


def large_scores(dtype):
    """A standard deviation of 30."""
    q, k, v = make_qkv("cpu", (17, 40), dtype=SINGLE)
    return (30.0 * q).to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
def test_rows_of_weights_that_do_not_sum_to_one_are_found(monkeypatch, dtype):
    """Each row by a factor of its own, a few roundings from 1."""
    q, k, v = large_scores(dtype)
    check_attention(q, k, v, backend="reference")
    factors = 1.0 + 8.0 * torch.finfo(dtype).eps * torch.linspace(-1.0, 1.0, 17)[:, None]
    break_results(monkeypatch, "out", lambda x: x.mul_(factors))
    with pytest.raises(AssertionError, match=r"^sums of the weights: "):
        check_attention(q, k, v, backend="reference")


def test_weights_over_a_cache_that_do_not_sum_to_one_are_found(monkeypatch):
    q, k, v = large_scores(SINGLE)
    caches = [x.transpose(1, 2).contiguous() for x in (k, v)]
    check = functools.partial(testing.check_kvcache, q, *caches, cache_lens=40, backend="reference")
    check()
    right = cache_checks.attention_with_kvcache
    factors = 1.0 + 8.0 * torch.finfo(SINGLE).eps * torch.linspace(-1.0, 1.0, 17)[:, None]

    def wrong(*arguments, **options):
        out, lse = right(*arguments, **options)
        return out * factors, lse

    monkeypatch.setattr(cache_checks, "attention_with_kvcache", wrong)
    with pytest.raises(AssertionError, match=r"^sums of the weights: "):
        check()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
def test_weights_that_do_not_sum_to_one_in_the_backward_pass_are_found(monkeypatch, dtype):
    """Recomputed from an lse that is off, where the forward pass had it right."""
    q, k, v = large_scores(dtype)
    original = reference.backward

    def wrong(gradients, dout, dlse, q, k, v, out, statistics, *rest):
        original(gradients, dout, dlse, q, k, v, out, statistics + 8.0 * torch.finfo(dtype).eps, *rest)

    monkeypatch.setattr(reference, "backward", wrong)
    with pytest.raises(AssertionError, match=r"^(dq|dk|dv|sums of the weights in the backward pass): "):
        check_attention(q, k, v, backend="reference")
