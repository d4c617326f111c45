"""What the processes of `tests.support.ranks` are asked to do with models, and what one process computes."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor.parallel import parallelize_module

import fastattn
import fastattn.distributed as fd
from fastattn.functional.parts import attention_of_heads, attention_varlen_of_heads
from fastattn.integrations import huggingface
from fastattn.nn import ALiBi, CausalLM, CausalLMConfig, Encoder, Learned, RoPE, Sinusoidal, TransformerConfig

LENGTH = 23
MODELS = {
    "rope": {"position": RoPE(), "num_kv_heads": 2},
    "learned": {"position": Learned(max_len=LENGTH), "qk_norm": True},
    "sinusoidal": {"position": Sinusoidal(max_len=LENGTH), "softcap": 5.0},
    "alibi": {"position": ALiBi(learned=True), "window": (9, None)},
    "sinks": {"position": RoPE(), "sinks": True, "window": (6, None), "num_kv_heads": 1},
}


def make_lm(name, dtype=torch.float32, **changes):
    torch.manual_seed(1)
    config = CausalLMConfig(vocab_size=17, d_model=32, num_layers=2, num_heads=4, **MODELS[name], **changes)
    tokens = torch.randint(0, 17, (2, LENGTH))
    labels = tokens.masked_fill(torch.rand(tokens.shape) < 0.2, -100)
    return CausalLM(config).to(dtype), {"tokens": tokens, "labels": labels}


def averaged(mesh, gradients):
    """As data parallelism does it."""
    for gradient in gradients.values():
        for dim in range(mesh.ndim):
            dist.all_reduce(gradient, group=mesh.get_group(dim))
        gradient /= mesh.size()
    return gradients


def gradients_of(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def whole_step(name, dtype=torch.float32):
    """(loss, gradients by name) in one process."""
    model, batch = make_lm(name, dtype)
    model(**batch).backward()
    return model(**batch).detach(), gradients_of(model)


DOCUMENTS = torch.tensor([0, 3, 3, 14, 15, 21])


def packed(batch):
    """Of its first row, documents; the last tokens are of none."""
    return {name: x[0] for name, x in batch.items()}


def whole_packed_step(name, dtype=torch.float32):
    model, batch = make_lm(name, dtype)
    loss = model(**packed(batch), cu_seqlens=DOCUMENTS)
    loss.backward()
    return loss.detach(), gradients_of(model)


def divided_packed_step(mesh, name, strategy, balance):
    model, batch = make_lm(name)
    part = fd.shard_batch(packed(batch), mesh=mesh, balance=balance, cu_seqlens=DOCUMENTS)
    with fd.context_parallel(mesh, strategy=strategy, balance=balance):
        loss = model(**part, cu_seqlens=DOCUMENTS)
    loss.backward()
    return loss.detach(), averaged(mesh, gradients_of(model))


def divided_step(mesh, name, strategy, balance, way="with"):
    """The same on ranks; by the context, or as a property of the model, with or without what computes anew."""
    model, batch = make_lm(name, checkpoint=way == "checkpoint")
    how = {"strategy": strategy, "balance": balance}
    part = fd.shard_batch(batch, mesh=mesh, balance=balance)
    if way == "with":
        with fd.context_parallel(mesh, **how):
            loss = model(**part)
    else:
        parallelize_module(model, mesh, fd.ContextParallel(**how))
        loss = (torch.compile(model, backend="eager") if way == "compile" else model)(**part)
    loss.backward()
    return loss.detach(), averaged(mesh, gradients_of(model))


def make_encoder(dtype=torch.float32):
    torch.manual_seed(2)
    config = TransformerConfig(d_model=32, num_layers=2, num_heads=4, position=Learned(max_len=LENGTH))
    model = Encoder(config).to(dtype)
    return model, torch.randn(2, LENGTH, 32).to(dtype), torch.tensor([LENGTH, 11])


def encode(mesh, balance):
    """What an encoder makes of padded sequences, whole."""
    model, x, lengths = make_encoder()
    with fd.context_parallel(mesh, balance=balance):
        part = model(fd.shard(x, mesh=mesh, dim=1, balance=balance), lengths=lengths)
    return fd.unshard(part.detach(), mesh=mesh, dim=1, balance=balance)


def make_layers(dtype=torch.float32):
    """Layers of torch.nn, converted, behind a module of positions."""
    torch.manual_seed(3)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = torch.nn.Sequential(
        fastattn.nn.PositionalEncoding(32, dropout=0.0, batch_first=True), torch.nn.TransformerEncoder(layer, 2)
    )
    fastattn.convert(model)
    return model.to(dtype), torch.randn(2, LENGTH, 32).to(dtype)


def run_layers(mesh, balance):
    model, x = make_layers()
    with fd.context_parallel(mesh, balance=balance):
        part = model(fd.shard(x, mesh=mesh, dim=1, balance=balance))
    return fd.unshard(part.detach(), mesh=mesh, dim=1, balance=balance)


def make_llama(kind, dtype=torch.float32):
    sys.modules.setdefault("kernels", None)  # an optional package of its own, not the folder of this repository
    import transformers

    huggingface.register()
    torch.manual_seed(4)
    sizes = {
        "vocab_size": 19, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "fastattn",
        "pad_token_id": 0, "use_cache": False,
    }  # fmt: skip
    if kind == "mistral":
        sizes["sliding_window"] = 7
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="fastattn").to(dtype)
    tokens = torch.randint(0, 19, (2, LENGTH))
    return model, {"input_ids": tokens, "labels": tokens}


def packing(kind, batch):
    """(the batch, what else the model is given)."""
    if kind != "llama":
        return batch, {}
    ends = torch.tensor([0, 5, 14, LENGTH])
    return {name: x[:1] for name, x in batch.items()}, {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}


def whole_llama(kind, dtype=torch.float32):
    model, batch = make_llama(kind, dtype)
    batch, more = packing(kind, batch)
    if more:
        ends = more["cu_seq_lens_q"]
        batch["position_ids"] = torch.cat([torch.arange(n) for n in ends.diff().tolist()])[None]
        batch["labels"] = batch["labels"].index_fill(1, ends[:-1], -100)
    loss = model(**batch, **more).loss
    loss.backward()
    return loss.detach(), gradients_of(model)


def divided_llama(mesh, kind, balance):
    model, batch = make_llama(kind)
    batch, more = packing(kind, batch)
    part = fd.shard_batch(batch, mesh=mesh, balance=balance, cu_seqlens=more.get("cu_seq_lens_q"))
    with fd.context_parallel(mesh, balance=balance):
        loss = model(**part, **more).loss
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total, group=mesh.get_group())
    return total / mesh.size(), averaged(mesh, gradients_of(model))


def make_block_mask_call(dtype=torch.float32):
    """Arguments of a call in which every third token sees all, and the others what is near."""
    torch.manual_seed(4)
    q, k, v = (torch.randn(1, heads, 300, 16).to(dtype).requires_grad_() for heads in (4, 2, 2))
    i, j = torch.arange(300)[:, None], torch.arange(300)
    return (
        (q, k, v),
        fastattn.BlockMask.from_mask((i % 3 == 0) | ((i - j).abs() < 40)),
        torch.randn(1, 4, 300, 16).to(dtype),
    )


def run_block_mask(mesh, balance):
    """out, dq, dk, dv of `fastattn.attention` inside, whole."""
    qkv, block_mask, dout = make_block_mask_call()
    how = {"mesh": mesh, "dim": 2, "balance": balance}
    own = [fd.shard(x.detach(), **how).requires_grad_() for x in qkv]
    with fd.context_parallel(mesh, balance=balance):
        out = fastattn.attention(*own, block_mask=block_mask)
    gradients = torch.autograd.grad(out, own, fd.shard(dout, **how))
    return [fd.unshard(x.detach(), **how) for x in (out, *gradients)]


def make_dropout_call(packed, dtype=torch.float32):
    torch.manual_seed(6)
    q, k, v = (torch.randn(1, heads, 40, 8).to(dtype) for heads in (4, 2, 2))
    options = {"cu_seqlens": torch.tensor([0, 11, 40], dtype=torch.int32), "cu_seqlens_k": None} if packed else {}
    return (q, k, v), options | {"dropout_p": 0.4, "causal": True}


def drop_out(qkv, first, packed, options):
    """Heads from ``first`` on, with the generator at one place."""
    torch.manual_seed(9)
    if not packed:
        return attention_of_heads(first, *qkv, **options)
    out = attention_varlen_of_heads(first, *(x[0].transpose(0, 1) for x in qkv), **options)
    return out.transpose(0, 1)[None]


def divided_dropout(mesh, packed):
    """Attention of all heads and tokens, where one dimension of the mesh divides these and the other those."""
    qkv, options = make_dropout_call(packed)
    tokens, heads = mesh["ring"], mesh["heads"].get_local_rank()
    balance = "documents" if packed else "zigzag"
    cut = {"cu_seqlens": options["cu_seqlens"]} if packed else {}
    how = {"mesh": tokens, "dim": 2, "balance": balance, **cut}
    own = [fd.shard(x.chunk(2, 1)[heads], **how) for x in qkv]
    with fd.context_parallel(tokens, balance=balance):
        return heads, fd.unshard(drop_out(own, 2 * heads, packed, options), **how)


def refused_inside(mesh, kind):
    """A call that counts on a rank having the whole."""
    q = torch.randn(1, 2, 4, 8)
    with fd.context_parallel(mesh):
        if kind == "weights":
            return fastattn.nn.MultiheadAttention(8, 2)(*torch.randn(3, 4, 1, 8))
        if kind == "cache":
            return fastattn.attention_with_kvcache(q.transpose(1, 2), *torch.zeros(2, 1, 8, 2, 8), cache_lens=4)
        if kind == "last":
            return make_lm("rope")[0](torch.zeros(1, 4, dtype=torch.int64), last=True)
        if kind == "length":
            length = 5 if mesh.get_local_rank() else 4
            return make_lm("rope")[0](torch.zeros(1, length, dtype=torch.int64))
        assert kind == "mask"
        return fastattn.attention(q, q, q, mask=torch.ones(4, 4, dtype=torch.bool))


def outside_after_an_error(mesh):
    """Whether an error inside ends the division, in both ways."""
    q = torch.randn(1, 2, 4, 8)
    model, batch = make_lm("rope")
    parallelize_module(model, mesh, fd.ContextParallel())
    errors = 0
    for wrong in (lambda: model(batch["tokens"].float()), lambda: refused_inside(mesh, "cache")):
        try:
            wrong()
        except (TypeError, ValueError):
            errors += 1
    return errors == 2 and fastattn.attention(q, q, q).shape == q.shape


def shard_a_batch(mesh, batch):
    return fd.shard_batch(batch, mesh=mesh)
