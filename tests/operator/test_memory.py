"""What autograd keeps of a call, and that checkpointing, offloading and CUDA graphs work with it."""

import functools

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastattn
from fastattn import attention, attention_with_kvcache, reference
from fastattn.backends.cpu import library
from tests.support.attention_cases import HALF, SINGLE, make_bias, make_mask, make_qkv

FORWARD = torch.ops.fastattn.attention_forward.default


def gradients(function, inputs, seed=0):
    """Output and gradients from a fixed random state, and the state after them."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    torch.manual_seed(seed)
    out = function(*leaves)
    out.square().sum().backward()
    return [out, *(x.grad for x in leaves), torch.get_rng_state()]


def assert_equal(ours, expected):
    for x, y in zip(ours, expected, strict=True):
        assert torch.equal(x, y)


def dropped(q, k, v, backend="reference"):
    """Two calls: each has to get its own random numbers again."""
    out = attention(q, k, v, causal=True, dropout_p=0.3, backend=backend)
    return attention(out, k, v, dropout_p=0.2, backend=backend)


REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


@REENTRANT
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_checkpointed_attention_drops_the_same(backend, reentrant):
    inputs = make_qkv("cpu", (33, 33), dtype=SINGLE)
    call = functools.partial(dropped, backend=backend)
    assert_equal(gradients(lambda *x: checkpoint(call, *x, use_reentrant=reentrant), inputs), gradients(call, inputs))


@REENTRANT
def test_checkpointed_layer(reentrant):
    layer = fastattn.nn.TransformerEncoderLayer(32, 2, 64, dropout=0.2, batch_first=True)
    parameters = list(layer.parameters())
    x = torch.randn(2, 17, 32)

    def run(function):
        layer.zero_grad()
        return [*gradients(function, [x]), *(p.grad.clone() for p in parameters)]

    assert_equal(run(lambda y: checkpoint(layer, y, use_reentrant=reentrant)), run(layer))


def test_selective_checkpointing_keeps_the_result_of_the_operator(monkeypatch):
    """Saved by a policy that names the operator, attention is not computed again in the backward pass."""
    directions = []
    for direction in ("forward", "backward"):
        run = getattr(reference, direction)
        monkeypatch.setattr(
            reference, direction, lambda *args, name=direction, run=run: directions.append(name) or run(*args)
        )

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is FORWARD else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q, k, v):
        return dropped(q.sin(), k, v).cos()

    inputs = make_qkv("cpu", (33, 33), dtype=SINGLE)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    selective = gradients(lambda *x: checkpoint(block, *x, use_reentrant=False, context_fn=contexts), inputs)
    assert directions == ["forward", "forward", "backward", "backward"]
    directions.clear()
    full = gradients(lambda *x: checkpoint(block, *x, use_reentrant=False), inputs)
    assert directions.count("forward") == 4
    expected = gradients(block, inputs)
    assert_equal(selective, expected)
    assert_equal(full, expected)


# What is saved


def saved_by(call):
    """Every tensor that autograd saves for ``call``."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        call()
    return saved


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "dropout": {"dropout_p": 0.3},
    "key padding": {"mask": make_mask("cpu", (1, 1, 1, 47))},
    "bias": {"bias": make_bias("cpu", (1, 1, 33, 1), requires_grad=True)},
}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("options", OPTIONS)
def test_nothing_of_the_size_of_the_scores_is_saved(options, backend):
    """q, k, v, out and the statistics, two numbers a row; the operands as they came, and a seed."""
    options = OPTIONS[options]
    q, k, v = (x.requires_grad_() for x in make_qkv("cpu", (33, 47), batch=2, dtype=SINGLE))
    saved = saved_by(lambda: attention(q, k, v, backend=backend, **options))
    operands = [x for x in options.values() if isinstance(x, torch.Tensor)]
    for tensor in (q, k, v, *operands):
        assert any(x.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for x in saved)
    out, statistics, seed = q.numel(), 2 * q.numel() // q.shape[3], int("dropout_p" in options)
    assert sum(x.numel() for x in saved) == sum(x.numel() for x in (q, k, v, *operands)) + out + statistics + seed


