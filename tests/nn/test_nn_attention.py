"""fastattn.nn.MultiheadAttention against torch.nn.MultiheadAttention."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastattn.nn as fnn
from fastattn.testing import assert_parity
from tests.support.layer_checks import (
    DRAWS,
    INF,
    Calls,
    Pool,
    assert_same_as_torch,
    assert_same_error,
    assert_same_signature,
    cast,
    causal,
    padding,
    run,
    to_float,
)
from tests.support.pairwise import pairwise

N, H, L, S, E = 3, 2, 9, 14, 16  # batch, heads, query length, key length, embedding
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pair(*args, **kwargs):
    """Our layer and torch.nn's, without zeros in the biases, which would hide a mistake."""
    theirs = nn.MultiheadAttention(*args, **kwargs)
    for p in theirs.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, std=0.2)
    return fnn.MultiheadAttention(*args, **kwargs), theirs


def layout(x, batch_first):
    """x (N, L, E) in the layer's layout."""
    return x if batch_first else x.transpose(0, 1)


# Masks for queries of length L and keys of length S. Every query keeps a key: other rows are NaN in torch.nn with
# need_weights=True, and have tests of their own.
ATTN_2D = torch.rand(L, S, generator=torch.Generator().manual_seed(3)) < 0.3
ATTN_2D[:, 0] = False
ATTN_3D = torch.rand(N * H, L, S, generator=torch.Generator().manual_seed(4)) < 0.3
ATTN_3D[:, :, 0] = False
PADDING = padding([S, 1, 4], S)
MASKS = {
    "none": {},
    "bool": {"attn_mask": ATTN_2D},
    "float": {"attn_mask": to_float(ATTN_2D)},
    "bool 3-D": {"attn_mask": ATTN_3D},
    "float 3-D": {"attn_mask": to_float(ATTN_3D)},
    "padding": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": to_float(PADDING)},
    "bool + padding": {"attn_mask": ATTN_2D, "key_padding_mask": PADDING},
    "float + float padding": {"attn_mask": to_float(ATTN_2D), "key_padding_mask": to_float(PADDING)},
    "bool + float padding": {"attn_mask": ATTN_2D, "key_padding_mask": to_float(PADDING)},
    "float + padding": {"attn_mask": to_float(ATTN_2D), "key_padding_mask": PADDING},
    "bool 3-D + padding": {"attn_mask": ATTN_3D, "key_padding_mask": PADDING},
    "float 3-D + padding": {"attn_mask": to_float(ATTN_3D), "key_padding_mask": PADDING},
    "float 3-D + float padding": {"attn_mask": to_float(ATTN_3D), "key_padding_mask": to_float(PADDING)},
}
quiet = pytest.mark.filterwarnings("ignore:Support for mismatched")  # torch.nn's, for bool next to float


