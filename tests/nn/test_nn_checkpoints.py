"""Models and their descriptions written and read back, losses, and tables that are computed and not stored."""

import copy
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn.nn as fnn
from fastattn.nn.model import next_token_loss
from fastattn.testing import assert_parity

SIZES = {"d_model": 16, "num_layers": 2, "num_heads": 2, "dim_feedforward": 24}
POSITIONS = [
    None, fnn.ALiBi(learned=True), fnn.Learned(32), fnn.Sinusoidal(32), fnn.RoPE(500.0),
    fnn.RoPE(scaling=fnn.LinearScaling(2.0)), fnn.RoPE(scaling=fnn.Llama3Scaling()),
    fnn.RoPE(scaling=fnn.YarnScaling(2.0, 64)),
]  # fmt: skip
CONFIGS = [
    *(fnn.CausalLMConfig(**SIZES, vocab_size=11, position=position) for position in POSITIONS),
    fnn.CausalLMConfig(**SIZES, vocab_size=11, tie_embeddings=False, window=(3, None), softcap=20.0, sinks=True),
    fnn.EncoderDecoderConfig(
        encoder=fnn.TransformerConfig(**SIZES), decoder=fnn.TransformerConfig(**SIZES, position=fnn.Sinusoidal(9)),
        source_vocab_size=11, target_vocab_size=7,
    ),
    fnn.EncoderDecoderConfig(
        encoder=fnn.TransformerConfig(**SIZES), decoder=fnn.TransformerConfig(**SIZES), source_vocab_size=11
    ),
]  # fmt: skip


def make(config):
    torch.manual_seed(0)
    return (fnn.CausalLM if isinstance(config, fnn.CausalLMConfig) else fnn.EncoderDecoder)(config).eval()


def run(model):
    tokens = torch.arange(6)[None]
    return model(tokens) if isinstance(model, fnn.CausalLM) else model(tokens, tokens)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_a_description_survives_json(config):
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "Nonsense"}, ValueError, "CausalLMConfig: expected a kind among"),
        ({"hidden": 3}, ValueError, "CausalLMConfig: expected settings among .*, got hidden"),
        ({"kind": "TransformerConfig", "d_model": 8}, ValueError, "got scale_embeddings, tie_embeddings, vocab_size"),
        ({"d_model": "8"}, TypeError, "d_model: expected an int, got str"),
        ({"position": {"kind": "os.system"}}, ValueError, "CausalLMConfig.position: expected a kind among"),
    ],
)
def test_descriptions_that_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        fnn.CausalLMConfig.from_dict(CONFIGS[0].to_dict() | change)


def test_a_description_of_another_class_is_refused():
    with pytest.raises(TypeError, match="expected the kind CausalLMConfig, got TransformerConfig"):
        fnn.CausalLMConfig.from_dict(fnn.TransformerConfig().to_dict())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_a_model_survives_its_folder(config, tmp_path):
    model = make(config)
    model.save_pretrained(tmp_path / "new" / "folder")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        loaded = type(model).from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == config and not loaded.training
    assert torch.equal(run(loaded), run(model))
    assert (loaded.head.weight is loaded._output_embedding().weight) == config.tie_embeddings
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]
    half = type(model).from_pretrained(tmp_path / "new" / "folder", dtype=torch.bfloat16)
    assert torch.equal(run(half), run(model.bfloat16()))


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected config\.json in it"):
        fnn.CausalLM.from_pretrained(tmp_path)
    make(CONFIGS[0]).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="EncoderDecoderConfig, got CausalLMConfig"):
        fnn.EncoderDecoder.from_pretrained(tmp_path)
    other = fnn.CausalLMConfig(**SIZES | {"num_layers": 1}, vocab_size=12, position=None)
    (tmp_path / "config.json").write_text(json.dumps(other.to_dict()))
    with pytest.raises(ValueError, match=r"also decoder\.blocks\.1.*embedding\.weight of shape"):
        fnn.CausalLM.from_pretrained(tmp_path)


def test_without_safetensors_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        make(CONFIGS[0]).save_pretrained(tmp_path)
    with pytest.raises(ImportError, match="pip install safetensors"):
        fnn.CausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_a_torch_checkpoint_needs_no_pickle(config, tmp_path):
    model = make(config)
    torch.save({"config": config.to_dict(), "model": model.state_dict()}, tmp_path / "x.pt")
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    loaded = type(model)(type(config).from_dict(saved["config"])).eval()
    loaded.load_state_dict(saved["model"])
    assert torch.equal(run(loaded), run(model))


