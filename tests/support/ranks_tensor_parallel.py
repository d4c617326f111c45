"""What the processes of `tests.support.ranks` are asked to do with divided models, and what one process computes."""

import contextlib

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel, parallelize_module

import fastattn
import fastattn.distributed as fd
from fastattn.nn import ALiBi, CausalLM, CausalLMConfig, EncoderDecoder, EncoderDecoderConfig, RoPE, TransformerConfig

MODELS = {
    "rope": {"position": RoPE(), "num_kv_heads": 2},
    "of_heads": {"position": ALiBi(learned=True), "qk_norm": True, "sinks": True},
    "alibi": {"position": ALiBi(), "num_kv_heads": 2, "window": (5, None)},
    "untied": {"position": RoPE(), "tie_embeddings": False},
}


def make_model(name, dtype=torch.float32):
    """(model, its inputs), the same in every process."""
    torch.manual_seed(1)
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 4}
    if name == "encoder_decoder":
        parts = [TransformerConfig(**sizes, **MODELS[kind]) for kind in ("rope", "of_heads")]
        model = EncoderDecoder(EncoderDecoderConfig(source_vocab_size=18, encoder=parts[0], decoder=parts[1]))
    else:
        model = CausalLM(CausalLMConfig(vocab_size=18, **sizes, **MODELS[name]))
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


def divided_step(mesh, name, vocabulary=False):
    model, tokens = make_model(name)
    parallelize_module(model, mesh, fd.tensor_parallel_plan(model, mesh.size(), vocabulary=vocabulary))
    with loss_parallel() if vocabulary else contextlib.nullcontext():
        return train_step(model, tokens)


def generated(mesh, name):
    """Tokens and their score; in one process without a mesh."""
    model, tokens = make_model(name)
    if mesh is not None:
        parallelize_module(model, mesh, fd.tensor_parallel_plan(model, mesh.size()))
    start = {"start": 3} if name == "encoder_decoder" else {}
    found = fastattn.generate(model, tokens, 6, **start)
    return found.tokens.tolist()