# --- the result -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", ["bool", "float"])
def test_cross_attention_with_padded_keys(mask, need_weights, batch_first):
    """THE HEADLINE TEST: a batch of memories of different lengths, padded, attended to by queries of another length.

    The most repeated silent error of attention layers is here: padding applied to queries instead of keys, or ignored.
    So the truth is not another masked computation: each sequence alone, cut to its length, must give the same output
    and gradients; what stands in the padding must not matter, and must get exactly zero gradient.
    """
    layer = fnn.MultiheadAttention(E, H, batch_first=batch_first)
    lengths = [S, 1, 4]
    key_padding_mask = padding(lengths, S)
    query, memory = torch.randn(N, L, E), torch.randn(N, S, E)
    kpm = key_padding_mask if mask == "bool" else torch.zeros(N, S).masked_fill(key_padding_mask, -INF)

    def gradients(layer, query, memory, kpm):
        query, memory = query.clone().requires_grad_(), memory.clone().requires_grad_()
        q, m = layout(query, batch_first), layout(memory, batch_first)
        out, weights = layer(q, m, m, key_padding_mask=kpm, need_weights=need_weights)
        out = layout(out, batch_first)
        grads = torch.autograd.grad((out * query.detach().sin()).sum(), [query, memory, *layer.parameters()])
        return out.detach(), weights, *grads

    out, weights, dquery, dmemory, *dparams = gradients(layer, query, memory, kpm)
    assert (dmemory[key_padding_mask] == 0).all()
    if need_weights:
        assert (weights.masked_select(key_padding_mask[:, None, :]) == 0).all()

    exact, pool = copy.deepcopy(layer).double(), Pool()
    dparams_eager, dparams_exact = 0, 0
    for n, length in enumerate(lengths):
        alone = query[n : n + 1], memory[n : n + 1, :length]
        o, _, dq, dm, *dp = gradients(layer, *alone, None)
        o_exact, _, dq_exact, dm_exact, *dp_exact = gradients(exact, *(x.double() for x in alone), None)
        pool.add("output", out[n : n + 1], o_exact, o)
        pool.add("gradient of query", dquery[n : n + 1], dq_exact, dq)
        pool.add("gradient of memory", dmemory[n : n + 1, :length], dm_exact, dm)
        dparams_eager += torch.cat([x.flatten() for x in dp])
        dparams_exact += torch.cat([x.flatten() for x in dp_exact])
    pool.add("gradients of parameters", torch.cat([x.flatten() for x in dparams]), dparams_exact, dparams_eager)
    pool.check()

    junk = memory.masked_fill(key_padding_mask[..., None], 1e4)
    assert torch.equal(gradients(layer, query, junk, kpm)[0], out)


@quiet
@pytest.mark.parametrize(("mask", "need_weights", "dtype"), pairwise(MASKS, [True, False], DTYPES))
def test_masks(mask, need_weights, dtype):
    ours, theirs = pair(E, H, batch_first=True)
    query, key, value = torch.randn(N, L, E), torch.randn(N, S, E), torch.randn(N, S, E)
    kwargs = MASKS[mask] | {"need_weights": need_weights}
    assert_same_as_torch(ours, theirs, [query, key, value], kwargs, dtype)


@pytest.mark.parametrize(
    ("bias", "inputs", "batch_first", "training"),
    pairwise([True, False], ["self", "key is value", "all different"], [True, False], [True, False]),
)
def test_projections(bias, inputs, batch_first, training):
    ours, theirs = pair(E, H, bias=bias, batch_first=batch_first)
    ours.train(training), theirs.train(training)
    query, key, value = (layout(torch.randn(N, L, E), batch_first) for _ in range(3))
    args = {"self": [query] * 3, "key is value": [query, key, key], "all different": [query, key, value]}[inputs]
    for need_weights, average in [(False, True), (True, True), (True, False)]:
        kwargs = {"need_weights": need_weights, "average_attn_weights": average}
        assert_same_as_torch(ours, theirs, args, kwargs)