# The meta device and dtypes


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_from_the_meta_device_to_the_same_model(config, assign):
    model = make(config)
    with torch.device("meta"):
        empty = type(model)(config)
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(run(empty.eval()), run(model))
    assert (empty.head.weight is empty._output_embedding().weight) == config.tie_embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sinusoids_are_exact_in_the_dtype_they_are_used_in(dtype):
    exact = fnn.PositionalEncoding(8, 40, dtype=torch.float64).table
    modules = [fnn.PositionalEncoding(8, 40, 0.0).to(dtype) for _ in range(2)]
    modules += [fnn.PositionalEncoding(8, 40, 0.0), fnn.PositionalEncoding(8, 40, 0.0).bfloat16()]
    modules += [fnn.PositionalEncoding(8, 40, 0.0).half().to(dtype)]
    for module in modules:
        assert torch.equal(module(torch.zeros(40, 8, dtype=dtype)), exact.to(dtype))
    with torch.device("meta"):
        module = fnn.PositionalEncoding(8, 40, 0.0)
    assert torch.equal(module(torch.zeros(40, 8, dtype=dtype)), exact.to(dtype))


@pytest.mark.parametrize("position", POSITIONS[3:], ids=str)
def test_a_double_model_turns_in_double(position):
    model = make(fnn.CausalLMConfig(**SIZES, vocab_size=11, position=position)).double()
    if isinstance(position, fnn.RoPE):
        at = torch.tensor([0, 1, 1000, 100_000])
        tables = position.tables(at, 8, torch.float64)
        assert all(table.dtype == torch.float64 for table in tables)
        cos, sin = tables
        magnitude = 1.0 if position.scaling is None else position.scaling.magnitude
        # cos and sin are right to an eps; scaled, squared and added to half of one each: 4 eps, and half for the other.
        few = 5 * torch.finfo(torch.float64).eps
        torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, magnitude**2), rtol=few, atol=0)
        rounded = fnn.RoPE(position.theta, position.scaling).tables(at, 8)[0]
        assert not torch.equal(cos, rounded.double())
    assert run(model).dtype == torch.float64


def test_rope_in_double_is_the_formula():
    angle = torch.arange(7, dtype=torch.float64)[:, None] * 500.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    cos, sin = fnn.RoPE(500.0).tables(torch.arange(7), 8, torch.float64)
    for ours, expected in ((cos, angle.cos()), (sin, angle.sin())):
        assert_parity(ours, expected, expected, intermediate=angle)  # an angle rounds by its size


# The loss


def test_labels_give_the_next_token_loss():
    model = make(CONFIGS[0])
    tokens = torch.randint(11, (3, 7))
    labels = tokens.clone()
    labels[0, 3:] = -100

    def losses(model):
        kept = torch.cat([F.cross_entropy(model(tokens)[i, :-1], labels[i, 1:], reduction="none") for i in range(3)])
        every = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        return every, kept.sum() / (labels[:, 1:] != -100).sum()

    for given, exact, eager in zip((tokens, labels), losses(copy.deepcopy(model).double()), losses(model), strict=True):
        assert_parity(model(tokens, labels=given), exact, eager, intermediate=exact)


def test_the_loss_of_packed_sequences_does_not_cross_them():
    model = make(CONFIGS[4])
    sequences = [torch.randint(11, (n,)) for n in (4, 1, 6)]
    offsets = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    packed = torch.cat(sequences)

    def one_by_one():
        return sum(model(s[None], labels=s[None]) * (len(s) - 1) for s in sequences if len(s) > 1) / 8

    actual, eager = model(packed, labels=packed, cu_seqlens=offsets), one_by_one()
    # Empty sequences change nothing, also after the last token.
    for starts in ([0, 0, 4, 5, 11], [0, 4, 4, 5, 11], [0, 4, 5, 11, 11, 11]):
        with_empty = model(packed, labels=packed, cu_seqlens=torch.tensor(starts, dtype=torch.int32))
        torch.testing.assert_close(with_empty, actual, rtol=0, atol=0)
    model.double()
    assert_parity(actual, one_by_one(), eager)


class Copied(TorchDispatchMode):
    """The number of elements of each copy."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.clone.default:
            self.elements.append(out.numel())
        return out


def test_the_loss_does_not_copy_the_logits():
    logits, tokens = torch.randn(2, 7, 500, requires_grad=True), torch.randint(500, (2, 7))
    with Copied() as copied:
        next_token_loss(logits, tokens, tokens, None)
    assert max(copied.elements, default=0) < 500


def test_labels_that_do_not_fit_are_refused():
    model, tokens = make(CONFIGS[0]), torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels.shape: expected tokens.shape == \(2, 5\), got \(2, 4\)"):
        model(tokens, labels=tokens[:, 1:])
    with pytest.raises(ValueError, match="labels: expected None with a cache"):
        model(tokens, labels=tokens, cache=model.make_cache(2, 8))


@pytest.mark.parametrize("name", ["attention_mask", "key_padding_mask", "past_key_values"])
def test_keywords_of_other_packages_name_ours(name):
    with pytest.raises(TypeError, match=f"forward.* unexpected keyword argument {name!r}; here it is "):
        make(CONFIGS[0])(torch.zeros(1, 3, dtype=torch.int64), **{name: None})
    with pytest.raises(TypeError, match=f"{name!r}; here it is "):
        fnn.Encoder(fnn.TransformerConfig(**SIZES))(torch.zeros(1, 3, 16), **{name: None})
