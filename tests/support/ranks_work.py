"""What the processes of `tests.support.ranks` are asked to do, and what the test compares it with."""

import time

import torch
import torch.distributed as dist

import fastattn.distributed as fd
from fastattn import BlockMask, attention, attention_varlen, testing
from fastattn.block_mask import BLOCK
from fastattn.distributed import comm
from fastattn.distributed.layout import length_of, pieces, placed
from fastattn.testing import calls

ROWS = ("out", "lse", "dq")
KEYS = ("dk", "dv")


def make_inputs(case):
    """(q, k, v, dout, dlse by name, options), the whole, the same in every process."""
    g = torch.Generator().manual_seed(case.get("seed", 0))
    documents = case.get("documents")
    batch, q_heads, kv_heads = (
        case.get("batch", 2 if documents is None else 1),
        case.get("q_heads", 4),
        case.get("kv_heads", 4),
    )
    q_len, kv_len, dim, v_dim = case.get("q_len", 37), case.get("kv_len", 37), 8, case.get("v_dim", 8)
    dtype = case.get("dtype", torch.float32)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(dtype).requires_grad_()

    q, k, v = draw(batch, q_heads, q_len, dim), draw(batch, kv_heads, kv_len, dim), draw(batch, kv_heads, kv_len, v_dim)
    options = dict(case.get("options", {}))
    if shape := case.get("bias"):
        sizes = (batch, q_heads, q_len, kv_len)
        options["bias"] = draw(*(n if wide else 1 for n, wide in zip(sizes, shape, strict=True)))
    if case.get("mask"):
        options["mask"] = torch.rand(batch, 1, q_len, kv_len, generator=g) < 0.7
    if shape := case.get("tiles"):
        options["block_mask"] = BlockMask.from_mask(in_tiles(*shape, q_len, kv_len, g))
    if case.get("alibi"):
        options["alibi_slopes"] = torch.rand(q_heads, generator=g).mul(0.2).requires_grad_()
    if documents is not None:
        options["cu_seqlens_q"] = torch.tensor(documents)
        options["cu_seqlens_k"] = torch.tensor(case.get("key_documents", documents))
        if case.get("slopes_of_documents"):
            slopes = torch.rand(len(documents) - 1, q_heads, generator=g).mul(0.2)
            options["alibi_slopes"] = slopes.requires_grad_()
    if case.get("sinks"):
        options["sinks"] = torch.randn(q_heads, generator=g).requires_grad_()
    inputs = {"q": q, "k": k, "v": v, "dout": draw(batch, q_heads, q_len, v_dim).detach()}
    inputs["dlse"] = torch.randn(batch, q_heads, q_len, generator=g)
    return inputs, options