@quiet
@pytest.mark.parametrize(
    ("options", "mask", "need_weights"),
    pairwise(
        [{"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}],
        MASKS,
        [True, False],
    ),
)
def test_extra_keys(options, mask, need_weights):
    ours, theirs = pair(E, H, batch_first=True, **options)
    args = [torch.randn(N, L, E), torch.randn(N, S, E), torch.randn(N, S, E)]
    assert_same_as_torch(ours, theirs, args, MASKS[mask] | {"need_weights": need_weights})


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kdim", "vdim"), [(5, 9), (5, None), (None, 9)])
def test_other_sizes_of_key_and_value(kdim, vdim, bias, need_weights):
    ours, theirs = pair(E, H, kdim=kdim, vdim=vdim, bias=bias, batch_first=True)
    args = [torch.randn(N, L, E), torch.randn(N, S, kdim or E), torch.randn(N, S, vdim or E)]
    kwargs = MASKS["bool + padding"] | {"need_weights": need_weights}
    assert_same_as_torch(ours, theirs, args, kwargs)


@pytest.mark.parametrize(
    ("key_padding_mask", "attn_mask", "need_weights", "batch_first"),
    pairwise([None, padding([4], S)[0]], [None, ATTN_2D, ATTN_3D[:H], to_float(ATTN_2D)], [True, False], [True, False]),
)
@quiet
def test_unbatched(key_padding_mask, attn_mask, need_weights, batch_first):
    ours, theirs = pair(E, H, batch_first=batch_first)
    args = [torch.randn(L, E), torch.randn(S, E), torch.randn(S, E)]
    kwargs = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "need_weights": need_weights}
    assert_same_as_torch(ours, theirs, args, kwargs)
    assert_same_as_torch(ours, theirs, args, kwargs | {"average_attn_weights": False})


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("need_weights", [True, False])
def test_empty_dimensions(shape, need_weights):
    n, queries, keys = shape
    layer = fnn.MultiheadAttention(E, H, batch_first=True)
    out, weights = layer(
        torch.randn(n, queries, E), torch.randn(n, keys, E), torch.randn(n, keys, E), need_weights=need_weights
    )
    assert out.shape == (n, queries, E)
    assert out.isfinite().all()
    assert weights is None or weights.shape == (n, queries, keys)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "masks",
    [
        {"key_padding_mask": padding([S, 0, 4], S)},
        {"key_padding_mask": torch.zeros(N, S).masked_fill(padding([S, 0, 4], S), -INF)},
        {"key_padding_mask": padding([S, 0, 4], S), "attn_mask": to_float(ATTN_2D)},
        {"key_padding_mask": padding([S, 0, 4], S), "attn_mask": ATTN_2D},
        {"key_padding_mask": padding([S, 2, 4], S), "attn_mask": torch.arange(S).expand(L, S) < 2},  # only jointly
        {"attn_mask": torch.ones(N, H, L, S, dtype=torch.bool).index_fill(0, torch.tensor([0, 2]), 0).flatten(0, 1)},
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_fully_masked_rows_are_zero(training, masks, need_weights):
    """Sequence 1 has nothing to attend to: attention gives it 0, so the layer gives it out_proj.bias. No NaN."""
    ours, _ = pair(E, H, batch_first=True)
    nn.init.normal_(ours.out_proj.bias)
    ours.train(training)
    args = [torch.randn(N, L, E), torch.randn(N, S, E), torch.randn(N, S, E)]
    results = run(ours, args, masks | {"need_weights": need_weights, "average_attn_weights": False})
    assert all(x.isfinite().all() for x in results.values())
    assert torch.equal(results["output 0"][1], ours.out_proj.bias.detach().expand(L, E))
    if need_weights:
        assert (results["output 1"][1] == 0).all()

    present = [0, 2]  # the other sequences are those of a batch without sequence 1
    rest = {}
    for name, mask in masks.items():
        if mask.shape[0] == N:
            mask = mask[present]
        elif mask.shape[0] == N * H:
            mask = mask.unflatten(0, (N, H))[present].flatten(0, 1)
        rest[name] = mask
    out = ours(*(x[present] for x in args), **rest, need_weights=need_weights)[0]
    exact = copy.deepcopy(ours).double()(*(x[present].double() for x in args), **rest, need_weights=need_weights)[0]
    assert_parity(results["output 0"][present], exact, out, name="other sequences")


# --- causal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["bool", "float"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("keys", [L, S, L - 2])
@pytest.mark.parametrize("padded", [True, False])
def test_causal_hint(padded, keys, need_weights, mask):
    ours, theirs = pair(E, H, batch_first=True)
    args = [torch.randn(N, L, E), torch.randn(N, keys, E), torch.randn(N, keys, E)]
    above = torch.ones(L, keys, dtype=torch.bool).triu(1)  # row i sees keys 0..i, also where L != S
    attn_mask = above if mask == "bool" else torch.zeros(L, keys).masked_fill(above, -INF)
    kpm = padding([keys, 1, 2], keys) if padded else None
    if kpm is not None and mask == "float":
        kpm = torch.zeros(N, keys).masked_fill(kpm, -INF)
    kwargs = {"attn_mask": attn_mask, "key_padding_mask": kpm, "need_weights": need_weights}
    assert_same_as_torch(ours, theirs, args, kwargs | {"is_causal": True})
    assert_same_as_torch(ours, theirs, args, kwargs | {"is_causal": False})


@pytest.mark.parametrize("padded", [True, False])
def test_causal_hint_becomes_the_flag_and_the_mask_is_not_read(padded, monkeypatch):
    calls = Calls(monkeypatch)
    layer = fnn.MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    kpm = padding([L, 1, 4], L) if padded else None
    options = {"key_padding_mask": kpm, "is_causal": True, "need_weights": False}
    out, _ = layer(x, x, x, attn_mask=causal(L), **options)
    unread, _ = layer(x, x, x, attn_mask=torch.full((L, L), float("nan")), **options)
    assert torch.equal(out, unread)
    for kwargs in calls.kwargs:
        assert kwargs["causal"] is True
        assert kwargs["q_offset"] == 0
        assert kwargs["bias"] is None
        assert (kwargs["mask"] is None) == (kpm is None)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_causal_hint_does_not_hide_extra_keys(options):
    """torch.nn's hint makes a causal mask over all S + 1 keys, so no query sees the extra one; the mask opens it."""
    layer = fnn.MultiheadAttention(E, H, batch_first=True, **options)
    x = torch.randn(N, L, E)
    hinted, _ = layer(x, x, x, attn_mask=causal(L), is_causal=True, need_weights=False)
    read, _ = layer(x, x, x, attn_mask=causal(L), need_weights=False)
    assert torch.equal(hinted, read)


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [m for m in MASKS if "+" in m])
def test_two_masks_are_not_expanded(mask, monkeypatch):
    """torch.nn makes a float (N*H, L, S) tensor of two masks. Here none grows, except where both are float."""
    calls = Calls(monkeypatch)
    layer = fnn.MultiheadAttention(E, H, batch_first=True)
    layer(torch.randn(N, L, E), torch.randn(N, S, E), torch.randn(N, S, E), **MASKS[mask], need_weights=False)
    (kwargs,) = calls.kwargs
    largest = max(m.numel() for m in MASKS[mask].values())
    if mask == "float + float padding":
        largest = N * L * S
        assert kwargs["mask"] is None
    for name in ("mask", "bias"):
        assert kwargs[name] is None or kwargs[name].numel() <= largest


# --- weights and dropout --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool + padding", "float 3-D"])
def test_weights_after_dropout_are_those_of_torch(mask, average):
    ours, theirs = pair(E, H, dropout=0.4, batch_first=True)
    args = [torch.randn(N, L, E), torch.randn(N, S, E), torch.randn(N, S, E)]
    kwargs = MASKS[mask] | {"average_attn_weights": average}
    assert_same_as_torch(ours, theirs, args, kwargs)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_statistics(need_weights):
    """Uniform attention over values 1: the output is the mean of S independent keep / (1 - p), per row and head."""
    p, rows, keys = 0.3, 2000, 8
    layer = fnn.MultiheadAttention(H, H, dropout=p, bias=False, batch_first=True)  # head size 1
    with torch.no_grad():
        layer.in_proj_weight.zero_()[2 * H :] = torch.eye(H)
        layer.out_proj.weight.copy_(torch.eye(H))
    query, ones = torch.zeros(1, rows, H), torch.ones(1, keys, H)
    out, _ = layer(query, ones, ones, need_weights=need_weights)
    n = rows * H
    variance = p / (1 - p) / keys
    assert abs(out.mean() - 1) < 5 * (variance / n) ** 0.5
    assert abs(out.var() - variance) < 5 * variance * (2 / n) ** 0.5
    layer.eval()
    out, _ = layer(query, ones, ones, need_weights=need_weights)
    assert_parity(out, torch.ones_like(out).double(), torch.ones_like(out))


def test_same_seed_same_dropout():
    layer = fnn.MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    x = torch.randn(N, L, E)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(layer(x, x, x, need_weights=False)[0])
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


# --- the contract of torch.nn ---------------------------------------------------------------------------------------

VARIANTS = [
    {},
    {"bias": False},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 5, "vdim": 9},
    {"kdim": 5, "bias": False, "dropout": 0.1, "batch_first": True, "dtype": torch.float64, "device": "cpu"},
]


