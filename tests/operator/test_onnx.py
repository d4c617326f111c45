"""Calls in plain operators: ONNX programs, run by ONNX's own evaluator, and the table of decompositions."""

import pytest
import torch
from torch import nn
from torch.export import Dim, export

import fastattn
from fastattn import attention, attention_varlen, attention_with_kvcache, reference, scaled_dot_product_attention
from fastattn.testing import assert_parity
from tests.support.attention_cases import HALF, make_mask, make_qkv
from tests.support.modules import Call

LENGTHS = (6, 9)


def mask_with_an_empty_row():
    mask = make_mask("cpu", (2, 1, *LENGTHS))
    mask[0, :, 3] = False
    return mask


BLOCK_MASK = fastattn.BlockMask.from_documents(torch.arange(6) // 3, torch.arange(9) // 3, causal=True)
EXTRAS = {"alibi_slopes": torch.arange(4.0) / 4, "sinks": torch.arange(4.0), "softcap": 2.0}

# What is called, and with which further tensors.
CALLS = {
    "plain": (attention, {}, {}),
    "causal": (attention, {"causal": True}, {}),
    "mask": (attention, {}, {"mask": mask_with_an_empty_row()}),
    "causal, mask": (attention, {"causal": True, "q_offset": 0}, {"mask": mask_with_an_empty_row()}),
    "window": (attention, {"window": (2, 1)}, {}),
    "softcap": (attention, {"softcap": 2.0}, {}),
    "sinks": (attention, {"sinks": EXTRAS["sinks"]}, {}),
    "all": (
        attention, {"causal": True, "window": (4, None), **EXTRAS},
        {"mask": mask_with_an_empty_row(), "bias": torch.randn(4, *LENGTHS)},
    ),
    "block mask": (attention, {"block_mask": BLOCK_MASK}, {}),
}  # fmt: skip


def case(name, dtype=torch.float32):
    """(module, arguments, what it computes in another dtype)."""
    function, options, tensors = CALLS[name]
    torch.manual_seed(0)
    q, k, v = make_qkv("cpu", LENGTHS, heads=(4, 2), batch=2, dtype=dtype)

    def call(q, k, v, *given):
        return function(q, k, v, **options, **dict(zip(tensors, given, strict=True)))

    def specification(to):
        """Plain eager PyTorch in this dtype, or float64."""
        own = [x.to(to) for x in (q, k, v)]
        floats = {n: x.to(to) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                  for n, x in {**options, **tensors}.items()}  # fmt: skip
        spec = fastattn.spec.make_spec(*own, **floats)
        return reference.definition.attention(*own, spec.operands(None), spec.options)[0]

    return Call(call), (q, k, v, *tensors.values()), specification


def plain_names(program):
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [name for name in names if "fastattn" in name]


def onnx_results(module, args, **options):
    """What ONNX's own evaluator computes from the program that the exporter writes."""
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    from onnx.reference import ReferenceEvaluator

    program = torch.onnx.export(module, args, dynamo=True, verbose=False, **options).model_proto
    assert {x.domain for x in program.opset_import} == {""}, "operators that are not ONNX's own"
    evaluator = ReferenceEvaluator(program)

    def run(*args):
        names = [x.name for x in program.graph.input]
        results = evaluator.run(None, {n: x.numpy() for n, x in zip(names, args, strict=True)})
        return torch.from_numpy(results[0])

    return run


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in CALLS), ("window", HALF)], ids=str)
def test_onnx(name, dtype):
    module, args, specification = case(name, dtype)
    out = onnx_results(module, args)(*args)
    assert_parity(out, specification(torch.float64), specification(dtype))
    assert out.dtype == dtype


def test_onnx_of_any_length():
    dim, size = Dim.DYNAMIC, {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    module = Call(lambda q, k, mask: attention(q, k, k, causal=True, window=(3, None), mask=mask))

    def make(batch, q_len, kv_len):
        return (
            *torch.randn(1, batch, 4, q_len, 8),
            torch.randn(batch, 4, kv_len, 8),
            make_mask("cpu", (batch, 1, 1, kv_len)),
        )

    run = onnx_results(module, make(3, 7, 11), dynamic_shapes=((size, size, {0: dim, 3: dim}),))
    for sizes in [(3, 7, 11), (2, 9, 20), (5, 6, 6)]:
        q, k, mask = make(*sizes)
        exact = module(q.double(), k.double(), mask)
        assert_parity(run(q, k, mask), exact, module(q, k, mask))


def test_onnx_of_a_converted_model():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True).eval()
    x, padding = torch.randn(2, 5, 32), torch.arange(5) >= torch.tensor([[5], [3]])

    def call(layer):
        return Call(lambda x, padding: layer(x, src_key_padding_mask=padding))

    eager = layer(x, src_key_padding_mask=padding)
    fastattn.convert(layer)
    out = onnx_results(call(layer), (x, padding))(x, padding)
    exact = layer.double()(x.double(), src_key_padding_mask=padding)
    assert_parity(out, exact, eager)


