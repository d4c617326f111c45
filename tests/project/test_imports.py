"""Import boundaries: what `import fastattn` may need and do, and which module may import which."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Makes packages look as if they were not installed, to import statements and to find_spec alike.
BLOCK = """
    import importlib.machinery

    class WithoutBlocked(importlib.machinery.PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            return None if name.partition(".")[0] in {blocked!r} else super().find_spec(name, path, target)

    import sys
    sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = WithoutBlocked
"""


def fresh(code, blocked=()):
    """Run code in a new interpreter where the blocked packages cannot be imported."""
    prefix = textwrap.dedent(BLOCK.format(blocked=tuple(blocked))) if blocked else ""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", prefix + textwrap.dedent(code)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


OPTIONAL = ("triton", "transformers", "matplotlib", "numpy")


def test_packages_are_imported_when_first_used():
    fresh(
        """
        import sys, fastattn
        later = ["compat", "distributed", "testing", "integrations.huggingface", "integrations.diffusers"]
        assert not any(f"fastattn.{name}" in sys.modules for name in later)
        assert fastattn.distributed.job and fastattn.testing.assert_parity and fastattn.compat.flash_attn
        assert fastattn.integrations.huggingface.register and fastattn.integrations.diffusers.register
        assert fastattn.integrations.huggingface_weights.load
        for module in (fastattn, fastattn.integrations):
            assert not hasattr(module, "absent")
        """,
        blocked=OPTIONAL,
    )


def test_torch_alone_is_needed():
    fresh(
        """
        import torch, fastattn
        import fastattn.integrations.huggingface, fastattn.integrations.huggingface_weights, fastattn.nn
        import fastattn.testing, fastattn.backends.reference
        q = torch.randn(1, 2, 5, 8, requires_grad=True)
        out = fastattn.attention(q, q, q, causal=True)
        out.sum().backward()
        assert out.shape == q.shape and q.grad is not None
        assert "triton" in str(fastattn.explain(q, q, q))
        try:
            fastattn.attention(q, q, q, backend="triton")
        except ValueError as error:
            assert "the triton package is not installed" in str(error), error
        else:
            raise AssertionError("expected an error")
        """,
        blocked=OPTIONAL,
    )


def test_import_leaves_optional_packages_and_the_environment_alone():
    loaded = fresh(
        """
        import os, sys, torch
        modules, environment = set(sys.modules), dict(os.environ)
        import fastattn
        print(*{name.partition(".")[0] for name in set(sys.modules) - modules})
        import fastattn.nn
        assert dict(os.environ) == environment
        """
    )
    assert not set(loaded.split()) & set(OPTIONAL)


def test_import_changes_nothing_in_torch_and_does_not_touch_cuda():
    """New attributes are allowed (importing a submodule sets one on its parent), replaced ones are not."""
    fresh(
        """
        import torch, torch.nn.functional, torch.nn.attention

        def started(*args, **kwargs):
            raise AssertionError("importing fastattn asked the CUDA driver")

        torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = started
        torch.cuda.get_device_capability = torch.cuda.get_device_properties = started

        def snapshot():
            modules = (torch, torch.nn, torch.nn.functional, torch.nn.attention, torch.nn.modules.activation,
                       torch.nn.modules.transformer, torch.nn.init)
            owners = [*modules, torch.Tensor]
            owners += [value for value in vars(torch.nn).values() if isinstance(value, type)]
            return {(owner.__name__, name): value for owner in owners for name, value in vars(owner).items()}

        before = snapshot()
        state = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state().tolist()
        settings = torch.get_num_threads(), torch.get_float32_matmul_precision()
        import fastattn, fastattn.nn
        after = snapshot()
        ignored = {"__warningregistry__"}
        assert not [key for key in before if after.get(key) is not before[key] and key[1] not in ignored]
        assert state == (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state().tolist())
        assert settings == (torch.get_num_threads(), torch.get_float32_matmul_precision())
        assert not torch.cuda.is_initialized()
        """
    )


# Which room may import which others, "" being fastattn itself. A backend is a room of its own: none imports another.
ROOMS_OF_BACKENDS = ("cpu", "cuda", "reference", "torch_sdpa", "triton")
ARROWS = {
    "__init__": {
        *("backends", "backends.reference", "block_mask", "flops", "functional", "inference", "integrations", "nn"),
        *("compat", "distributed", "testing"),  # when first used
    },
    "__main__": {"", "backends", "backends.cpu", "spec"},
    "_check": {"spec"},
    "examples": {"", "distributed", "functional", "inference", "integrations", "nn"},
    "compat": {"block_mask", "compat", "functional"},
    "distributed": {"backends", "block_mask", "distributed", "flops", "functional", "nn", "ops", "spec"},
    "integrations": {"backends", "block_mask", "functional", "integrations", "nn", "ops", "spec"},
    "inference": {"_check", "functional", "inference", "nn"},
    "nn": {"_check", "functional", "nn"},
    "testing": {"backends.reference", "functional", "ops", "spec", "testing"},
    "functional": {"backends", "block_mask", "functional", "ops", "spec"},
    "flops": {"ops"},
    "ops": {"backends", "ops", "spec"},
    "backends": {f"backends.{name}" for name in ROOMS_OF_BACKENDS} | {"backends", "spec"},
    "backends.cpu": {"backends.cpu", "spec"},
    "backends.cuda": {"spec"},
    "backends.reference": {"backends.reference", "block_mask", "spec"},
    "backends.torch_sdpa": {"spec"},
    "backends.triton": {"kernels", "spec"},
    "kernels": {"kernels", "spec"},
    "spec": {"block_mask", "spec"},
    "block_mask": set(),
}
THIRD_PARTY = {
    "kernels": {"torch", "triton"},
    # Their classes derive from those of the library. `convert` imports them when a model holds such a module.
    "integrations.timm": {"timm", "torch"},
    "integrations.torchvision": {"torch", "torchvision"},
}
FOLDERS = ("fastattn", "kernels", "examples")
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if not path.is_relative_to(ROOT / "fastattn" / "kernels")
)


def import_name(path):
    """The dotted name under which a source file is imported."""
    parts = path.with_suffix("").parts
    parts = ("fastattn", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(name):
    """The key of ARROWS for a dotted name."""
    top, *rest = name.split(".")
    if top != "fastattn":
        return top
    backend = rest[:1] == ["backends"] and rest[1:2] and rest[1] in ROOMS_OF_BACKENDS
    return ".".join(rest[: 2 if backend else 1])


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(path, tree=None):
    """Every module that a source file imports, at any depth, by statement or import_module; and its node in `tree`."""
    package = import_name(path) if path.name == "__init__.py" else import_name(path).rpartition(".")[0]
    for node in ast.walk(tree or ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if is_module(name) else base, node
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "import_module":
            text = node.args[0]
            text = text.values[0] if isinstance(text, ast.JoinedStr) else text
            if isinstance(text, ast.Constant):
                yield str(text.value).rstrip("."), node


def test_arrows():
    for path in SOURCES:
        own = part_of(import_name(path)) or "__init__"
        assert own in ARROWS, f"{path} is new: give it a row in ARROWS"
        targets = {part_of(name) for name, _ in imports(path) if name.partition(".")[0] in ("fastattn", "kernels")}
        if own == "__init__":
            targets.discard("")
        assert targets <= ARROWS[own], path


PACKAGE = [path for path in SOURCES if path.parts[0] != "examples"]


def test_third_party_packages_at_import_time():
    """The static side of the tests above; an import inside a function is free to be of anything."""
    for path in PACKAGE:
        names = imported_at_once(path)
        name = import_name(path)
        allowed = THIRD_PARTY.get(name.removeprefix("fastattn."), THIRD_PARTY.get(part_of(name), {"torch"}))
        assert names - set(sys.stdlib_module_names) - {"fastattn"} <= allowed, path


def imported_at_once(path):
    """What a module imports when it is imported."""
    tree = ast.parse((ROOT / path).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    deferred = {inner for function in functions for inner in ast.walk(function)}
    return {name.partition(".")[0] for name, node in imports(path, tree) if node not in deferred}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parts[0] == "kernels"], ids=str)
def test_kernels_import_each_other_relatively(path):
    """An absolute import would bind a copy of the folder under another name to this one."""
    for name, node in imports(path):
        if part_of(name) == "kernels":
            assert isinstance(node, ast.ImportFrom) and node.level == 1


# harness <- suites <- tools, and __main__ on top. The runner names suites by string, so that it needs none of them.
ROOMS_OF_BENCHMARKS = {"harness": {"harness"}, "suites": {"harness", "suites"}, "tools": {"harness", "suites", "tools"}}


@pytest.mark.parametrize("room", ROOMS_OF_BENCHMARKS)
def test_rooms_of_the_benchmarks(room):
    for path in (ROOT / "benchmarks" / room).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks."):
                assert node.module.split(".")[1] in ROOMS_OF_BENCHMARKS[room], f"{path} imports {node.module}"


# --- sizes ---------------------------------------------------------------------------------------------------------

LIMITS = {"forward_kernel": 25, "dkdv_kernel": 28, "dq_kernel": 28, "dbias_kernel": 28, "finish_scores": 14}
"""The most arguments that these functions of kernels/ may take."""


def test_no_file_has_more_than_400_lines():
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in PACKAGE}
    assert {path: n for path, n in lengths.items() if n > 400} == {}


def test_kernels_are_short_and_take_named_groups():
    trees = [ast.parse(path.read_text()) for path in (ROOT / "kernels").glob("*.py")]
    functions = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    kernels = [node for name, node in functions.items() if name.endswith("_kernel")]
    assert len(kernels) >= 5
    for node in kernels:
        assert (node.end_lineno or 0) - node.lineno < 100, node.name
    for name, most in LIMITS.items():
        assert len(functions[name].args.args) <= most, name