def test_signatures():
    assert_same_signature(fnn.MultiheadAttention, nn.MultiheadAttention)
    assert_same_signature(fnn.MultiheadAttention.forward, nn.MultiheadAttention.forward)
    assert issubclass(fnn.MultiheadAttention, nn.MultiheadAttention)


@pytest.mark.parametrize("options", VARIANTS)
def test_same_seed_same_weights_and_strict_state_dict_both_ways(options):
    torch.manual_seed(7)
    ours = fnn.MultiheadAttention(E, H, **options)
    after_ours = torch.rand(1)
    torch.manual_seed(7)
    theirs = nn.MultiheadAttention(E, H, **options)
    assert torch.equal(torch.rand(1), after_ours)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(nn.MultiheadAttention(E, H, **options).state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


BAD_CALLS = {
    "query 4-D": lambda m, x, y: m(x[None], y, y),
    "key 2-D": lambda m, x, y: m(x, y[0], y[0]),
    "unbatched query, batched key": lambda m, x, y: m(x[0], y, y),
    "padding mask 1-D": lambda m, x, y: m(x, y, y, key_padding_mask=PADDING[0]),
    "padding mask for unbatched 2-D": lambda m, x, y: m(x[0], y[0], y[0], key_padding_mask=PADDING),
    "padding mask of another batch": lambda m, x, y: m(x, y, y, key_padding_mask=PADDING[:2]),
    "padding mask of another length": lambda m, x, y: m(x, y, y, key_padding_mask=PADDING[:, 1:]),
    "padding mask of another length, padded": lambda m, x, y: m(x, y, y, ATTN_2D[:N, :L], attn_mask=ATTN_2D),
    "integer padding mask": lambda m, x, y: m(x, y, y, key_padding_mask=PADDING.int()),
    "mask 1-D": lambda m, x, y: m(x, y, y, attn_mask=ATTN_2D[0]),
    "mask 2-D of another size": lambda m, x, y: m(x, y, y, attn_mask=ATTN_2D.T),
    "mask 3-D of another size": lambda m, x, y: m(x, y, y, attn_mask=ATTN_3D[1:]),
    "mask 3-D for unbatched": lambda m, x, y: m(x[0], y[0], y[0], attn_mask=ATTN_3D),
    "mask 1-D for unbatched": lambda m, x, y: m(x[0], y[0], y[0], attn_mask=ATTN_2D[0]),
    "integer mask": lambda m, x, y: m(x, y, y, attn_mask=ATTN_2D.int()),
    "hint without mask": lambda m, x, y: m(x, y, y, is_causal=True),
    "embedding": lambda m, x, y: m(x[..., 1:], y, y),
    "key and value differ": lambda m, x, y: m(x, y, y[:, 1:]),
    "key and value differ, unbatched": lambda m, x, y: m(x[0], y[0], y[0, 1:]),
    "key embedding": lambda m, x, y: m(x, y[..., 1:], y[..., 1:]),
}


@quiet
@pytest.mark.parametrize("options", [{"batch_first": True}, {"batch_first": False}, {"batch_first": True, "kdim": 5}])
@pytest.mark.parametrize("call", BAD_CALLS)
def test_errors_are_those_of_torch(call, options):
    ours, theirs = pair(E, H, **options)
    x, y = torch.randn(N, L, E), torch.randn(N, S, E)
    if not options["batch_first"]:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    if "kdim" in options:
        y = y[..., :5]
    assert_same_error(lambda: BAD_CALLS[call](ours, x, y), lambda: BAD_CALLS[call](theirs, x, y))


@pytest.mark.parametrize("args", [(0, 1), (4, 0), (5, 2)])
def test_constructor_errors_are_those_of_torch(args):
    assert_same_error(lambda: fnn.MultiheadAttention(*args), lambda: nn.MultiheadAttention(*args))


def test_unknown_argument_raises():
    x = torch.randn(N, L, E)
    with pytest.raises(TypeError, match="windows"):
        fnn.MultiheadAttention(E, H)(x, x, x, windows=3)


def test_nested_tensors_are_refused():
    layer = fnn.MultiheadAttention(E, H, batch_first=True)
    jagged = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(2, E)], layout=torch.jagged)
    for need_weights in (True, False):
        with pytest.raises(TypeError, match="expected query, key and value to be dense"):
            layer(jagged, jagged, jagged, need_weights=need_weights)


