"""torch.compile of the public functions, beyond test_ops.py: PyTorch's signature, a layer, lengths that vary."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn
from fastattn import attention, attention_with_kvcache, scaled_dot_product_attention
from fastattn.testing import assert_parity
from tests.support.attention_cases import HALF, SINGLE, make_bias, make_mask, make_qkv

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, dynamic=None, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)


def assert_same(function, inputs, options, dynamic=None):
    """Bit-equal outputs and gradients, compiled and not, from the same seed."""
    leaves = [x for x in (*inputs, *options.values()) if isinstance(x, torch.Tensor) and x.requires_grad]

    def run(f):
        torch.manual_seed(0)
        results = f(*inputs, **options)
        results = results if isinstance(results, tuple) else (results,)
        return [*results, *torch.autograd.grad(sum(x.sum() for x in results), leaves)]

    for ours, theirs in zip(run(compiled(function, dynamic)), run(function), strict=True):
        assert torch.equal(ours, theirs)


SDPA_CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "boolean mask": {"attn_mask": "bool"},
    "boolean mask and causal": {"attn_mask": "bool", "is_causal": True},
    "learned mask": {"attn_mask": "learned"},
    "dropout": {"dropout_p": 0.2},
    "scale": {"scale": 0.3},
}


# Of any length, and of one alone where the masks differ most.
@pytest.mark.parametrize(
    ("call", "dynamic"), [*((call, True) for call in SDPA_CALLS), ("plain", False), ("learned mask", False)]
)
def test_scaled_dot_product_attention(call, dynamic):
    inputs = [x.requires_grad_() for x in make_qkv("cpu", (33, 47), dtype=SINGLE)]
    options = dict(SDPA_CALLS[call])
    if options.get("attn_mask") == "bool":
        options["attn_mask"] = make_mask("cpu", (1, 1, 1, 47))
    elif options.get("attn_mask") == "learned":
        options["attn_mask"] = make_bias("cpu", (2, 33, 47), requires_grad=True)
    assert_same(scaled_dot_product_attention, inputs, options, dynamic)


RANKS = [((33, 16), (47, 16)), ((2, 33, 16), (2, 47, 16)), ((2, 2, 3, 9, 8), (2, 1, 3, 7, 8))]


@pytest.mark.parametrize("shapes", RANKS, ids=str)
def test_scaled_dot_product_attention_of_other_ranks(shapes):
    query, key, value = (torch.randn(shapes[i], requires_grad=True) for i in (0, 1, 1))
    assert_same(scaled_dot_product_attention, (query, key, value), {"is_causal": True})


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_grouped_heads(dynamic):
    inputs = [x.requires_grad_() for x in make_qkv("cpu", (33, 47), heads=(4, 2), dtype=SINGLE)]
    assert_same(scaled_dot_product_attention, inputs, {"enable_gqa": True}, dynamic)
    assert_same(attention, inputs, {"causal": True, "q_offset": 3}, dynamic)


def test_offsets_per_batch_entry():
    inputs = [x.requires_grad_() for x in make_qkv("cpu", (33, 47), batch=2, dtype=SINGLE)]
    assert_same(attention, inputs, {"causal": True, "q_offset": torch.tensor([3, 14])}, dynamic=True)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_backend_that_is_asked_for(device, backend):
    """The kernels are opaque to the compiler: also the interpreter's."""
    inputs = [x.requires_grad_() for x in make_qkv(device, (17, 20), dtype=HALF)]
    assert_same(attention, inputs, {"backend": backend, "causal": True, "return_lse": True})


def test_errors_keep_their_text():
    """Where tracing meets an error it is ours that comes out."""
    q, k, v = make_qkv("cpu", (7, 9), dtype=SINGLE)
    with pytest.raises(Exception, match=r"k\.shape\[-1\]: expected q\.shape\[-1\] == 16, got 8"):
        compiled(attention)(q, k[..., :8].contiguous(), v)