REFUSED = {
    "dropout_p": (
        lambda q, k: attention(q, k, k, dropout_p=0.2),
        r"dropout_p: expected 0 .*, got 0\.2; export the model in evaluation mode",
    ),
    "cu_seqlens_q": (
        lambda q, k: attention_varlen(*(x[0].transpose(0, 1) for x in (q, k, k)), torch.tensor([0, 2, 6])),
        r"cu_seqlens_q: packed sequences cannot be",
    ),
    "k_cache": (
        lambda q, k: attention_with_kvcache(q, k.transpose(1, 2), k.transpose(1, 2), cache_lens=3),
        r"k_cache: .* written in place, which ONNX cannot express",
    ),
}


@pytest.fixture
def to_onnx(monkeypatch):
    """`torch.export` as the ONNX exporter calls it."""
    monkeypatch.setattr(fastattn.ops.plain, "_in_onnx_export", in_onnx_export)


def in_onnx_export():
    return True


in_onnx_export._dynamo_marked_constant = True


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_onnx_cannot_express_is_refused_by_name(name, strict, to_onnx):
    """Whichever way the exporter takes; it tries both."""
    call, text = REFUSED[name]
    q = torch.randn(1, 2, 6, 8)
    with pytest.raises(Exception, match=text):
        export(Call(call), (q, q), strict=strict)


def test_the_exporter_shows_the_refusal():
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    q = torch.randn(1, 2, 6, 8)
    with pytest.raises(torch.onnx.OnnxExporterError, match=REFUSED["dropout_p"][1]):
        torch.onnx.export(Call(REFUSED["dropout_p"][0]), (q, q), dynamo=True, verbose=False)


# Programs of torch.export


@pytest.mark.parametrize("name", CALLS)
def test_decompositions_leave_no_operator_of_ours(name):
    module, args, specification = case(name)
    program = export(module, args).run_decompositions(fastattn.decompositions())
    assert not plain_names(program)
    assert_parity(program.module()(*args), specification(torch.float64), specification(torch.float32))


def test_decompositions_give_lse():
    q, k, v = make_qkv("cpu", LENGTHS, dtype=torch.float32)
    call = Call(lambda q, k, v: attention(q, k, v, window=(3, 1), return_lse=True))
    program = export(call, (q, k, v)).run_decompositions(fastattn.decompositions())
    out, lse = program.module()(q, k, v)
    exact = call(*(x.double() for x in (q, k, v)))
    plain = reference.attention(q, k, v, left=3, right=1, q_offset=3, scale=0.25)
    assert_parity(out, exact[0], plain[0])
    assert_parity(lse, exact[1], plain[1], "lse")


def test_a_causal_call_with_a_mask_is_lowered():
    """To operators that take a mask or causal order, not both; on PyTorch's kernel and in PyTorch's function."""
    mask = mask_with_an_empty_row()
    q, k, v = make_qkv("cpu", LENGTHS, batch=2, dtype=torch.float32)
    options = {"causal": True, "q_offset": 0, "backend": "torch"}
    bias = torch.randn(LENGTHS)
    for call in (
        lambda q, k, v, mask, bias: attention(q, k, v, mask=mask, **options),
        lambda q, k, v, mask, bias: scaled_dot_product_attention(q, k, v, mask, is_causal=True),
        lambda q, k, v, mask, bias: attention(q, k, v, mask=mask, bias=bias, **options),
    ):
        program = export(Call(call), (q, k, v, mask, bias))
        assert not plain_names(program)
        exact = call(*(x.double() for x in (q, k, v)), mask, bias.double())
        for one in (program, program.run_decompositions()):
            assert_parity(one.module()(q, k, v, mask, bias), exact, call(q, k, v, mask, bias))