@pytest.mark.parametrize("bias", [True, False])
def test_attention_to_a_memory_projected_once_is_forward(bias):
    ours, theirs = pair(E, H, batch_first=True, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    exact, (x, memory) = copy.deepcopy(theirs).double(), (torch.randn(N, L, E), torch.randn(N, S, E))
    with torch.no_grad():
        result = ours.step_cross(x, *ours.keys_values(memory))
        expected = exact(x.double(), memory.double(), memory.double())[0]
        assert_parity(result, expected, theirs(x, memory, memory)[0])


def test_a_step_is_of_the_first_layer_of_a_cache():
    layer, x = fnn.MultiheadAttention(E, H, batch_first=True), torch.randn(N, L, E)
    cache = fnn.KVCache(2, N, L, H, E // H)
    empty = cache.k[1].clone()
    out = layer.step(x, cache)
    assert torch.equal(cache.k[1].nan_to_num(), empty.nan_to_num())
    k, _ = layer.keys_values(x)
    assert torch.equal(cache.k[0], k.transpose(1, 2)) and torch.equal(out, layer.step(x, cache, layer=0))


@pytest.mark.parametrize(
    "option", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 8}, {"vdim": 8}], ids=str
)
def test_what_caches_and_packed_sequences_do_not_support_is_refused(option):
    layer, x = fnn.MultiheadAttention(E, H, batch_first=True, **option), torch.randn(L, E)
    assert layer.takes_packed() == (not option)
    bounds = torch.tensor([0, L], dtype=torch.int32)
    if not option:
        assert layer.packed(x, bounds).shape == (L, E)
        return
    with pytest.raises(ValueError, match=r"MultiheadAttention\.packed: expected no add_bias_kv, add_zero_attn, kdim"):
        layer.packed(x, bounds)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_strided_nested_tensors_of_torch_encoder_are_served():
    layer = fnn.MultiheadAttention(E, H, batch_first=True).eval()
    exact = copy.deepcopy(layer).double()
    rows = [torch.randn(3, E), torch.randn(0, E), torch.randn(5, E)]
    with torch.no_grad():
        nested = torch.nested.as_nested_tensor(rows)
        out, weights = layer(nested, nested, nested, need_weights=False)
        assert weights is None
        for row, result in zip(rows, out.unbind(), strict=True):
            assert_parity(result, exact(*[row.double()] * 3)[0], layer(row, row, row)[0])
        with pytest.raises(TypeError, match="expected query, key and value to be dense"):
            layer(nested, nested, nested)  # weights


