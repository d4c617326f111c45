"""fastattn.convert and revert."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastattn.nn as fnn
from fastattn.integrations.convert import ConversionReport, convert, revert
from fastattn.testing import assert_parity
from tests.support.layer_checks import Calls, causal, padding

N, H, L, E = 3, 2, 5, 12
PADDING = padding([5, 2, 3], 5)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Model(nn.Module):
    """A user's model: a Transformer, an attention of its own, and other things."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(E, E)
        self.transformer = nn.Transformer(E, H, 1, 1, 16, dropout=0.0, batch_first=True)
        self.pool = nn.MultiheadAttention(E, H, batch_first=True)

    def forward(self, x):
        y = self.transformer(
            self.embed(x), x, tgt_mask=causal(x.shape[1]), src_key_padding_mask=PADDING, memory_key_padding_mask=PADDING
        )
        return self.pool(y[:, :1], y, y)[0]


ATTENTION_MODULES = [
    "transformer",
    "transformer.encoder",
    "transformer.encoder.layers.0",
    "transformer.encoder.layers.0.self_attn",
    "transformer.decoder",
    "transformer.decoder.layers.0",
    "transformer.decoder.layers.0.self_attn",
    "transformer.decoder.layers.0.multihead_attn",
    "pool",
]


def snapshot(model):
    """All that convert must not change, and the classes."""
    return {
        name: (
            type(module),
            {k: id(v) for k, v in module._parameters.items()},
            {k: id(v) for k, v in module._buffers.items()},
            {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))},
            list(module._forward_hooks.values()),
            list(module._forward_pre_hooks.values()),
        )
        for name, module in model.named_modules()
    }


def test_report_and_classes():
    model = Model()
    modules = dict(model.named_modules())
    report = convert(model)
    assert [r.name for r in report.converted] == ATTENTION_MODULES
    assert report.skipped == ()
    assert report.untouched == len(modules) - len(ATTENTION_MODULES)
    for record in report.converted:
        module = dict(model.named_modules())[record.name]
        assert module is modules[record.name]
        assert type(module) is getattr(fnn, record.kind.rsplit(".", 1)[1])
        assert record.kind.startswith("torch.nn.")
        assert record.note.startswith("fastattn.nn.")


def test_report_prints_as_a_table():
    model = Model()
    text = str(convert(model, lambda module, name: name != "pool"))
    lines = text.splitlines()
    assert len(lines) == 1 + len(ATTENTION_MODULES) + 1
    assert lines[0].split() == ["module", "class", "now"]
    assert lines[1].split() == ["converted", "transformer", "torch.nn.Transformer", "fastattn.nn.Transformer"]
    assert lines[-2].split() == ["skipped", "pool", "torch.nn.MultiheadAttention", "filter_fn", "returned", "False"]
    assert lines[-1] == f"8 converted, 1 skipped, {len(list(model.modules())) - 9} others untouched"
    assert "(model)" in str(convert(nn.MultiheadAttention(E, H)))
    assert str(convert(nn.Linear(2, 2))) == "0 converted, 0 skipped, 1 others untouched"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_converted_model_runs_the_operator_and_gives_the_same(grad, training, monkeypatch):
    calls = Calls(monkeypatch)
    model = Model().train(training)
    x = torch.randn(N, L, E)
    with torch.set_grad_enabled(grad):
        expected, exact = model(x), copy.deepcopy(model).double()(x.double())
        assert len(calls) == 0
        convert(model)
        assert model.training is training
        assert_parity(model(x), exact, expected)
        assert len(calls) == 3  # pool asks for the weights, which the operator does not give
        revert(model)
        assert torch.equal(model(x), expected)
        assert len(calls) == 3


