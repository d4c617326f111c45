"""Which backend serves a call, why the others do not, and that all that can serve it agree."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastattn import attention, backends, explain, ops
from fastattn.backends.cpu import library
from fastattn.backends.reference.blockwise import BLOCK_ELEMENTS
from fastattn.spec import make_spec
from fastattn.testing import check_attention
from tests.support.attention_cases import (
    BFLOAT,
    DOUBLE,
    DTYPE_NAMES,
    HALF,
    INF,
    LAYOUTS,
    SINGLE,
    broadcast_shapes,
    make_bias,
    make_mask,
    make_qkv,
    relayout,
    shape_id,
)


def options_for(device="cpu", lengths=(7, 9), batch=1, heads=2):
    """Name -> arguments that only some backends serve."""
    return {
        "plain": {},
        "top_left": {"causal": True, "q_offset": 0},
        "bottom_right": {"causal": True},
        "offset_tensor": {"causal": True, "q_offset": torch.zeros(batch, dtype=torch.int64, device=device)},
        "window": {"window": (3, 2)},
        "mask": {"mask": make_mask(device, (batch, 1, 1, lengths[1]))},
        "bias": {"bias": make_bias(device, (heads, *lengths))},
        "bias_gradient": {"bias": make_bias(device, (heads, *lengths), requires_grad=True)},
        "mask_and_bias": {"mask": make_mask(device, lengths), "bias": make_bias(device, lengths)},
        "mask_and_causal": {"mask": make_mask(device, lengths), "causal": True, "q_offset": 0},
        "softcap": {"softcap": 5.0},
        "alibi": {"alibi_slopes": torch.rand(heads).to(device)},
        "sinks": {"sinks": torch.randn(heads).to(device)},
        "dropout": {"dropout_p": 0.1},
        "lse": {"return_lse": True},
        "negative_scale": {"causal": True, "q_offset": 0, "scale": -0.5},
    }


# What PyTorch's kernel cannot compute exactly, with a word of the reason.
NOT_TORCH = {
    "bottom_right": "top-left",
    "offset_tensor": "top-left",
    "window": "window",
    "bias_gradient": "gradient for the bias",
    "softcap": "softcap",
    "alibi": "alibi_slopes",
    "sinks": "sinks",
    "dropout": "dropout",
    "lse": "lse",
    "negative_scale": "scale",
}


@pytest.fixture
def without_cpu_library(monkeypatch):
    """As where no C++ compiler was found."""
    monkeypatch.setattr(library, "problem", lambda: library.MISSING)


@pytest.mark.parametrize("name", options_for())
def test_the_default_on_cpu(name):
    if problem := library.problem():
        pytest.skip(f"the CPU library is {problem}")
    chosen = explain(*make_qkv("cpu", (7, 9)), **options_for()[name]).backend
    assert chosen == ("cpu" if name in NOT_TORCH or "bias" in name else "torch")


class Plain(torch.nn.Module):
    def forward(self, x):
        return attention(x, x, x, causal=True, q_offset=0)


def test_large_calls_go_to_the_fused_kernels():
    """PyTorch's function costs less to call; what is computed decides from 2^16 scores on, though not in a trace."""
    if problem := library.problem():
        pytest.skip(f"the CPU library is {problem}")
    small, large = (torch.randn(1, 4, length, 16) for length in (127, 128))
    assert explain(small, small, small).backend == "torch"
    assert explain(large, large, large, causal=True).backend == "cpu"
    exported = torch.export.export(Plain(), (large,))
    assert "fastattn" not in str(exported.graph)


@pytest.mark.parametrize("compiled", [True, False], ids=["library", "no library"])
def test_a_very_low_float_mask_leaves_gradients_as_they_are(compiled, request):
    """As the definition gives them: PyTorch's kernel alone gives dv eight times as large here."""
    if not compiled:
        request.getfixturevalue("without_cpu_library")
    q, k, v = make_qkv("cpu", (16, 16), dtype=SINGLE)
    check_attention(q, k, v, bias=torch.full((1, 1, 1, 16), torch.finfo(SINGLE).min), lse_gradient=False)


@pytest.mark.parametrize("name", options_for())
def test_the_default_without_the_cpu_library(name, without_cpu_library):
    explanation = explain(*make_qkv("cpu", (7, 9)), **options_for()[name])
    assert explanation.backend == ("reference" if name in NOT_TORCH else "torch")
    assert explanation.reasons["cpu"] == [library.MISSING] and library.MISSING in str(explanation)