def test_masks_of_another_float_type():
    """A float32 mask for half precision input: torch.nn is silently wrong here on some GPUs, or raises."""
    layer = fnn.MultiheadAttention(E, H, batch_first=True).bfloat16()
    x = torch.randn(N, L, E).bfloat16()
    for need_weights in (True, False):
        want, _ = layer(x, x, x, attn_mask=causal(L, torch.bfloat16), need_weights=need_weights)
        for dtype in (torch.float32, torch.float64):
            got, weights = layer(x, x, x, attn_mask=causal(L, dtype), need_weights=need_weights)
            assert torch.equal(got, want)
            assert weights is None or weights.dtype == torch.bfloat16


def test_gradient_of_float_masks():
    ours, theirs = pair(E, H, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    exact, pool = copy.deepcopy(theirs).double(), Pool()
    for _ in range(DRAWS):
        args = [torch.randn(N, L, E), torch.randn(N, S, E), torch.randn(N, S, E)]
        results = []
        for layer, dtype in ((ours, torch.float32), (exact, torch.float64), (theirs, torch.float32)):
            masks = [m.to(dtype).requires_grad_() for m in (to_float(ATTN_2D), to_float(PADDING))]
            q, k, v = cast(args, dtype)
            out, _ = layer(q, k, v, attn_mask=masks[0], key_padding_mask=masks[1], need_weights=False)
            results.append(torch.autograd.grad((out * q).sum(), masks))
        for name, *gradients in zip(("attn_mask", "key_padding_mask"), *results, strict=True):
            pool.add(name, *gradients)
    pool.check()


# --- living in a model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copier):
    layer = fnn.MultiheadAttention(E, H, add_bias_kv=True, batch_first=True)
    twin = copier(layer)
    x = torch.randn(N, L, E)
    assert type(twin) is fnn.MultiheadAttention
    assert torch.equal(layer(x, x, x)[0], twin(x, x, x)[0])
    assert len(twin._forward_pre_hooks) == len(layer._forward_pre_hooks)


def test_hooks_run_in_training_and_evaluation():
    layer = fnn.MultiheadAttention(E, H, batch_first=True)
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append("after"))
    layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    layer.out_proj.register_forward_hook(lambda module, args, output: seen.append("out_proj"))
    x = torch.randn(N, L, E)
    for training in (True, False):
        seen.clear()
        with torch.set_grad_enabled(training):
            layer.train(training)(x, x, x)
        assert seen == ["before", "out_proj", "after"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_to_dtype(dtype):
    layer = fnn.MultiheadAttention(E, H, batch_first=True).to(dtype)
    x = torch.randn(N, L, E, dtype=dtype)
    for need_weights in (True, False):
        out, weights = layer(x, x, x, key_padding_mask=padding([L, 2, 0], L), need_weights=need_weights)
        assert out.dtype == dtype
        assert out.isfinite().all()
        assert weights is None or weights.dtype == dtype


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}])
def test_autocast(options, need_weights):
    ours, theirs = pair(E, H, batch_first=True, **options)
    ours.load_state_dict(theirs.state_dict())
    exact, pool = copy.deepcopy(theirs).double(), Pool()
    kwargs = {"attn_mask": causal(L), "need_weights": need_weights}
    for _ in range(DRAWS):
        x = torch.randn(N, L, E)
        expected, _ = exact(*[x.double()] * 3, **cast(kwargs, torch.float64))
        with torch.autocast("cpu", torch.bfloat16):
            out, weights = ours(x, x, x, **kwargs)
            eager, eager_weights = theirs(x, x, x, **kwargs)
        assert out.dtype == eager.dtype == torch.bfloat16
        assert weights is None or weights.dtype == eager_weights.dtype
        pool.add("output", out, expected, eager)
    pool.check()
    out.float().sum().backward()  # pyright: ignore[reportPossiblyUnboundVariable]
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool + padding", "float + padding"])
def test_compiles_without_graph_breaks(mask, need_weights):
    ours, _ = pair(E, H, batch_first=True)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    args = [torch.randn(N, L, E), torch.randn(N, S, E), torch.randn(N, S, E)]
    kwargs = MASKS[mask] | {"need_weights": need_weights}
    exact = run(copy.deepcopy(ours).double(), *cast((args, kwargs), torch.float64))
    eager, traced = run(ours, args, kwargs), run(compiled, args, kwargs)
    for (name, a), b, c in zip(traced.items(), exact.values(), eager.values(), strict=True):
        assert_parity(a, b, c, name, intermediate=b)


