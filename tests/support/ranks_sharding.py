"""What the processes of `tests.support.ranks` are asked to do with DTensors."""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fastattn
from fastattn.testing import calls
from tests.support.ranks_work import make_inputs

PLACES = {"batch": Shard(0), "heads": Shard(1), "same": Replicate(), "sum": Partial()}
_meshes = {}


def square():
    """The four processes as a mesh of two dimensions."""
    if "square" not in _meshes:
        _meshes["square"] = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("dp", "tp"))
    return _meshes["square"]


def place(x, mesh, places):
    """The tensor as a DTensor; places that it has no room for become `Replicate`."""
    placements = [PLACES[name] for name in places]
    if any(p.is_partial() for p in placements):  # each rank has a part of the sum
        ranks = 1
        for index, p in enumerate(placements):
            ranks *= mesh.size(index) if p.is_partial() else 1
        whole = [Replicate() if p.is_partial() else p for p in placements]
        return DTensor.from_local(distribute_tensor(x, mesh, whole).to_local() / ranks, mesh, placements)
    return distribute_tensor(x, mesh, placements)


def call(q, k, v, options):
    return fastattn.attention(q, k, v, return_lse=True, **options)


def attend(mesh, case):
    """out, lse and gradients, whole, of `fastattn.attention` on DTensors; and how out is divided."""
    torch.manual_seed(mesh.get_rank())  # dropout goes by what rank 0 draws
    inputs, options = make_inputs(case)
    q, k, v = case["places"]
    mesh = square() if len(q) == 2 else mesh
    leaves = [place(inputs[n].detach(), mesh, p).requires_grad_() for n, p in zip("qkv", (q, k, v), strict=True)]
    names = ["dq", "dk", "dv"]
    own = dict(options)
    for name in ("bias", "alibi_slopes", "sinks"):
        if (x := options.get(name)) is not None:
            own[name] = place(x.detach(), mesh, case.get(name + "_places", ("same",) * mesh.ndim)).requires_grad_()
            leaves.append(own[name])
            names.append(f"d{name}")
    if case.get("block_mask"):
        own["block_mask"] = fastattn.BlockMask.from_mask(own.pop("mask"))
    if (x := own.get("mask")) is not None and case.get("mask_places"):
        own["mask"] = place(x, mesh, case["mask_places"])
    function = torch.compile(call, backend="aot_eager", fullgraph=True) if case.get("compiled") else call
    out, lse = function(*leaves[:3], {**own, "backend": case.get("backend")})
    dout, dlse = (distribute_tensor(inputs[x].detach(), mesh, [Replicate()] * mesh.ndim) for x in ("dout", "dlse"))
    gradients = torch.autograd.grad([out, lse], leaves, [dout, dlse])
    results = dict(zip(["out", "lse", *names], [out.detach(), lse.detach(), *gradients], strict=True))
    for name, leaf in zip(names, leaves, strict=True):
        expected = tuple(Replicate() if p.is_partial() else p for p in leaf.placements)
        assert results[name].placements == expected, name
    assert out.placements == lse.placements
    return {name: x.full_tensor() for name, x in results.items()}, [str(p) for p in out.placements]


def check(case, found):
    """Hold what `attend` gave on every rank to the one rule; all ranks have the same."""
    inputs, options = make_inputs(case)
    for results, _ in found:
        assert all(torch.equal(x, found[0][0][name]) for name, x in results.items())
    calls.hold_to_the_rule(list(found[0][0].values()), inputs, options, 0)


def packed(mesh, backend):
    """Largest difference of packed sequences, their heads divided, from the same in one process."""
    q, k, v = torch.randn(20, 4, 8), torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    starts = torch.tensor([0, 7, 20])
    options = {"causal": True, "backend": backend, "dropout_p": 0.3}
    torch.manual_seed(1)
    whole = fastattn.attention_varlen(q, k, v, starts, **options)
    parts = [place(x, mesh, ("heads",)) for x in (q, k, v)]
    torch.manual_seed(1)
    found = fastattn.attention_varlen(*parts, starts, **options)
    assert found.placements == (Shard(1),)
    return float((found.full_tensor() - whole).abs().max())


def torch_signature(mesh):
    """PyTorch's function, with leading dimensions to be merged; and which backend `explain` says."""
    x = torch.randn(2, 3, 4, 6, 8)
    whole = fastattn.scaled_dot_product_attention(x, x, x, is_causal=True)
    part = distribute_tensor(x, mesh, [Shard(2)])
    found = fastattn.scaled_dot_product_attention(part, part, part, is_causal=True)
    flat = distribute_tensor(x[0], mesh, [Shard(1)])
    return bool(torch.equal(found.full_tensor(), whole)), fastattn.explain(flat, flat, flat).backend


def second_derivative(mesh, dtype):
    """The gradients of a norm of gradients, whole; without a mesh in one process."""
    torch.manual_seed(0)
    leaves = [torch.randn(1, 2, 5, 4).to(dtype) for _ in range(3)]
    if mesh is not None:
        leaves = [distribute_tensor(x, mesh, [Shard(1)]) for x in leaves]
    leaves = [x.requires_grad_() for x in leaves]
    out = fastattn.attention(*leaves, causal=True, backend="reference")
    first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    return [x.full_tensor() if mesh is not None else x for x in second]


def refused(mesh, kind):
    x = torch.randn(2, 4, 6, 8)
    q = distribute_tensor(x, mesh, [Shard(1)])
    if kind in ("sequence", "head_dim"):
        q = distribute_tensor(x, mesh, [Shard(2 if kind == "sequence" else 3)])
        return fastattn.attention(q, q, q)
    if kind == "plain_key":
        return fastattn.attention(q, x, x)
    if kind == "plain_query":
        return fastattn.attention(x, q, q)
    if kind == "plain_bias":
        return fastattn.attention(q, q, q, bias=torch.zeros(6, 6, requires_grad=True))
    if kind == "divided_bias":
        return fastattn.attention(x, x, x, bias=distribute_tensor(torch.zeros(6, 6), mesh, [Shard(0)]))
    if kind == "heads":
        q = distribute_tensor(x[:, :3], mesh, [Shard(1)])
        return fastattn.attention(q, q, q)
    if kind == "cache":
        return fastattn.attention_with_kvcache(q, q.transpose(1, 2), q.transpose(1, 2), cache_lens=6)
    assert kind == "mesh"
    other = distribute_tensor(x, DeviceMesh("cpu", [[0, 1]]), [Replicate(), Shard(1)])
    return fastattn.attention(q, other, other)