@pytest.mark.parametrize("name", NOT_TORCH)
def test_torch_refuses_what_it_cannot_do_exactly(name):
    with pytest.raises(ValueError, match=rf"backend 'torch' cannot serve this call: .*{NOT_TORCH[name]}"):
        attention(*make_qkv("cpu", (7, 9)), backend="torch", **options_for()[name])


def test_a_refusal_names_every_reason():
    with pytest.raises(ValueError) as error:
        attention(*make_qkv("cpu", (7, 9)), backend="torch", dropout_p=0.1, return_lse=True, causal=True)
    for reason in ("dropout", "lse", "top-left"):
        assert reason in str(error.value)


@pytest.mark.parametrize("lengths", [(0, 9), (7, 0)], ids=shape_id)
def test_torch_refuses_empty_tensors(lengths, without_cpu_library):
    q, k, v = make_qkv("cpu", lengths)
    assert explain(q, k, v).backend == "reference"
    with pytest.raises(ValueError, match="empty"):
        attention(q, k, v, backend="torch")


def test_torch_refuses_a_mask_and_bias_that_only_a_large_buffer_joins():
    """(B, 1, 1, Lk) and (1, 1, Lq, 1) span Lq x Lk together."""
    q, k, v = make_qkv("meta", (4096, 4096), heads=(1, 1))
    mask, bias = torch.empty(1, 1, 1, 4096, dtype=torch.bool), torch.empty(1, 1, 4096, 1)
    q, k, v = (torch.empty(1, 1, 4096, 8) for _ in range(3))
    reasons = explain(q, k, v, mask=mask, bias=bias).reasons["torch"]
    assert any("buffer" in reason for reason in reasons)
    assert not explain(q, k, v, mask=mask, bias=bias.mT).reasons["torch"]


def test_triton_refuses_float64_and_wide_heads():
    with pytest.raises(ValueError, match="float64"):
        attention(*make_qkv("cpu", (7, 9), dtype=DOUBLE), backend="triton")
    for dims in ((257, 16), (16, 257)):
        with pytest.raises(ValueError, match="head dims up to 256"):
            attention(*make_qkv("cpu", (7, 9), dims=dims), backend="triton")
    assert explain(*make_qkv("cpu", (7, 9), dims=(257, 300)), return_lse=True).backend != "triton"


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"CUDA and ROCm devices, the tensors are on 'cpu'"):
        attention(*make_qkv("cpu", (7, 9)), backend="triton")


def test_triton_is_never_the_default_on_cpu(monkeypatch):
    """Not even while it interprets: that is for tests of the kernels."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert explain(*make_qkv("cpu", (7, 9))).backend in ("cpu", "torch")


def test_a_missing_triton_is_a_reason(monkeypatch):
    monkeypatch.setattr(backends.module("triton"), "_TRITON_MISSING", True)
    q, k, v = make_qkv("cpu", (7, 9))
    assert "triton package is not installed" in str(explain(q, k, v))
    with pytest.raises(ValueError, match="not installed"):
        attention(q, k, v, backend="triton")


@pytest.mark.parametrize("backend", ["flash", "", "Triton", 3, ["torch"]], ids=repr)
def test_an_unknown_backend(backend):
    for function in (attention, explain):
        with pytest.raises(ValueError, match=r"backend: expected one of 'triton', .*'reference' or None, got "):
            function(*make_qkv("cpu", (7, 9)), backend=backend)


def gpu_spec(capability, monkeypatch, dtype=HALF, **options):
    """A call on a GPU that need not be there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty(1, 2, 8, 16, dtype=dtype, device="cuda") for _ in range(3))
        for name in ("mask", "bias"):
            if options.get(name):
                options[name] = torch.empty(1, 1, 8, 8, dtype=torch.bool if name == "mask" else SINGLE, device="cuda")
        return make_spec(q, k, v, **options)


