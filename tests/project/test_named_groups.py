"""What a call hands on has names: no tuple of arguments, operands or gradients is cut by numbers."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path.relative_to(ROOT) for folder in ("fastattn", "kernels") for path in (ROOT / folder).rglob("*.py"))
SOURCES = [path for path in SOURCES if not path.is_relative_to("fastattn/kernels")]

# What may be cut by numbers, as it is written: no tuple that a call hands on is among it. The name of a variable alone
# says nothing of what it holds, so each stands here for one file.
TENSORS = {
    "fastattn/backends/cpu/packing.py": {"seed"},
    "fastattn/backends/reference/blockwise.py": {"slopes"},
    "fastattn/compat/packing.py": {"bounds"},
    "fastattn/compat/xformers.py": {"ends", "keys.seqstart"},
    "fastattn/distributed/ring.py": {"documents.queries"},
    "fastattn/distributed/shards.py": {"cu_seqlens"},
    "fastattn/functional/rotary.py": {"starts"},
    "fastattn/functional/sharded.py": {"DTensor.from_local(seed, mesh, placements).full_tensor()"},
    "fastattn/integrations/activate.py": {"state.view(torch.int64).reshape(-1)"},
    "fastattn/nn/block.py": {"cu_seqlens"},
}
SHAPES = {
    "fastattn/__main__.py": {"args.cache", "args.q"},
    "fastattn/block_mask.py": {"full"},
    "fastattn/functional/leading.py": {"full[0]", "lead", "of_query"},
    "fastattn/nn/attention.py": {"shape(key)", "shape(value)"},
    "fastattn/nn/block.py": {"shape"},
    "fastattn/spec/cache.py": {"expected", "got"},
    "fastattn/testing/calls.py": {"shape"},
}
TEXTS = {
    "fastattn/_check.py": {"interval"},
    "fastattn/backends/cpu/library.py": {"hasher.hexdigest()"},
    "fastattn/backends/cuda.py": {"hasher.hexdigest()"},
    "fastattn/distributed/comm.py": {"str(error).splitlines()[0]"},
    "fastattn/distributed/job.py": {"fault", "str(error).partition('\\n')[0]"},
    "fastattn/integrations/huggingface.py": {"transformers.__version__.split('.')"},
    "fastattn/testing/calls.py": {"name"},
    "kernels/replay.py": {"version.split('.')"},
}
OTHERS = {
    "fastattn/compat/score_mod.py": {"(*node.args, 0)"},  # of a node in a graph of PyTorch's operators
    "fastattn/spec/checks.py": {"FLOAT_DTYPES"},
}


def is_number(node):
    return isinstance(node, ast.Constant | ast.UnaryOp)


def cut_by_numbers(tree):
    """The text of everything that is cut between numbers, by whatever means, or of whose parts one is named so.

    The sizes and strides of tensors, and the dimensions of tensors (`x[:, 1:]`), are no argument lists.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            cut = isinstance(node.slice, ast.Slice) and any(map(is_number, (node.slice.lower, node.slice.upper)))
            attribute = node.value.attr if isinstance(node.value, ast.Attribute) else ""
            which, sizes = attribute == "needs_input_grad" and is_number(node.slice), attribute == "shape"
            strides = isinstance(node.value, ast.Call) and ast.unparse(node.value.func).endswith(".stride")
            if which or (cut and not (sizes or strides)):
                yield ast.unparse(node.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("islice", "itemgetter"):
            yield ast.unparse(node)


def test_nothing_is_cut_by_numbers():
    found = {str(path): set(cut_by_numbers(ast.parse((ROOT / path).read_text()))) for path in SOURCES}
    allowed = {
        path: set().union(*(group.get(path, ()) for group in (TENSORS, SHAPES, TEXTS, OTHERS))) for path in found
    }  # fmt: skip
    assert found == allowed


@pytest.mark.parametrize(
    "code",
    ["x[:3]", "anything.at_all[2:5]", "f(x)[1:]", "x[:-1]", "ctx.needs_input_grad[4]", "operator.itemgetter(1, 2)(x)",
     "itertools.islice(x, 3)"],
)  # fmt: skip
def test_every_way_to_cut_is_seen(code):
    assert list(cut_by_numbers(ast.parse(code)))


def test_sizes_and_dimensions_of_tensors_are_not():
    assert not list(cut_by_numbers(ast.parse("q.shape[:2]; x.stride()[:-1]; x[:, 1:]; x[start:stop]")))