# --- inside torch.nn's layers ---------------------------------------------------------------------------------------


def torch_layer(**kwargs):
    return nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True, **kwargs)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_encoder_layer_cannot_bypass(norm_first, training, grad, monkeypatch):
    """torch.nn.TransformerEncoderLayer reads the weights of self_attn in evaluation, and calls it only if it must."""
    calls = Calls(monkeypatch)
    layer = torch_layer(norm_first=norm_first)
    layer.self_attn = fnn.MultiheadAttention(E, H, batch_first=True)
    layer.train(training)
    with torch.set_grad_enabled(grad):
        for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            before = len(calls)
            twin(torch.randn(N, L, E))
            assert len(calls) == before + 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("when", ["layer before", "layer after", "attention before", "attention after"])
@pytest.mark.parametrize("training", [True, False])
def test_torch_encoder_cannot_bypass(training, when, monkeypatch):
    """torch.nn.TransformerEncoder packs padded input into nested tensors in evaluation: still our code, same result."""
    calls = Calls(monkeypatch)
    layer, theirs = torch_layer(), nn.TransformerEncoder(torch_layer(), 2)
    ours_layer = fnn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True)
    attention = fnn.MultiheadAttention(E, H, batch_first=True)
    if when == "layer before":
        ours = nn.TransformerEncoder(ours_layer, 2)
    elif when == "attention before":
        layer.self_attn = attention
        ours = nn.TransformerEncoder(layer, 2)
    else:
        ours = nn.TransformerEncoder(layer, 2)
        for i in range(2):
            if when == "layer after":
                ours.layers[i] = copy.deepcopy(ours_layer)
            else:
                ours.layers[i].self_attn = copy.deepcopy(attention)
    ours.load_state_dict(theirs.state_dict())
    ours.train(training), theirs.train(training)
    kpm = padding([L, 1, 3], L)
    x = torch.randn(N, L, E)
    with torch.no_grad():
        out, eager = ours(x, src_key_padding_mask=kpm), theirs(x, src_key_padding_mask=kpm)
        exact = copy.deepcopy(theirs).double()(x.double(), src_key_padding_mask=kpm)
    assert len(calls) == 2
    assert_parity(out, exact, eager, name="output")