@pytest.mark.skipif(torch.version.hip is not None, reason="compute capabilities are CUDA's")
@pytest.mark.parametrize(
    ("capability", "dtype", "options", "expected"),
    [
        ((9, 0), HALF, {}, "triton"),
        ((8, 0), BFLOAT, {"mask": True, "bias": True, "causal": True, "dropout_p": 0.1}, "triton"),
        ((10, 0), SINGLE, {"return_lse": True}, "triton"),
        ((7, 5), HALF, {}, "torch"),
        ((7, 5), HALF, {"mask": True}, "reference"),
        ((9, 0), DOUBLE, {}, "torch"),
        ((9, 0), DOUBLE, {"bias": True}, "reference"),
    ],
    ids=str,
)
def test_the_default_on_a_gpu(monkeypatch, capability, dtype, options, expected):
    spec = gpu_spec(capability, monkeypatch, dtype, **options)
    assert backends.choose(spec) == expected
    if expected != "triton":
        reasons = " ".join(backends.reasons_against("triton", spec))
        assert ("capability 8.0 or newer, this GPU has 7.5" if capability == (7, 5) else "float64") in reasons


@pytest.mark.parametrize("name", options_for())
@pytest.mark.parametrize("backend", [None, "reference", "triton"], ids=str)
def test_what_explain_says_is_what_runs(monkeypatch, name, backend):
    ran = []
    original = ops.attention

    def spy(spec, chosen):
        ran.append(chosen)
        return original(spec, chosen)

    monkeypatch.setattr(ops, "attention", spy)
    q, k, v = make_qkv("cpu", (7, 9))
    options = options_for()[name]
    explanation = explain(q, k, v, backend=backend, **options)
    attention(q, k, v, backend=backend, **options)
    assert ran == [explanation.backend]
    assert backend in (None, explanation.backend)
    assert not explanation.reasons[explanation.backend]


def test_explain_of_a_refused_backend_raises_as_the_call_does():
    q, k, v = make_qkv("cpu", (7, 9))
    texts = []
    for function in (attention, explain):
        with pytest.raises(ValueError) as error:
            function(q, k, v, dropout_p=0.1, backend="torch")
        texts.append(str(error.value))
    assert texts[0] == texts[1]


def test_explain_as_a_table(without_cpu_library):
    q, k, v = make_qkv("cpu", (7, 9), dtype=BFLOAT)
    mask, bias = make_mask("cpu", (1, 1, 1, 9)), make_bias("cpu", (2, 7, 9), requires_grad=True)
    text = str(explain(q, k, v, causal=True, mask=mask, bias=bias, dropout_p=0.1, return_lse=True))
    head, *rows = text.splitlines()
    for part in ("q (1, 2, 7, 16)", "k (1, 2, 9, 16)", "bfloat16 on cpu", "causal, q_offset=2", "mask (1, 1, 1, 9)",
                 "bias (1, 2, 7, 9)", "gradient of the bias", "dropout 0.1", "lse"):  # fmt: skip
        assert part in head
    assert [row.split()[0] for row in rows] == ["triton", "cuda", "cpu", "torch", "reference"]
    assert "could serve it, not preferred here" in rows[0]
    assert "<- chosen: eager PyTorch in blocks of queries, memory O(block x Lk)" in rows[4]


def test_explain_computes_nothing():
    """Meta tensors of any size, and no random number drawn."""
    state = torch.get_rng_state()
    q = torch.empty(64, 64, 1 << 20, 128, device="meta")
    assert explain(q, q, q, causal=True, dropout_p=0.5).backend == "reference"
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, SINGLE, DOUBLE], ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("name", options_for())
def test_every_backend_that_serves_a_call_agrees_with_the_specification(device, name, dtype):
    q, k, v = make_qkv(device, (17, 70), heads=(2, 1), dims=(16, 24), dtype=dtype)
    options = options_for(device, (17, 70))[name]
    options.pop("return_lse", None)
    reasons = explain(q, k, v, **options).reasons
    served = [backend for backend, why in reasons.items() if not why]
    assert "reference" in served and (("triton" in served) == (dtype != DOUBLE))
    if dtype in (BFLOAT, SINGLE):  # test_forward.py has Triton in these
        served.remove("triton")
    for backend in served:
        check_attention(q, k, v, backend=backend, lse_gradient=backend != "torch", **options)