def in_tiles(batch, heads, q_len, kv_len, g):
    """A bool mask with empty, full and partial tiles, which differ from head to head, and with a row of nothing."""
    rows, columns = -(-q_len // BLOCK), -(-kv_len // BLOCK)
    kinds = torch.randint(0, 3, (batch, heads, rows, columns), generator=g)
    kinds[..., 0, 0], kinds[..., -1, 0] = 1, 0
    of_keys = kinds.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[:, :, :q_len, :kv_len]
    mask = (of_keys == 1) | ((of_keys == 2) & (torch.rand(of_keys.shape, generator=g) < 0.5))
    mask[:, :, q_len // 2] = False
    return mask


def attend(mesh, case):
    """This rank's out, lse and gradients."""
    torch.manual_seed(mesh.get_rank())  # dropout goes by what rank 0 draws
    inputs, options = make_inputs(case)
    inputs = {name: x.detach() for name, x in inputs.items()}
    how = {"mesh": mesh, "balance": case["balance"]}
    of_rows, of_keys = ({**how, "dim": 2, "cu_seqlens": options.get(f"cu_seqlens_{name}")} for name in "qk")
    own = {name: fd.shard(x, **(of_keys if name in "kv" else of_rows)) for name, x in inputs.items()}
    leaves = [own[name].requires_grad_() for name in ("q", "k", "v")]
    names = ["dq", "dk", "dv"]
    for name in ("mask", "bias", "alibi_slopes", "sinks"):
        if (x := options.get(name)) is not None:
            x = x.detach()
            if x.ndim == 4 and x.shape[2] > 1:
                x = fd.shard(x, **of_rows)
            if x.is_floating_point():
                leaves.append(x.requires_grad_())
                names.append(f"d{name}")
            options[name] = x
    out, lse = fd.context_parallel_attention(
        own["q"], own["k"], own["v"], strategy=case["strategy"], return_lse=True, backend=case.get("backend"), **how,
        **options,
    )  # fmt: skip
    gradients = torch.autograd.grad(
        [out, lse], leaves, [own["dout"], own["dlse"].masked_fill(lse.detach() == -torch.inf, 0.0)]
    )
    results = dict(zip(["out", "lse", *names], [out.detach(), lse.detach(), *gradients], strict=True))
    for name, leaf in zip(names, leaves, strict=True):
        assert results[name].shape == leaf.shape and results[name].dtype == leaf.dtype, name
    return results


def together(case, parts):
    """The whole from what `attend` gave on every rank."""
    inputs, _ = make_inputs(case)
    whole = {}
    for name in parts[0]:
        found = [part[name] for part in parts]
        rows = name in ROWS or (name == "dbias" and case["bias"][2])
        if not rows and name not in KEYS:
            whole[name] = torch.stack(found).sum(0)
            continue
        total = inputs["q" if rows else "k"].shape[2]
        shape = list(found[0].shape)
        shape[2] = total
        whole[name] = found[0].new_empty(shape)
        starts = case.get("documents") if rows else case.get("key_documents", case.get("documents"))
        cut = pieces(case["balance"], total, len(parts), starts)
        for x, own in zip(found, cut, strict=True):
            assert x.shape[2] == length_of(own)
            for where, piece in placed(own):
                whole[name][:, :, piece.positions] = x[:, :, where]
    return whole


def check(case, parts):
    """Hold what `attend` gave to the one rule, against the specification in one process."""
    inputs, options = make_inputs(case)
    calls.hold_to_the_rule(list(together(case, parts).values()), inputs, options, 0)


def attend_twice(mesh, case):
    """Whether the same call gives the same bits, though messages come when they please."""
    first = attend(mesh, case)
    if mesh.get_rank() == 1:
        time.sleep(0.05)
    second = attend(mesh, case)
    return all(torch.equal(x, second[name]) for name, x in first.items())


def round_trip(mesh, length, balance):
    whole = torch.arange(2 * length * 3).view(2, length, 3)
    part = fd.shard(whole, mesh=mesh, dim=1, balance=balance)
    assert torch.equal(part[0, :, 0], whole[0, fd.positions(length, mesh=mesh, balance=balance), 0])
    return part.shape[1], bool(torch.equal(fd.unshard(part, mesh=mesh, dim=1, balance=balance), whole))


def small_call(mesh, length=6, **options):
    q = torch.randn(1, 2, length, 8)
    return fd.context_parallel_attention(q, q, q, mesh=mesh, **options)


def call_with(mesh, options):
    return small_call(mesh, **options)


def calls_of_lengths(mesh, lengths):
    """Of calls one after the other over so many tokens: whether each is right, and whether headers were exchanged."""
    found = []
    seen = comm.Ranks._exchange_headers

    def exchange(self, own):
        found[-1][1] = True
        return seen(self, own)

    comm.Ranks._exchange_headers = exchange
    try:
        for length in lengths:
            found.append([None, False])
            whole = torch.randn(1, 2, length, 8, generator=torch.Generator().manual_seed(length))
            q = fd.shard(whole, mesh=mesh, dim=2)
            out = fd.context_parallel_attention(q, q, q, mesh=mesh, causal=True)
            exact, expected = (attention(x, x, x, causal=True) for x in (whole.double(), whole))
            testing.assert_parity(out, *(fd.shard(x, mesh=mesh, dim=2) for x in (exact, expected)))
            found[-1][0] = True
    finally:
        comm.Ranks._exchange_headers = seen
    return found


def out_alone(mesh, strategy):
    """A call without gradients and lse, which may take another backend."""
    whole = [torch.randn(1, 4, 14, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    own = (fd.shard(x, mesh=mesh, dim=2) for x in whole)
    out = fd.context_parallel_attention(*own, mesh=mesh, strategy=strategy, causal=True)
    exact, expected = (attention(*x, causal=True) for x in ([x.double() for x in whole], whole))
    testing.assert_parity(out, *(fd.shard(x, mesh=mesh, dim=2) for x in (exact, expected)))
    return True


def packed_inside(mesh, seqused_k):
    """`attention_varlen` as a model calls it, whose documents use some of their keys."""
    whole = [torch.randn(14, 4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    ends = torch.tensor([0, 5, 14])
    how = {"seqused_k": torch.tensor(seqused_k), "causal": True, "return_lse": True}
    with fd.context_parallel(mesh, balance="zigzag"):
        found = attention_varlen(*(fd.shard(x, mesh=mesh, dim=0, balance="zigzag") for x in whole), ends, **how)
    exact, expected = (attention_varlen(*x, ends, **how) for x in ([x.double() for x in whole], whole))
    for dim, *results in zip((0, 1), found, exact, expected, strict=True):
        ours, *theirs = results
        testing.assert_parity(ours, *(fd.shard(x, mesh=mesh, dim=dim, balance="zigzag") for x in theirs))
    return True


def model_of_traffic(mesh, options):
    q = torch.randn(1, 2, 16, 8)
    return fd.explain(q, q, q, mesh=mesh, **options)


def differing(mesh, kind):
    """Rank 1 calls with something else than the others."""
    odd = mesh.get_rank() == 1
    if kind == "length":
        return small_call(mesh, 7 if odd else 6)
    if kind == "dtype":
        x = torch.randn(1, 2, 6, 8, dtype=torch.float64 if odd else torch.float32)
        return fd.context_parallel_attention(x, x, x, mesh=mesh)
    if kind == "heads":
        x = torch.randn(1, 4 if odd else 2, 6, 8)
        return fd.context_parallel_attention(x, x, x, mesh=mesh)
    if kind == "documents":
        return small_call(mesh, cu_seqlens_q=torch.tensor([0, 4 if odd else 5, 12]))
    if kind == "start":
        return small_call(mesh, kv_start=torch.tensor([int(odd)]))
    if kind == "start beyond":
        return small_call(mesh, kv_start=torch.tensor([19]))
    if kind == "options":
        return small_call(mesh, causal=odd)
    if kind == "keys":
        return small_call(mesh, bias=torch.zeros(6, (4 if odd else 3) * 6))
    assert kind == "error"
    return small_call(mesh, sinks=torch.zeros(3 if odd else 2))


def missing(mesh, when):
    """Rank 2 raises before its call, or before its backward pass; the others wait no longer than they say."""
    ranks = list(range(mesh.size()))
    group = dist.new_group(ranks)  # connections of its own: they do not outlive a timeout
    own = type(mesh).from_group(group, "cpu")
    q = torch.randn(1, 2, 6, 8, requires_grad=True)
    begin = time.monotonic()
    if when == "call" and mesh.get_local_rank() == 2:
        raise ValueError("on purpose")
    out = fd.context_parallel_attention(q, q, q, mesh=own, timeout=1.0, strategy="ring")
    if mesh.get_local_rank() == 2:
        raise ValueError("on purpose")
    try:
        out.sum().backward()
    finally:
        assert time.monotonic() - begin < 20.0


def explained(mesh, options, length=8192, heads=(8, 8)):
    q, k = (torch.empty(1, n, length, 64, dtype=torch.bfloat16) for n in heads)
    return fd.explain(q, k, k, mesh=mesh, **options)


def traffic(mesh, options, length=16):
    """Bytes that this rank is sent, and how many of the messages with keys; counted where they are received."""
    received = []
    q = torch.randn(1, 2, length, 8)
    seen = comm.Peers.start

    def start(self, sends, receives):
        received.extend(m.tensor.numel() * m.tensor.element_size() for m in receives if m.tag)
        return seen(self, sends, receives)

    comm.Peers.start = start
    try:
        fd.context_parallel_attention(q, q, q, mesh=mesh, **options)
    finally:
        comm.Peers.start = seen
    return sum(received), len(received)


def traffic_of_blocks(mesh, strategy, tiles):
    """`traffic` of four ranks with a tile each, under the mask of these tiles."""
    dense = torch.tensor(tiles, dtype=torch.bool).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return traffic(mesh, {"strategy": strategy, "block_mask": BlockMask.from_mask(dense)}, BLOCK)


def choice_of_blocks(mesh):
    """(text, costs, costs without) of a mask with a tile of four."""
    dense = torch.zeros(2 * BLOCK, 2 * BLOCK, dtype=torch.bool)
    dense[BLOCK:, :BLOCK] = True
    q = torch.randn(1, 2, BLOCK, 8)
    choice = fd.explain(q, q, q, mesh=mesh, block_mask=BlockMask.from_mask(dense))
    return str(choice), choice.costs, fd.explain(q, q, q, mesh=mesh).costs


def refused_blocks(mesh, kind):
    dense = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    if kind == "dense":
        return small_call(mesh, block_mask=dense)
    if kind == "length":
        dense = dense[:, :, :6]
    if kind == "heads":
        dense = dense.expand(1, 3, 12, 12)
    if kind == "other" and mesh.get_rank() == 1:
        dense[..., 0] = False
    documents = {"cu_seqlens_q": torch.tensor([0, 12])} if kind == "documents" else {}
    return small_call(mesh, block_mask=BlockMask.from_mask(dense), **documents)