def test_optimizer_built_before_conversion_still_trains_the_model():
    models = [Model(), Model(), Model()]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    models[2].double()
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9) for m in models]
    x = torch.randn(N, L, E)
    losses = ([], [], [])
    for step in range(6):
        if step == 2:
            convert(models[1])
        if step == 4:
            revert(models[1])
        for model, optimizer, history in zip(models, optimizers, losses, strict=True):
            loss = model(x.to(model.embed.weight.dtype)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.detach())
    assert losses[1][-1] < losses[1][0]
    plain, converted, exact = map(torch.stack, losses)
    assert_parity(converted, exact, plain, "losses")


def test_revert_restores_exactly():
    model = Model()
    model.pool.register_forward_hook(lambda *args: None)
    model.pool.register_forward_pre_hook(lambda *args: None)
    before = snapshot(model)
    report = convert(model)
    assert snapshot(model) != before
    back = revert(model)
    assert snapshot(model) == before
    assert [r.name for r in back.converted] == [r.name for r in report.converted]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.MultiheadAttention(E, H),
        lambda: nn.TransformerEncoderLayer(E, H),
        lambda: nn.TransformerDecoderLayer(E, H),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, batch_first=True), 1),
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H), 1),
        lambda: nn.Transformer(E, H, 1, 1, batch_first=True),
    ],
)
def test_the_model_itself_may_be_one(make):
    model = make()
    cls = type(model)
    report = convert(model)
    assert report.converted[0].name == ""
    assert type(model) is getattr(fnn, cls.__name__)
    revert(model)
    assert type(model) is cls


def test_converting_twice_is_a_reported_no_op():
    model = Model()
    convert(model)
    state = snapshot(model)
    report = convert(model)
    assert report.converted == ()
    assert [r.name for r in report.skipped] == ATTENTION_MODULES
    assert {r.note for r in report.skipped} == {"already fastattn's"}
    assert snapshot(model) == state


def test_reverting_an_unconverted_model_is_a_reported_no_op():
    model = Model()
    state = snapshot(model)
    report = revert(model)
    assert report.converted == ()
    assert [r.name for r in report.skipped] == ATTENTION_MODULES
    assert {r.note for r in report.skipped} == {"not a fastattn class"}
    assert snapshot(model) == state
    assert str(revert(nn.Linear(2, 2))) == "0 converted, 0 skipped, 1 others untouched"


def test_layers_built_from_fastattn_revert_too():
    model = fnn.Transformer(E, H, 1, 1, 16, dropout=0.0, batch_first=True)
    x = torch.randn(N, L, E)
    expected, exact = model(x, x), copy.deepcopy(model).double()(x.double(), x.double())
    assert revert(model).skipped == ()
    assert {type(m).__module__.split(".")[0] for m in model.modules()} == {"torch"}
    assert_parity(model(x, x), exact, expected)
    with torch.no_grad():
        assert_parity(model.eval()(x, x), exact, expected)


def test_filter_sees_every_candidate_with_its_name():
    model, seen = Model(), {}

    def only_decoder(module, name):
        seen[name] = module
        return name.startswith("transformer.decoder")

    report = convert(model, only_decoder)
    assert seen == {name: model.get_submodule(name) for name in ATTENTION_MODULES}
    assert [r.name for r in report.converted] == [n for n in ATTENTION_MODULES if n.startswith("transformer.decoder")]
    assert {r.note for r in report.skipped} == {"filter_fn returned False"}