@pytest.mark.parametrize(
    "layouts", list(zip(LAYOUTS, LAYOUTS[2:] + LAYOUTS[:2], LAYOUTS[1:] + LAYOUTS[:1], strict=True))
)
@pytest.mark.parametrize("dims", [(16, 16), (16, 24), (24, 16)], ids=shape_id)
def test_torch_backend_on_any_strides(layouts, dims):
    """With a mask and causal at once, which its slow path refuses: strides must never send a call there."""
    q, k, v = make_qkv("cpu", (33, 70), heads=(4, 2), dims=dims, dtype=SINGLE)
    q, k, v = (relayout(x, layout) for x, layout in zip((q, k, v), layouts, strict=True))
    options = {"backend": "torch", "causal": True, "q_offset": 0}
    mask = make_mask("cpu", (70, 2)).t()[:1, None, None]  # last stride is not 1 either
    check_attention(q, k, v, lse_gradient=False, mask=mask, **options)
    wide_mask, bias = relayout(make_mask("cpu", (1, 4, 33, 70)), layouts[0]), make_bias("cpu", (1, 4, 33, 70))
    for own in ({"mask": wide_mask}, {"bias": relayout(bias, layouts[0])}, {"bias": bias.mT.contiguous().mT}):
        check_attention(q, k, v, lse_gradient=False, **own, **options)
        same = {name: x.contiguous() for name, x in own.items()}
        assert torch.equal(attention(q, k, v, **own, **options), attention(q, k, v, **same, **options))


@pytest.mark.parametrize("shape", broadcast_shapes((2, 4, 33, 70)), ids=shape_id)
def test_torch_backend_on_every_broadcast_shape(shape):
    q, k, v = make_qkv("cpu", (33, 70), heads=(4, 2), batch=2, dtype=SINGLE)
    check_attention(q, k, v, backend="torch", lse_gradient=False, mask=make_mask("cpu", shape, 0.5))
    bias = make_bias("cpu", shape)
    bias[torch.rand(shape) < 0.3] = -INF
    check_attention(q, k, v, backend="torch", lse_gradient=False, bias=bias, causal=True, q_offset=0)


def test_the_default_survives_a_switched_off_flash_kernel(without_cpu_library):
    """PyTorch's other kernel refuses a mask beside causal; the default must then not choose it."""
    q, k, v = make_qkv("cpu", (9, 9), dtype=SINGLE)
    mask = make_mask("cpu", (1, 1, 1, 9))
    expected = attention(q, k, v, causal=True, mask=mask, backend="reference")
    with sdpa_kernel(SDPBackend.MATH):
        assert explain(q, k, v, causal=True, mask=mask).backend == "reference"
        assert torch.equal(attention(q, k, v, causal=True, mask=mask), expected)


MEMORY = """
    import resource, sys, torch
    import fastattn
    from fastattn.backends.reference import blockwise

    blockwise.BLOCK_ELEMENTS = {block}

    def peak():  # bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def call(length, grad, **options):
        q, k, v = (torch.randn(1, 1, length, 8, requires_grad=grad) for _ in range(3))
        mask = torch.arange(length)[None, None, None] < length - 5  # stays (1, 1, 1, Lk)
        out = fastattn.attention(q, k, v, causal=True, q_offset=0, mask=mask, **options)
        if grad:
            out.sum().backward()

    options = dict({options})
    call(256, True, **options)
    before = peak()
    for grad in (False, True):
        call({length}, grad, **options)
        print(peak() - before)
"""


def memory_of(length, options="", *, block):
    """Growth of a fresh process's peak memory in bytes, with a causal and a key padding mask: by a call without
    gradients, and by another with them.
    """
    pytest.importorskip("resource", reason="no getrusage on this platform")
    source = textwrap.dedent(MEMORY).format(length=length, options=options, block=block)
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    result = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [int(line) for line in result.stdout.splitlines()]


def test_the_default_on_cpu_needs_no_memory_for_the_scores():
    """Not even one byte per score, as a joint boolean mask would take: 64 MiB here, and 256 MiB in float32."""
    length = 8192
    assert max(memory_of(length, block=BLOCK_ELEMENTS)) < length * length // 2


def test_the_reference_needs_memory_for_some_blocks_only():
    """Ten blocks of float32 scores, where the whole would take 16 of them, dropout's 64-bit integers 32 more."""
    length, block = 4096, BLOCK_ELEMENTS // 4
    assert max(memory_of(length, options="dropout_p=0.1", block=block)) < 10 * 4 * block < length * length * 4
