"""What convert says of modules that it cannot help, and converted layers under torch.fx and TorchScript."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
import fastattn.nn as fnn
from fastattn.testing import assert_parity
from tests.support.layer_checks import Pool


class OwnAttention(nn.Module):
    def forward(self, x):
        def inner(q):
            return F.scaled_dot_product_attention(q, x, x)

        return inner(x)


class Derived(OwnAttention):
    pass


@pytest.mark.parametrize("module", [OwnAttention(), Derived()], ids=["itself", "inherited"])
def test_a_module_that_calls_sdpa_itself_is_named(module):
    report = fastattn.convert(nn.Sequential(nn.Linear(2, 2), module))
    assert [r.name for r in report.skipped] == ["1"] and "fastattn.activate()" in report.skipped[0].note
    assert report.untouched == 2 and "fastattn.activate()" in str(report)


def test_a_parametrised_layer_is_skipped_with_the_cure():
    layer = nn.MultiheadAttention(8, 2)
    nn.utils.parametrizations.weight_norm(layer, "in_proj_weight")
    report = fastattn.convert(layer)
    assert not report.converted and "convert the model first" in report.skipped[0].note
    nn.utils.parametrize.remove_parametrizations(layer, "in_proj_weight")
    assert len(fastattn.convert(layer).converted) == 1
    nn.utils.parametrizations.weight_norm(layer, "in_proj_weight")
    x = torch.randn(3, 2, 8)
    assert layer(x, x, x)[0].shape == x.shape


class Around(nn.Module):
    """Calls every kind of layer in every way that torch.nn's can be traced in."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder_layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.decoder_layer = nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True)

    def forward(self, x, padding):
        x = self.encoder_layer(src=x, src_key_padding_mask=padding)
        x = self.transformer.decoder(x, self.transformer.encoder(x, src_key_padding_mask=padding))
        x = self.decoder_layer(x, x, tgt_key_padding_mask=padding)
        x = self.transformer(x, x, src_key_padding_mask=padding) + 1
        return self.attention(query=x, key=x, value=x, key_padding_mask=padding)[0]


def test_symbolic_trace_takes_a_converted_layer_as_a_leaf():
    torch.manual_seed(0)
    model = Around().eval()
    x, padding = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([5, 2, 3])[:, None]
    nodes = [node.target for node in torch.fx.symbolic_trace(model).graph.nodes if node.op == "call_module"]
    fastattn.convert(model)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == nodes
    assert len(nodes) == 6
    assert torch.equal(traced(x, padding), model(x, padding))
    eager = fastattn.revert(model) and model(x, padding)
    actual = traced(x, padding)
    assert_parity(actual, model.double()(x.double(), padding), eager)


def test_symbolic_trace_of_a_layer_by_itself_says_what_to_do():
    layer = fastattn.nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(RuntimeError, match="got the layer itself; wrap it"):
        torch.fx.symbolic_trace(layer)
    torch.fx.symbolic_trace(nn.Sequential(layer))


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated, and warns of every check of a shape
def test_a_program_of_jit_trace_runs_again_and_again():
    """With other values and padding, and gradients: TorchScript fuses from the second call on."""
    torch.manual_seed(0)
    model = Around()
    fastattn.convert(model)
    traced, pool = None, Pool()
    for lengths in ([5, 2, 3], [1, 5, 4], [4, 4, 5]):
        x, padding = torch.randn(3, 5, 8, requires_grad=True), torch.arange(5) >= torch.tensor(lengths)[:, None]
        traced = traced or torch.jit.trace(model, (x, padding), check_trace=False)
        exact = copy.deepcopy(model).double()(y := x.detach().double().requires_grad_(), padding)
        actual, eager = traced(x, padding), model(x, padding)
        pool.add("out", actual, exact, eager)
        pool.add("dx", *(torch.autograd.grad(out.sum(), of)[0] for out, of in ((actual, x), (exact, y), (eager, x))))
    pool.check()


@pytest.mark.parametrize("name", ["transformer", "attention", "encoder_layer", "decoder_layer"])
def test_torchscript_is_refused_with_the_cure(name):
    model = nn.Sequential(getattr(Around(), name))
    fastattn.convert(model)
    with pytest.raises(RuntimeError, match=r"cannot be compiled by torch\.jit\.script: use torch\.export"):
        torch.jit.script(model)
    for stack in (fnn.TransformerEncoder, fnn.TransformerDecoder):
        assert "__prepare_scriptable__" in vars(stack)
