"""fastattn.convert on the attention of timm and torchvision, against the real modules where those are installed."""

import copy
import functools
import importlib
import pickle

import pytest
import torch
from torch import nn

import fastattn
from fastattn.integrations import vision
from fastattn.testing import assert_parity
from tests.support.layer_checks import assert_same_as_torch, run


def library(name):
    """Skip, saying how to run it, where it is not there or does not fit this PyTorch."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a torchvision of another PyTorch fails with a RuntimeError
        pytest.skip(f"pip install timm and the torchvision of this PyTorch, then run this again: {error}")


def vit(**options):
    return library("timm.models.vision_transformer").Attention(24, 3, **options), (2, 7, 24)


def swin_block(version, shift, image=(8, 9)):
    """Windows of 4 x 3 in three images."""
    module = library(f"timm.models.swin_transformer{version and '_v2'}")
    name = f"SwinTransformer{version}Block"
    options = {"window_size": (4, 3), "shift_size": shift, "always_partition": True}
    return getattr(module, name)(24, image, 3, **options), (3, *image, 24)


def relative(**window):
    return functools.partial(library("timm.layers").RelPosBias, **window)


def channels_last(head_first):
    maxxvit = library("timm.models.maxxvit")
    options = {"dim_head": 8, "rel_pos_cls": relative(window_size=(3, 2)), "head_first": head_first}
    return maxxvit.AttentionCl(24, **options), (4, 3, 2, 24)


def channels_first(head_first):
    maxxvit = library("timm.models.maxxvit")
    options = {"dim_head": 8, "rel_pos_cls": relative(window_size=(3, 2)), "head_first": head_first}
    return maxxvit.Attention2d(16, 24, **options), (4, 16, 3, 2)


def torchvision_swin(version, shift, image=(7, 10), **options):
    """Windows of 4 x 3, so that the image is padded."""
    module = library("torchvision.models.swin_transformer")
    return getattr(module, f"ShiftedWindowAttention{version}")(24, [4, 3], shift, 3, **options), (2, *image, 24)


def torchvision_maxvit():
    return library("torchvision.models.maxvit").RelativePositionalMultiHeadAttention(24, 8, 9), (2, 3, 9, 24)


CASES = {
    "vit": vit,
    "vit-everything": functools.partial(
        vit, qkv_bias=True, qk_norm=True, scale_norm=True, gated=True, attn_head_dim=16, norm_layer=nn.LayerNorm
    ),
    "swin": functools.partial(swin_block, "", 0),
    "swin-shifted": functools.partial(swin_block, "", (2, 1)),
    "swin-padded": functools.partial(swin_block, "", (2, 1), (7, 10)),
    "swin-v2": functools.partial(swin_block, "V2", 0),
    "swin-v2-shifted": functools.partial(swin_block, "V2", (2, 1)),
    "maxvit": functools.partial(channels_last, True),
    "maxvit-heads-last": functools.partial(channels_last, False),
    "coatnet": functools.partial(channels_first, True),
    "coatnet-heads-last": functools.partial(channels_first, False),
    "torchvision-swin": functools.partial(torchvision_swin, "", [0, 0]),
    "torchvision-swin-shifted": functools.partial(torchvision_swin, "", [2, 1]),
    "torchvision-swin-one-row": functools.partial(torchvision_swin, "", [2, 1], (3, 10)),
    "torchvision-swin-no-bias": functools.partial(torchvision_swin, "", [2, 1], qkv_bias=False, proj_bias=False),
    "torchvision-swin-v2-shifted": functools.partial(torchvision_swin, "V2", [2, 1]),
    "torchvision-maxvit": torchvision_maxvit,
}


def make(name):
    """The module, with weights that leave no part of it without effect, and an input."""
    torch.manual_seed(0)
    module, shape = CASES[name]()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module, torch.randn(shape)


@pytest.fixture
def asked(monkeypatch):
    """The arguments of each call of the operator from a converted module."""
    calls = []

    def counted(q, k, v, **options):
        calls.append({"q": q, **options})
        return fastattn.attention(q, k, v, **options)

    monkeypatch.setattr(vision, "attention", counted)
    return calls


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_original(name, training):
    theirs, x = make(name)
    theirs.train(training)
    ours = copy.deepcopy(theirs)
    report = fastattn.convert(ours)
    assert len(report.converted) == 1 and report.skipped == ()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same_as_torch(ours, theirs, [x])


@pytest.mark.parametrize("name", CASES)
def test_revert_gives_the_class_and_the_bits_back(name):
    module, x = make(name)
    expected, classes = module(x), [type(m) for m in module.modules()]
    parameters = [id(p) for p in module.parameters()]
    (record,) = fastattn.convert(module).converted
    assert record.kind.startswith(("timm.", "torchvision.")) and record.note.startswith("fastattn.integrations.")
    assert fastattn.convert(module).skipped[0].note == "already fastattn's"
    copied = pickle.loads(pickle.dumps(module))
    assert torch.equal(copied(x), module(x))
    assert [r.kind for r in fastattn.revert(module).converted] == [record.note]
    assert [type(m) for m in module.modules()] == classes
    assert [id(p) for p in module.parameters()] == parameters
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("name", ["swin-shifted", "swin-v2-shifted", "torchvision-swin-shifted"])
def test_one_bias_serves_all_windows(name, asked):
    """It has no dimension of windows, and the mask none of heads."""
    module, x = make(name)
    fastattn.convert(module)
    module(x)
    (call,) = asked
    windows = call["q"].shape[0]
    assert windows > x.shape[0] and call["bias"].shape == (1, 3, 12, 12)
    assert call["mask"].shape == (windows, 1, 12, 12) and not call["mask"].all()


@pytest.mark.parametrize("name", ["vit", "swin", "swin-v2", "maxvit", "coatnet", "torchvision-swin"])
def test_dropout_of_weights_in_training_alone(name, asked):
    module, x = make(name)
    fastattn.convert(module)
    expected = module(x)
    for part in module.modules():
        if isinstance(part, vision.Converted):
            if hasattr(part, "attn_drop"):
                part.attn_drop.p = 0.5
            else:
                part.attention_dropout = 0.5
    assert not torch.allclose(module(x), expected)
    assert name == "vit" or [call["dropout_p"] for call in asked] == [0.0, 0.5]
    assert_parity(module.eval()(x), expected, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vit-everything", "swin-shifted", "swin-v2-shifted", "maxvit", "torchvision-maxvit"])
def test_autocast(name, dtype):
    """Modules that mix dtypes there: norms and biases stay in float32."""
    theirs, x = make(name)
    exact = run(copy.deepcopy(theirs).double(), [x.double()], {})
    ours = copy.deepcopy(theirs)
    fastattn.convert(ours)
    results = []
    for module in (ours, theirs):
        with torch.autocast("cpu", dtype):
            results.append(run(module, [x], {}))
    for key, value in exact.items():
        assert results[0][key].dtype == results[1][key].dtype
        assert_parity(results[0][key].to(dtype), value, results[1][key].to(dtype), key)


def test_a_mask_of_other_numbers_is_an_error():
    module, x = make("swin-shifted")
    fastattn.convert(module)
    module.attn_mask[0, 0, 1] = -1.0
    with pytest.raises(ValueError, match="mask: expected 0, or -100 and below, got other numbers"):
        module(x)


def test_a_subclass_is_skipped():
    for name in ("vit", "torchvision-maxvit"):
        module, _ = make(name)
        module.__class__ = type("Derived", (type(module),), {})
        (record,) = fastattn.convert(module).skipped
        assert record.note.startswith("a subclass of ")


def test_a_version_that_does_something_else_is_skipped(monkeypatch):
    module, _ = make("torchvision-maxvit")
    original = type(module).forward
    monkeypatch.setattr(type(module), "forward", lambda self, x: self.something_new(original(self, x)))
    (record,) = fastattn.convert(module).skipped
    assert "something_new" in record.note


def test_torch_fx_records_one_call_and_torchscript_refuses():
    module, x = make("torchvision-swin-shifted")
    model = nn.Sequential(module, nn.Linear(24, 2))
    fastattn.convert(model)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]
    assert torch.equal(traced(x), model(x))
    with pytest.raises(RuntimeError, match=r"cannot be compiled by torch\.jit\.script"):
        torch.jit.script(model)


@pytest.mark.parametrize("name", ["vit", "swin-shifted", "torchvision-swin-shifted"])
def test_torch_compile_sees_one_graph(name):
    module, x = make(name)
    fastattn.convert(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    expected = module(x)
    assert_parity(compiled(x), expected, expected)
