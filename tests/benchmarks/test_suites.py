"""Every suite in a dry run, and what its calls compute."""

import copy
import dataclasses
import importlib.util
import itertools

import pytest
import torch

import fastattn
from benchmarks.harness import models, provenance, results, runner
from benchmarks.harness.device import CudaDevice, Device
from benchmarks.suites import cpu, features, forward, layers, overhead
from benchmarks.tools import test_host
from fastattn.testing import assert_parity

TRANSFORMERS = importlib.util.find_spec("transformers") is not None
EXPECTED = {
    "forward": {"fastattn", "sdpa-flash", "sdpa-math", "flex", "torch"},
    "backward": {"fastattn", "sdpa-flash", "sdpa-math", "flex", "torch"},
    "features": {"fastattn", "sdpa-flash", "sdpa-math", "flex", "torch"},
    "decode": {"fastattn", "sdpa", "flex", "torch"},
    "layers": {"fastattn", "torch", "torch-compile", "sdpa", "sdpa-flash"},
    "generation": {"fastattn", "torch"} | ({"transformers", "transformers-static"} if TRANSFORMERS else set()),
    "huggingface": {"torch"} | ({"fastattn", "sdpa", "eager"} if TRANSFORMERS else set()),
    "memory": {"fastattn", "sdpa-flash", "sdpa-math", "torch"},
    "overhead": {"fastattn", "sdpa", "torch"},
    "launch": {"fastattn", "triton-binder", "triton", "triton, memory offered", "torch"},
    "cpu": {"fastattn", "sdpa", "torch", "read", "unquantised"},
    "scaling": {"torch", "ring", "all_gather", "ulysses", "ring, heads by 8", "all_gather, heads by 8"},
}


@pytest.mark.parametrize("suite", runner.SUITES)
def test_every_path_of_a_suite_runs(suite, dry):
    rows = results.read(dry / f"{suite}.csv")
    assert {r["provider"] for r in rows} == EXPECTED[suite]
    for r in rows:
        assert r["gpu"] == "dry run" and r["digest"] == provenance.digest() and r["date"]
        assert "something else" not in r["note"], r
        if r["provider"] == "fastattn":
            assert (r["p50_ms"] or r["peak_mib"]) and "cannot" not in r["note"], r
    own = {r["case"] for r in rows if r["provider"] == "fastattn"}
    if suite == "features":
        assert own == {*features.FEATURES, *features.LONG_FEATURES}
    if suite == "decode":
        assert all(float(r["mbytes"]) > 0 and float(r["of_copy"]) > 0 for r in rows if r["provider"] == "fastattn")
    if suite == "overhead":
        assert {"sdpa", "attention, reference backend", "first forward"} <= own


def test_the_grid_is_the_fields():
    cells = {(c.suite, c.label) for c in runner.cells_of(["forward", "backward"], CudaDevice())}
    forwards = [label for suite, label in cells if suite == "forward"]
    plain = [label for label in forwards if not label.endswith((", other peers", ", CUDA C++"))]
    assert len(plain) == 6 * 3 * 2 * 2
    for cell in forward.cells():
        problem = cell.run.keywords["problem"] if "problem" in cell.run.keywords else cell.run.func.keywords["problem"]
        assert problem.batch * problem.length == 16384 and problem.q_heads * problem.head_dim == 2048


def test_suites_by_device():
    assert {c.suite for c in runner.cells_of(runner.SUITES, Device())} == {
        *("generation", "huggingface", "overhead", "launch", "memory", "cpu", "scaling")
    }
    assert {c.suite for c in runner.cells_of(runner.SUITES, CudaDevice())} == set(runner.SUITES) - {"cpu", "scaling"}
    priorities = [c.priority for c in runner.cells_of(runner.SUITES, CudaDevice())]
    assert priorities == sorted(priorities) and priorities[0] == 0
    decode = [c.label for c in runner.cells_of(["decode"], CudaDevice())]
    assert all(label.startswith("32/8 heads") and label.endswith(("L=8192", "L=32768")) for label in decode[:6])
    features = [c.label for c in runner.cells_of(["features"], CudaDevice())]
    assert features[0] == "causal L=16384 forward" and "L=1024" in features[-1]


@pytest.mark.parametrize("config", [models.TINY, dataclasses.replace(models.TINY, llama=False)])
def test_models_compute_the_same_with_attention_swapped(config):
    tokens = torch.randint(config.vocabulary, (2, config.length + 1))

    def loss(provider, dtype=torch.float32):
        torch.manual_seed(0)
        return models.Decoder(config, models.ATTEND[provider]).to(dtype)(tokens)

    exact, eager = loss("sdpa", torch.float64), loss("sdpa")
    for provider in models.ATTEND:
        assert_parity(loss(provider), exact, eager, provider, intermediate=exact)


def test_a_training_step_changes_the_weights():
    step = models.training_step(models.TINY, "fastattn", "cpu", torch.float32)
    optimizer = step.__closure__[[*step.__code__.co_freevars].index("optimizer")].cell_contents
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    step(0)
    assert all(not torch.equal(a, b) for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True))


@pytest.mark.parametrize("kind", layers.LAYERS)
@pytest.mark.parametrize("padded", [False, True])
def test_layers_compared_are_the_same_function(kind, padded):
    torch.manual_seed(0)
    layer = layers.make_layer(kind, 64)
    x = torch.randn(2, 10, 64)
    padding = torch.arange(10) >= torch.tensor([[10], [6]]) if padded else None
    causal = torch.nn.Transformer.generate_square_subsequent_mask(10)
    eager = layers.apply(kind, layer, x, padding, causal)
    expected = layers.apply(kind, copy.deepcopy(layer).double(), x.double(), padding, causal.double())
    report = fastattn.convert(layer)
    assert report.converted
    assert_parity(layers.apply(kind, layer, x, padding, causal), expected, eager)


def test_overhead_calls_are_the_same_function(monkeypatch):
    given = overhead.tiny_inputs("cpu", False)

    def cases(dtype):
        monkeypatch.setattr(
            overhead, "tiny_inputs", lambda _, grad: [x.to(dtype, copy=True).requires_grad_(grad) for x in given]
        )
        return overhead.host_calls("cpu")

    for (case, calls), exact in zip(cases(torch.float32).items(), cases(torch.float64).values(), strict=True):
        if "sdpa" in calls:
            assert_parity(calls["fastattn"](), exact["sdpa"](), calls["sdpa"](), case)


def test_pytest_benchmark_cases_run():
    def benchmark(call):
        call()

    for case, mode in itertools.product(cpu.CASES, ("forward", "backward")):
        test_host.test_cpu(benchmark, case, mode, "fastattn")
    for case in overhead.host_calls("cpu"):
        test_host.test_overhead(benchmark, case, "fastattn")


@pytest.mark.slow
def test_first_call_of_a_fresh_process(tmp_path):
    times = overhead.first_call(str(tmp_path))
    assert times.keys() == {"import torch", "import fastattn", "first forward", "first backward", "second forward"}
    assert times["second forward"] < times["import torch"]
