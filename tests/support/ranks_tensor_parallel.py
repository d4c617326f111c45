"""What the processes of `tests.support.ranks` are asked to do with divided models, and what one process computes."""

import contextlib

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
import fastattn.distributed as fd
from fastattn.nn import ALiBi, CausalLM, CausalLMConfig, EncoderDecoder, EncoderDecoderConfig, RoPE, TransformerConfig
from tests.support.ranks_sharding import square

MODELS = {
    "rope": {"position": RoPE(), "num_kv_heads": 2},
    "of_heads": {"position": ALiBi(learned=True), "qk_norm": True, "sinks": True},
    "alibi": {"position": ALiBi(), "num_kv_heads": 2, "window": (5, None)},
    "untied": {"position": RoPE(), "tie_embeddings": False},
}


def make_model(name, dtype=torch.float32, **changes):
    """(model, its inputs), the same in every process."""
    torch.manual_seed(1)
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 4}
    if name == "encoder_decoder":
        parts = [TransformerConfig(**sizes, **MODELS[kind]) for kind in ("rope", "of_heads")]
        model = EncoderDecoder(EncoderDecoderConfig(source_vocab_size=18, encoder=parts[0], decoder=parts[1]))
    else:
        model = CausalLM(CausalLMConfig(vocab_size=18, **sizes, **MODELS[name], **changes))
    for parameter in model.parameters():  # sinks and norms that differ from head to head
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter.data, std=0.3)
    return model.to(dtype), torch.randint(0, 18, (2, 9))


