"""The kernel for the Hub: it loads under another name, beside an installed copy and other versions, and is right."""

import ast
import copy
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from benchmarks.harness.models import Float64
from benchmarks.tools import hub
from fastattn.testing import assert_parity

ROOT = Path(__file__).resolve().parents[2]
NAME = "local/fastattn"

# As the `kernels` library does: the module has the name that its metadata gives.
LOAD = """
    import importlib.util, json, sys
    from pathlib import Path
    import torch

    def load(variant):
        name = json.loads((Path(variant) / "metadata.json").read_text())["id"]
        spec = importlib.util.spec_from_file_location(name, Path(variant) / "__init__.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def results(attention):
        q, k, v = (torch.linspace(-1, 1, 2 * 4 * 33 * 16).sin().view(2, 4, 33, 16) * s for s in (3, 2, 1))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, causal=True, window=(9, 0), softcap=5.0, backend="reference")
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]
"""


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    target = tmp_path_factory.mktemp("hub") / "layout"
    hub.write(target)
    return target


def run(code, *arguments, **env):
    command = [sys.executable, "-c", textwrap.dedent(LOAD) + textwrap.dedent(code), *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_no_module_imports_the_package_by_name(layout):
    files = [*layout.rglob("*.py")]
    assert len(files) > 3 * 30
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert not [name for name in names if name.split(".")[0] in ("fastattn", "kernels")], path


def test_it_loads_where_fastattn_is_not_installed(layout):
    run("sys.modules['fastattn'] = None; results(load(sys.argv[1]).attention)", layout / "build" / "torch-cpu")


def test_versions_live_side_by_side(layout, tmp_path):
    """And beside the installed package: the same results, each by operators of its own."""
    changed = tmp_path / "changed"
    for name in ("fastattn", "kernels"):
        skip = shutil.ignore_patterns("__pycache__", "*.so", "kernels" if name == "fastattn" else "")
        shutil.copytree(ROOT / name, changed / name, ignore=skip)
    shutil.copy(ROOT / "LICENSE", changed)
    (changed / "fastattn" / "kernels").symlink_to("../kernels")
    with (changed / "fastattn" / "spec" / "cache.py").open("a") as file:
        file.write("# of another version\n")
    hub.write(tmp_path / "other", changed)
    code = """
        import fastattn
        kernels = [load(path) for path in sys.argv[1:]]
        assert len({kernel.__name__ for kernel in kernels}) == 3
        expected = results(fastattn.attention)
        for kernel in kernels:
            for ours, theirs in zip(results(kernel.attention), expected, strict=True):
                assert torch.equal(ours, theirs)
            assert hasattr(getattr(torch.ops, kernel.__name__), "attention_forward")
        calls = []
        with torch.profiler.profile() as profile:
            results(kernels[0].attention)
        names = {event.name.split("::")[0] for event in profile.events()}
        assert kernels[0].__name__ in names and "fastattn" not in names
    """
    run(
        code, *(x / "build" / f"torch-{b}" for x, b in ((layout, "cpu"), (layout, "cuda"), (tmp_path / "other", "cpu")))
    )


def test_its_names(layout):
    code = (
        "print(json.dumps(load(sys.argv[1]).__all__)); assert not hasattr(load(sys.argv[1]), 'flash_attn_varlen_func')"
    )
    names = json.loads(run(code, layout / "build" / "torch-cpu"))
    assert names == sorted(name for names in hub.PUBLIC.values() for name in names)


def test_an_import_that_cannot_be_rewritten_is_an_error():
    with pytest.raises(ValueError, match=r"ops/x.py: expected 'from fastattn... import ...', got 'import fastattn.nn'"):
        hub.relocated("import fastattn.nn\n", "ops/x.py", "other")


# In transformers


def make_llama():
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install 'fastattn[hf]'"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def assert_equal_to_eager(model, name):
    """Logits of left-padded rows by the rule, and the tokens that follow."""
    tokens = torch.randint(1, 99, (3, 12))
    seen = torch.arange(12) >= torch.tensor([[0], [3], [7]])
    inputs = {"input_ids": tokens.masked_fill(~seen, 0), "attention_mask": seen.long()}

    def results():
        with torch.no_grad():
            logits = model(**inputs).logits[seen]
        return logits, model.generate(**inputs, max_new_tokens=5, do_sample=False)

    model.set_attn_implementation("eager")
    eager, following = results()
    with Float64(), torch.no_grad():
        exact = copy.deepcopy(model).double()(**inputs).logits[seen]
    trusted = {"allow_all_kernels": True} if "/" in name else {}  # that are not of a repository of Hugging Face's
    model.set_attn_implementation(name, **trusted)
    ours, ours_following = results()
    assert_parity(ours, exact, eager, "logits", intermediate=float(exact.abs().max()))
    assert torch.equal(ours_following, following)


def test_a_left_padded_llama(layout):
    """Registered as transformers registers a kernel with `flash_attn_forward`: with the masks of "sdpa"."""
    model = make_llama()
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    scope = {}
    exec(textwrap.dedent(LOAD), scope)
    kernel = scope["load"](layout / "build" / "torch-cpu")
    assert kernel.supports_flash_attn
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return kernel.flash_attn_forward(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("hub-kernel", counted)
    ALL_MASK_ATTENTION_FUNCTIONS.register("hub-kernel", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    try:
        assert_equal_to_eager(model, "hub-kernel")
        assert calls
        whole = torch.randint(1, 99, (2, 9))  # no padding: transformers hands over no mask
        ours = model(whole).logits
        model.set_attn_implementation("sdpa")
        with Float64(), torch.no_grad():
            exact = copy.deepcopy(model).double()(whole).logits
        assert_parity(ours, exact, model(whole).logits, "logits", intermediate=exact.abs().max())
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["hub-kernel"]
        del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping["hub-kernel"]
        del sys.modules[kernel.__name__]


def no_library():
    """Why the library kernels cannot load the layout here, or None."""
    if "site-packages" not in str(getattr(importlib.util.find_spec("kernels"), "origin", "")):
        return "the package kernels is not installed"
    if "package_name" in inspect.signature(importlib.import_module("kernels").get_local_kernel).parameters:
        return f"kernels {version('kernels')} loads another layout: 0.14 and later are served"
    return None


def why_not():
    """Why transformers cannot load a kernel here, or None: as transformers itself reports."""
    if reason := no_library():
        return reason
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    import transformers
    from transformers.dependency_versions_table import deps
    from transformers.integrations import hub_kernels
    from transformers.utils.import_utils import is_kernels_available

    if not is_kernels_available():
        return f"transformers {transformers.__version__} takes {deps['kernels']}, got {version('kernels')}"
    if "supports_flash_attn" not in inspect.getsource(hub_kernels):
        return f"transformers {transformers.__version__} asks no kernel for flash_attn_forward: 5.17 and later do"
    return None


@pytest.mark.skipif(why_not() is not None, reason=f"{why_not()}")
@pytest.mark.parametrize("path", [False, True], ids=["any name", "the folder's path"])
def test_transformers_loads_it_from_a_folder(path, layout, monkeypatch):
    """And runs it: what it cannot load, it may replace."""
    monkeypatch.chdir(layout.parents[1])
    folder = str(layout.relative_to(layout.parents[1]))
    name = folder if path else NAME
    monkeypatch.setenv("LOCAL_KERNELS", f"{name}={folder}")
    model = make_llama()
    assert_equal_to_eager(model, name)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    device = "cuda" if torch.version.cuda else "rocm" if torch.version.hip else "cpu"  # as this PyTorch was built
    module = json.loads((layout / "build" / f"torch-{device}" / "metadata.json").read_text())["id"]
    assert model.config._attn_implementation == name
    assert ALL_ATTENTION_FUNCTIONS[name].__module__ == f"{module}.integrations.hub"


@pytest.mark.skipif(no_library() is not None, reason=f"{no_library()}")
def test_the_library_loads_it(layout):
    kernel = importlib.import_module("kernels").get_local_kernel(layout, backend="cpu")
    q = torch.randn(1, 2, 5, 8)
    assert torch.equal(kernel.attention(q, q, q), torch.nn.functional.scaled_dot_product_attention(q, q, q))
