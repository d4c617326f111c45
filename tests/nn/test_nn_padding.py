"""Encoders that leave padding out in evaluation: 0 there, the same elsewhere, however the batch is laid out."""

import copy

import pytest
import torch
from torch import nn

import fastattn
import fastattn.nn as fnn
from fastattn.backends.cpu import library
from fastattn.testing import assert_parity

N, S, H, E = 4, 14, 2, 16

PADDING = {
    "at the end": torch.arange(S) >= torch.tensor([S, 5, 1, 9])[:, None],
    "anywhere": torch.rand(N, S, generator=torch.Generator().manual_seed(0)) < 0.5,
    "all of a sequence": torch.arange(S) >= torch.tensor([0, S, 0, 3])[:, None],
    "all": torch.ones(N, S, dtype=torch.bool),
    "none": torch.zeros(N, S, dtype=torch.bool),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(norm=None, **options):
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.1, **{"batch_first": True} | options)
    return nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False).eval()


def ours(model, **attributes):
    model = copy.deepcopy(model)
    fastattn.convert(model)
    model.enable_nested_tensor = True
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def packs(monkeypatch):
    """The sizes of what layers are given packed, from now on."""
    sizes = []
    own = fnn.TransformerEncoderLayer.packed

    def packed(self, src, cu_seqlens):
        sizes.append(src.shape[0])
        return own(self, src, cu_seqlens)

    monkeypatch.setattr(fnn.TransformerEncoderLayer, "packed", packed)
    return sizes


@pytest.mark.parametrize("where", PADDING)
@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"norm_first": True, "bias": False}], ids=str)
def test_kept_elements_are_those_of_torch(options, where, monkeypatch):
    """torch.nn computes padding too: 0 is expected there."""
    sizes, padding = packs(monkeypatch), PADDING[where]
    theirs = make(**options)
    x = torch.randn(N, S, E)
    given = x if theirs.layers[0].self_attn.batch_first else x.transpose(0, 1)
    outputs = {}
    with torch.no_grad():
        outputs["exact"] = copy.deepcopy(theirs).double()(given.double(), src_key_padding_mask=padding)
        outputs["eager"] = theirs(given, src_key_padding_mask=padding)
        outputs["packed"] = ours(theirs)(given, src_key_padding_mask=padding)
    if given is not x:
        outputs = {name: out.transpose(0, 1) for name, out in outputs.items()}
    assert (outputs["packed"][padding] == 0).all()
    kept = {name: out[~padding] for name, out in outputs.items()}
    assert_parity(kept["packed"], kept["exact"], kept["eager"])
    if library.problem() is None:
        assert sizes == ([] if where == "none" else [int((~padding).sum())] * 2)


def test_values_in_the_padding_do_not_matter():
    model, padding, x = ours(make()), PADDING["anywhere"], torch.randn(N, S, E)
    with torch.inference_mode():
        expected = model(x, src_key_padding_mask=padding)
        junk = x.masked_fill(padding[..., None], float("nan"))
        assert torch.equal(model(junk, src_key_padding_mask=padding), expected)


def test_final_norm_makes_its_bias_of_padding():
    norm = nn.LayerNorm(E)
    with torch.no_grad():
        norm.bias.normal_()
        out = ours(make(norm))(torch.randn(N, S, E), src_key_padding_mask=PADDING["at the end"])
        assert (out[PADDING["at the end"]] == norm.bias).all()


@pytest.mark.parametrize("obstacle", ["hook", "subclass", "compiled", "no kernels"])
def test_output_is_the_same_where_padding_is_computed(obstacle, monkeypatch):
    sizes, seen = packs(monkeypatch), []
    model, x, padding = make(), torch.randn(N, S, E), PADDING["anywhere"]
    with torch.no_grad():
        expected = ours(model)(x, src_key_padding_mask=padding)
        exact = ours(copy.deepcopy(model).double())(x.double(), src_key_padding_mask=padding)
        del sizes[:]
        other = ours(model)
        if obstacle == "hook":
            other.layers[1].linear1.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        elif obstacle == "subclass":
            other.layers[0].__class__ = type("Own", (fnn.TransformerEncoderLayer,), {})
        elif obstacle == "compiled":
            other = torch.compile(other, backend="eager", fullgraph=True)
        else:
            monkeypatch.setattr(library, "problem", lambda: "not compiled")
        out = other(x, src_key_padding_mask=padding)
    assert sizes == []
    assert seen == ([(N, S, 32)] if obstacle == "hook" else [])
    assert_parity(out, exact, expected)


def test_where_padding_is_encoded_like_all_else(monkeypatch):
    """As torch.nn does: with a mask, in training, where gradients are recorded, and with enable_nested_tensor=False."""
    sizes, theirs = packs(monkeypatch), make()
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for layer in theirs.layers:
        layer.self_attn.dropout = 0.0
    x, padding = torch.randn(N, S, E), PADDING["at the end"]
    expected = theirs(x, src_key_padding_mask=padding)
    exact = copy.deepcopy(theirs).double()(x.double(), src_key_padding_mask=padding)
    results = [ours(theirs)(x, src_key_padding_mask=padding), ours(theirs).train()(x, src_key_padding_mask=padding)]
    with torch.no_grad():
        results.append(ours(theirs, enable_nested_tensor=False)(x, src_key_padding_mask=padding))
        results.append(ours(theirs)(x, torch.zeros(S, S, dtype=torch.bool), padding))
        results.append(ours(theirs)(x, src_key_padding_mask=torch.zeros(N, S).masked_fill_(padding, float("-inf"))))
    for out in results:
        assert_parity(out.detach(), exact.detach(), expected.detach())
    assert sizes == []


def test_errors_are_those_of_the_layers():
    model, x = ours(make()), torch.randn(N, S, E)
    with torch.no_grad():
        with pytest.raises(AssertionError, match="key_padded_mask"):
            model(x, src_key_padding_mask=PADDING["none"][:, 1:])
        with pytest.raises(RuntimeError, match="Need attn_mask"):
            model(x, src_key_padding_mask=PADDING["at the end"], is_causal=True)