def loss_of(model, tokens):
    if isinstance(model, CausalLM):
        return model(tokens, labels=tokens)
    return F.cross_entropy(model(tokens, tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def train_step(model, tokens):
    """(loss, gradients by name), whole."""
    loss = loss_of(model, tokens)
    loss.backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return whole(loss.detach()), gradients


def divided_step(mesh, name, vocabulary=False, sequence=False, compiled=False):
    """The step; ``compiled``: block by block, whose activations are computed anew."""
    model, tokens = make_model(name, **({"checkpoint": True} if compiled else {}))
    plan = fd.tensor_parallel_plan(model, mesh.size(), vocabulary=vocabulary, sequence=sequence)
    parallelize_module(model, mesh, plan)
    if compiled:
        for block in model.decoder.blocks:
            block.compile(backend="aot_eager", dynamic=False)
    with loss_parallel() if vocabulary else contextlib.nullcontext():
        return train_step(model, tokens)


def generated(mesh, name, sequence=False):
    """Tokens and their score; in one process without a mesh."""
    model, tokens = make_model(name)
    if mesh is not None:
        parallelize_module(model, mesh, fd.tensor_parallel_plan(model, mesh.size(), sequence=sequence))
    start = {"start": 3} if name == "encoder_decoder" else {}
    found = fastattn.generate(model, tokens, 6, **start)
    return found.tokens.tolist()


# The drop-ins for torch.nn

E, H, N, L, S = 16, 4, 2, 7, 5


def make_attention(name, dtype):
    """(layer, its arguments)"""
    g = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(dtype).requires_grad_()

    later = torch.ones(L, L, dtype=torch.bool).triu(1)
    padding = torch.arange(L) >= torch.tensor([[L], [4]])
    if name == "packed":  # of one input; both masks; heads that differ in theirs; a row with nothing allowed
        layer = fastattn.nn.MultiheadAttention(E, H, dropout=0.3, batch_first=True)
        mask = torch.rand(N * H, L, L, generator=g) < 0.3
        mask[5, 2] = True
        x = draw(N, L, E)
        return layer, (x, x, x), {"attn_mask": mask, "key_padding_mask": padding, "need_weights": False}
    if name == "cross":  # sequence first; a mask with a gradient, and weights
        layer = fastattn.nn.MultiheadAttention(E, H, dropout=0.3)
        memory = draw(S, N, E)
        return layer, (draw(L, N, E), memory, memory), {"attn_mask": draw(L, S)}
    if name == "sizes":  # weights of every head
        layer = fastattn.nn.MultiheadAttention(E, H, kdim=6, vdim=10, add_bias_kv=True, add_zero_attn=True)
        inputs = (draw(L, N, E), draw(S, N, 6), draw(S, N, 10))
        return layer, inputs, {"attn_mask": draw(N * H, L, S), "average_attn_weights": False}
    assert name == "causal"  # without a batch, without biases
    layer = fastattn.nn.MultiheadAttention(E, H, bias=False)
    return layer, (draw(L, E), draw(L, E), draw(L, E)), {"attn_mask": later, "is_causal": True, "need_weights": False}


def make_layers(name, dtype):
    g = torch.Generator().manual_seed(4)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(dtype).requires_grad_()

    later = torch.ones(L, L, dtype=torch.bool).triu(1)
    padding = torch.arange(L) >= torch.tensor([[L], [4]])
    sizes = {"d_model": E, "nhead": H, "dim_feedforward": 24, "dropout": 0.2}
    if name == "encoder":
        layer = torch.nn.TransformerEncoderLayer(**sizes, batch_first=True)
        model = torch.nn.TransformerEncoder(layer, 2, torch.nn.LayerNorm(E), enable_nested_tensor=False)
        return model, (draw(N, L, E),), {"mask": later, "is_causal": True, "src_key_padding_mask": padding}
    if name == "layer":  # without a batch, by name
        model = torch.nn.TransformerEncoderLayer(**sizes, activation="gelu", norm_first=True, bias=False)
        return model, (), {"src": draw(L, E)}
    assert name == "transformer"
    model = torch.nn.Transformer(
        d_model=E, nhead=H, num_encoder_layers=1, num_decoder_layers=2, dim_feedforward=24, dropout=0.2,
        norm_first=True,
    )  # fmt: skip
    return model, (draw(L, N, E), draw(S, N, E)), {"src_key_padding_mask": padding, "tgt_mask": later[:S, :S]}


def make_drop_in(name, dtype):
    torch.manual_seed(2)
    model, args, options = (make_attention if name in ATTENTION else make_layers)(name, dtype)
    fastattn.convert(model)
    for parameter in model.parameters():  # biases and norms that differ from head to head
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter.data, std=0.3)
    return model.to(dtype), args, options


ATTENTION = ("packed", "cross", "sizes", "causal")


def drop_in_step(mesh, name, dtype=torch.float32, sequence=False):
    """Outputs and all gradients by name, with dropout; in one process without a mesh.

    Of 4 ranks 2 share the heads, and the others, with the same input, the parameters.
    """
    model, args, options = make_drop_in(name, dtype)
    if mesh is not None:
        both = square() if mesh.size() == 4 else None
        heads = mesh if both is None else both["tp"]
        parallelize_module(model, heads, fd.tensor_parallel_plan(model, heads.size(), sequence=sequence))
        if both is not None:
            fd.fully_shard(model, mesh=both["dp"])
    torch.manual_seed(5)
    out = model(*args, **options)
    out = [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]
    g = torch.Generator().manual_seed(6)
    sum((x * torch.randn(x.shape, generator=g).to(dtype)).sum() for x in out).backward()
    found = {f"out{i}": x.detach() for i, x in enumerate(out)}
    inputs = {f"input{i}": x for i, x in enumerate((*args, *options.values())) if isinstance(x, torch.Tensor)}
    for key, x in (*inputs.items(), *model.named_parameters()):
        if x.grad is not None:
            found[key] = whole(x.grad)
    return together(found)


def together(found):
    """The gradients of projections that one process has packed, packed."""
    packed = {}
    for name, x in found.items():
        if name.endswith("q_proj_weight"):
            parts = [found[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            if len({part.shape for part in parts}) == 1:
                packed[name.replace("q_proj", "in_proj")] = torch.cat(parts)
                continue
        if name[-13:] in ("k_proj_weight", "v_proj_weight") and name[:-13] + "in_proj_weight" in packed:
            continue
        packed[name] = x
    return packed


def decoded(mesh, dtype=torch.float32, sequence=False):
    """Step by step, over a cache of own heads; in one process without a mesh."""
    torch.manual_seed(2)
    layer = torch.nn.TransformerDecoderLayer(E, H, 24, batch_first=True)
    model = torch.nn.TransformerDecoder(layer, 2).to(dtype).eval()
    fastattn.convert(model)
    if mesh is not None:
        parallelize_module(model, mesh, fd.tensor_parallel_plan(model, mesh.size(), sequence=sequence))
    x, memory = torch.randn(N, 3, E).to(dtype), torch.randn(N, S, E).to(dtype)
    with torch.no_grad():
        cache = model.make_cache(memory, 3)
        return torch.cat([model.step(x[:, i : i + 1], cache) for i in range(3)], 1)


class Collectives(TorchDispatchMode):
    """How often each collective ran."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        if function.namespace == "_c10d_functional" and not name.startswith("_") and name != "wait_tensor":
            self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def messages(mesh, sequence):
    """The collectives of the forward pass and of the backward pass."""
    model, tokens = make_model("rope")
    parallelize_module(model, mesh, fd.tensor_parallel_plan(model, mesh.size(), sequence=sequence))
    with Collectives() as forward:
        loss = loss_of(model, tokens)
    with Collectives() as backward:
        loss.backward()
    return forward.counts, backward.counts