@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "bias", "alibi_slopes", "sinks", "out"])
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_changed_in_place_before_the_backward_pass(backend, name):
    """PyTorch's own error for saved tensors: gradients of other values would be wrong in silence."""
    if backend == "cpu" and (problem := library.problem()):
        pytest.skip(f"cpu backend: {problem}")
    q, k, v = (x.requires_grad_() * 1.0 for x in make_qkv("cpu", (9, 9), dtype=SINGLE))
    heads = q.shape[1]
    options = {
        "mask": torch.ones(9, 9, dtype=torch.bool), "bias": torch.randn(9, 9), "alibi_slopes": torch.rand(heads),
        "sinks": torch.randn(heads),
    }  # fmt: skip
    out = attention(q, k, v, backend=backend, **options)
    with torch.no_grad():
        {"q": q, "k": k, "v": v, "out": out, **options}[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_chain_saves_the_inputs_once():
    """The same tensor given three times is one storage: self-attention costs 1 input, out and statistics."""
    x = torch.randn(2, 2, 33, 16, requires_grad=True)
    saved = saved_by(lambda: attention(x, x, x, backend="reference"))
    assert len({t.untyped_storage().data_ptr() for t in saved}) == 3


def test_saved_tensors_may_go_elsewhere(tmp_path):
    inputs = make_qkv("cpu", (33, 47), dtype=SINGLE)
    call = functools.partial(attention, causal=True, dropout_p=0.3, backend="reference")
    expected = gradients(call, inputs)

    def on_cpu(*x):
        with torch.autograd.graph.save_on_cpu():
            return call(*x)

    def on_disk(*x):
        def pack(tensor):
            torch.save(tensor, path := tmp_path / f"{len(list(tmp_path.iterdir()))}.pt")
            return path

        with torch.autograd.graph.saved_tensors_hooks(pack, torch.load):
            return call(*x)

    assert_equal(gradients(on_cpu, inputs), expected)
    assert_equal(gradients(on_disk, inputs), expected)
    assert len(list(tmp_path.iterdir())) == 6  # q, k, v, seed, out, statistics


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestCUDAGraphs:
    @pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (16, 0), "softcap": 5.0}], ids=str)
    def test_forward_and_backward(self, options):
        """What a replay computes from new inputs is what eager code does."""
        inputs = [x.requires_grad_() for x in make_qkv("cuda", (129, 129), dims=(64, 64), dtype=HALF)]

        def step():
            out = attention(*inputs, backend="triton", **options)
            return [out, *torch.autograd.grad(out.square().sum(), inputs)]

        graph, results = captured(step)
        for seed in (1, 2):
            torch.manual_seed(seed)
            with torch.no_grad():
                for x, new in zip(inputs, make_qkv("cuda", (129, 129), dims=(64, 64), dtype=HALF), strict=True):
                    x.copy_(new)
            graph.replay()
            assert_equal(results, step())

    def test_every_replay_drops_others(self):
        """The seed is drawn on the device, by the generator that graphs know."""
        q, k, v = make_qkv("cuda", (129, 129), dims=(64, 64), dtype=HALF)
        graph, (out,) = captured(lambda: [attention(q, k, v, dropout_p=0.5, backend="triton")])
        results = []
        for _ in range(2):
            graph.replay()
            results.append(out.clone())
        assert not torch.equal(*results)

    @pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
    def test_a_decode_step(self, paged):
        """Lengths stay on the device: one graph serves every step."""
        batch, room = 3, 64
        q, k, v = (torch.randn(batch, heads, 1, 64).to("cuda", HALF) for heads in (8, 2, 2))
        shape = (batch * room // 16, 16, 2, 64) if paged else (batch, room, 2, 64)
        table = torch.randperm(shape[0]).view(batch, -1).int().cuda() if paged else None
        caches = [torch.randn(shape).to("cuda", HALF) for _ in "kv"]
        lens = torch.tensor([3, 0, 40], device="cuda")

        def step(*caches):
            return attention_with_kvcache(q, *caches, k, v, cache_lens=lens, block_table=table)

        graph, (out,) = captured(lambda: [step(*caches)])
        for _ in range(4):
            expected_caches = [x.clone() for x in caches]
            expected = step(*expected_caches)
            graph.replay()
            assert_equal([out, *caches], [expected, *expected_caches])
            lens += 1
            for x in (q, k, v):
                x.normal_()


def captured(step):
    """A CUDA graph of ``step`` and the tensors that its replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles what is to be captured
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results