def test_subclasses_are_skipped_and_what_they_hold_is_converted():
    class MyAttention(nn.MultiheadAttention):
        pass

    class MyLayer(nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return super()._ff_block(x) + 1

    model = nn.ModuleList([MyAttention(E, H), MyLayer(E, H)])
    report = convert(model)
    assert [r.name for r in report.converted] == ["1.self_attn"]
    assert [r.name for r in report.skipped] == ["0", "1"]
    assert report.skipped[0].note.startswith("a subclass of torch.nn.MultiheadAttention")
    assert report.skipped[1].note.startswith("a subclass of torch.nn.TransformerEncoderLayer")
    assert "MyLayer" in report.skipped[1].kind
    assert type(model[0]) is MyAttention
    assert type(model[1]) is MyLayer
    assert [r.name for r in revert(model).skipped] == ["0", "1"]


@pytest.mark.parametrize("training", [True, False])
def test_skipped_layer_cannot_bypass_what_it_holds(training, monkeypatch):
    class MyLayer(nn.TransformerEncoderLayer):
        pass

    calls = Calls(monkeypatch)
    model = MyLayer(E, H, batch_first=True).train(training)
    convert(model)
    with torch.no_grad():
        model(torch.randn(N, L, E))
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("keep", [nn.TransformerEncoder, (nn.TransformerEncoder, nn.TransformerEncoderLayer)])
def test_filtered_encoder_with_padding(keep, monkeypatch):
    """torch.nn.TransformerEncoder stays, and packs padded input into nested tensors: the converted parts serve it."""
    calls = Calls(monkeypatch)
    layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, kpm = torch.randn(N, L, E), padding([L, 1, 3], L)
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=kpm)
        exact = copy.deepcopy(model).double()(x.double(), src_key_padding_mask=kpm)
        convert(model, lambda module, name: not isinstance(module, keep))
        assert_parity(model(x, src_key_padding_mask=kpm), exact, expected)
    assert len(calls) == 2


def test_replaced_forward_is_skipped():
    model = nn.Sequential(nn.MultiheadAttention(E, H))
    model[0].forward = lambda *args: None
    (record,) = convert(model).skipped
    assert record.note == "the instance has its own forward"


def test_parametrized_module_is_skipped():
    """A parametrization gives the module a class of its own, which must stay."""

    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    model = nn.Sequential(nn.MultiheadAttention(E, H))
    nn.utils.parametrize.register_parametrization(model[0], "in_proj_weight", Double())
    report = convert(model)
    assert report.converted == ()
    assert len(report.skipped) == 1


def test_shared_modules_stay_shared():
    attention = nn.MultiheadAttention(E, H)
    inner = nn.Sequential(attention)
    model = nn.ModuleDict({"a": attention, "b": inner})
    report = convert(model)
    assert len(report.converted) == 1
    assert model["a"] is inner[0]
    assert type(attention) is fnn.MultiheadAttention


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_converted_models(copier):
    model = Model()
    convert(model)
    twin = copier(model)
    x = torch.randn(N, L, E)
    assert torch.equal(twin(x), model(x))
    revert(twin)
    assert type(twin.pool) is nn.MultiheadAttention
    assert not twin.pool._forward_pre_hooks
    assert type(model.pool) is fnn.MultiheadAttention


def test_hooks_survive():
    model, seen = Model(), []
    model.pool.register_forward_hook(lambda module, args, output: seen.append("pool"))
    handle = model.transformer.encoder.layers[0].register_forward_hook(lambda *args: seen.append("layer"))
    convert(model)
    with torch.no_grad():
        model.eval()(torch.randn(N, L, E))
    assert seen == ["layer", "pool"]
    handle.remove()
    model(torch.randn(N, L, E))
    assert seen == ["layer", "pool", "pool"]


def test_state_dict_is_strict_both_ways():
    model, original = Model(), Model()
    keys = list(model.state_dict())
    convert(model)
    assert list(model.state_dict()) == keys
    model.load_state_dict(original.state_dict(), strict=True)
    original.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("f", [convert, revert])
def test_not_a_module(f):
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module, got dict"):
        f({"model": Model()})


def test_filter_that_cannot_be_called():
    with pytest.raises(TypeError, match="expected filter_fn to be callable or None, got str"):
        convert(Model(), "decoder")


def test_report_is_data():
    report = convert(Model())
    assert isinstance(report, ConversionReport)
    name, kind, note = report.converted[-1]
    assert (name, kind, note) == ("pool", "torch.nn.MultiheadAttention", "fastattn.nn.MultiheadAttention")