# --- the samples in the torch wheel ---------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("training", [True, False])
def test_samples_of_torch(training):
    modules = pytest.importorskip(
        "torch.testing._internal.common_modules",
        reason="torch's samples need the package expecttest",
        exc_type=ImportError,
    )
    (info,) = [m for m in modules.module_db if m.module_cls is nn.MultiheadAttention]
    samples = info.module_inputs_func(info, "cpu", torch.float32, requires_grad=False, training=training)
    assert len(samples) >= 64
    pool = Pool()
    for sample in samples:
        construct, forward = sample.constructor_input, sample.forward_input
        ours = fnn.MultiheadAttention(*construct.args, **construct.kwargs).train(training)
        theirs = nn.MultiheadAttention(*construct.args, **construct.kwargs).train(training)
        ours.load_state_dict(theirs.state_dict())
        exact = copy.deepcopy(theirs).double()
        actual, eager = ours(*forward.args, **forward.kwargs), theirs(*forward.args, **forward.kwargs)
        expected = exact(*cast(forward.args, torch.float64), **forward.kwargs)
        batched = sample.reference_fn(ours, *forward.args, **forward.kwargs)  # with a batch dimension
        for i, name in enumerate(("output", "weights")):
            pool.add(name, actual[i], expected[i], eager[i])
            pool.add(f"{name}, batched", batched[i], expected[i], eager[i])
    pool.check()