def test_autocast_outside_and_inside():
    q, k, v = make_qkv("cpu", (7, 9), dtype=SINGLE)
    bias = make_bias("cpu", (2, 7, 9))

    def inside(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attention(q, k, v, bias=bias)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = attention(q, k, v, bias=bias)
        assert torch.equal(compiled(attention)(q, k, v, bias=bias), expected)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(compiled(inside)(q, k, v), expected)


def train(function, lengths):
    for q_len, kv_len in lengths:
        q, k, v = (x.requires_grad_() for x in make_qkv("cpu", (q_len, kv_len), dtype=SINGLE))
        function(q, k, v).sum().backward()


LENGTHS = [(17, 20), (32, 64), (33, 33), (100, 7), (129, 300), (64, 32)]
DYNAMIC_CALLS = {
    "attention": attention,
    "causal": lambda q, k, v: attention(q, k, v, causal=True, q_offset=0),
    "causal, bottom-right": lambda q, k, v: attention(q, k, v, causal=True),
    "window": lambda q, k, v: attention(q, k, v, window=(30, 5)),
    "dropout": lambda q, k, v: attention(q, k, v, dropout_p=0.1),
    "sdpa": scaled_dot_product_attention,
    "sdpa, causal": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
    "key padding": lambda q, k, v: attention(q, k, v, mask=k[:1, :1, :, 0].unsqueeze(1) < 1.0),
    "learned bias": lambda q, k, v: attention(q, k, v, bias=(q @ k.mT)),
    "mask and bias": lambda q, k, v: attention(q, k, v, mask=k[:1, :1, :, :1].mT < 1.0, bias=q[:1, :, :, :1].detach()),
}


@pytest.mark.parametrize("call", DYNAMIC_CALLS)
def test_a_new_length_is_not_traced_again(call):
    function = compiled(DYNAMIC_CALLS[call], dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(function, LENGTHS)


def test_lengths_that_vary_are_noticed_once():
    """Without dynamic=True: the first length is taken for a constant, the second for a variable, all others fit."""
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(attention, fullgraph=True, backend=counter)
    train(function, LENGTHS[:2])
    known = counter.frame_count
    train(function, LENGTHS[2:])
    assert counter.frame_count == known


@pytest.mark.parametrize("name", ["scale", "softcap", "dropout_p"])
def test_a_new_float_is_compiled_as_often_as_with_torch(name):
    """Dynamo takes floats for constants; a call of ours adds nothing to that."""
    q, k, v = make_qkv("cpu", (9, 9), dtype=SINGLE)

    def compilations(call):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        function = torch.compile(call, fullgraph=True, backend=counter)
        for value in (0.1, 0.2, 0.3, 0.4):
            function(value)
        return counter.frame_count

    ours = compilations(lambda x: attention(q, k, v, **{name: x}))
    assert ours == compilations(lambda x: F.scaled_dot_product_attention(q, k, v, scale=x))


def test_a_new_scale_that_multiplies_q_does_not_compile_again():
    """What the documentation advises for a scale that changes with every step: once fixed, once as a variable."""
    q, k, v = make_qkv("cpu", (9, 9), dtype=SINGLE)

    def call(scale):
        return attention(q * scale, k, v, scale=1.0, causal=True)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(call, fullgraph=True, backend=counter)
    for scale in (0.1, 0.2, 0.3, 0.4):
        assert torch.equal(function(scale), call(scale))
    assert counter.frame_count == 2


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_scale_below_the_smallest_normal_number_is_refused(dynamic):
    """By the operators: a trace asks no symbolic number. PyTorch's own kernels take such a scale."""
    q, k, v = make_qkv("cpu", (9, 9), dtype=SINGLE)
    caches, lens = [x.transpose(1, 2).contiguous() for x in (k, v)], torch.tensor([5] * len(q), dtype=torch.int32)
    for call in (
        lambda scale: attention(q, k, v, scale=scale, backend="reference"),
        lambda scale: attention_with_kvcache(q, *caches, cache_lens=lens, scale=scale, backend="reference"),
    ):
        function = compiled(call, dynamic)
        for scale in (0.5, 0.25):
            assert function(scale).isfinite().all()
        with pytest.raises(ValueError, match=r"scale: expected 0 or at least 2\*\*-126 in size, .* got 1e-40"):
            function(1e-40)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cc") and not shutil.which("gcc"), reason="inductor needs a C compiler")
def test_inductor():
    """The default compiler, which fuses what stands around the call."""

    def block(x, weight):
        q, k, v = F.linear(x, weight).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return attention(q, k, v, causal=True, q_offset=0).transpose(1, 2).flatten(2)

    x, weight = torch.randn(2, 33, 32), torch.randn(96, 32) / 6.0

    def run(f, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        out = f(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    results = run(torch.compile(block, fullgraph=True), SINGLE), run(block, torch.float64), run(block, SINGLE)
    for name, *three in zip(("out", "dx", "dweight"), *results, strict=True):
        assert_parity(*three, name, intermediate=three[1].abs().max().item())


# Layers by name: how to make one, and its arguments at two lengths. A Transformer contains both stacks and layers.
LAYERS = {
    "MultiheadAttention": (lambda n: n.MultiheadAttention(32, 2), lambda x, y: (x, y, y)),
    "Transformer": (lambda n: n.Transformer(32, 2, 1, 1, 64), lambda x, y: (x, y)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_compiles_whole_and_once_for_all_lengths(name, monkeypatch):
    """Dropout is on; outputs and gradients are those of the layer to the bit, where that drops by PyTorch, as a trace
    does.
    """
    monkeypatch.setattr("fastattn.functional.dropout.served", lambda *_: False)
    make, arguments = LAYERS[name]
    layer = make(fastattn.nn)
    function = compiled(layer, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for first, second in [(9, 12), (17, 5)]:
            args = arguments(torch.randn(first, 2, 32), torch.randn(second, 2, 32))
            results = []
            for f in (function, layer):
                torch.manual_seed(0)
                layer.zero_grad()
                out = f(*args)
                out = out[0] if isinstance(out, tuple) else out
                out.square().sum().backward()
                results.append([out, *(p.grad.clone() for p in layer.parameters())])
            for ours, expected in zip(*results, strict=True):
                assert torch.equal(ours, expected)
