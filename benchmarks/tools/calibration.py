"""How far off is the static model? Its figure for a kernel with published rates, compiled like ours.

The kernel has the shape of Triton's fused attention tutorial: one loop over all keys, tiles by pointers, no masks. Of
the tutorial's larger tiles the best predicted one counts, as its autotuner takes the fastest.

    python -m benchmarks.tools.calibration          # compiles it, writes results/predictions/calibration.csv

Only for Hopper. For an A100 the model lacks the rates of its multiprocessor (mma.sync for every product, half the rate
of float32); for a B200 the products that one thread starts out of tensor memory, their queue, and that memory's rate.
`loop_counts` has what can be counted of kernels for those.
"""

import re

import triton
import triton.language as tl
from triton.compiler import ASTSource

from benchmarks.harness import predictions, results

from . import compile_report, static_model

CLOCK = 1.6e9
"""Hertz, of an H100 whose tensor cores are busy."""
PUBLISHED = {64: (340, 403), 128: (395, 487)}
"""TFLOP/s of the tutorial's kernel on an H100 SXM at 16k keys, not causal, by head dim: from the charts of the
FlashAttention-3 paper (arXiv 2407.08608), pytorch/benchmark #2391 and facebookexperimental/triton #205."""
TILES = ("128,64,4,3", "128,64,8,3", "128,128,8,2", "128,128,8,3")
PATH = predictions.HERE / "calibration.csv"


@triton.jit
def tutorial_kernel(
    q, k, v, out, lse, scale, head_stride, row_stride, length,  # noqa: ANN001
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head against all keys; ``scale`` is in units of log2."""
    first = tl.program_id(1).to(tl.int64) * head_stride
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    keys, dims = tl.arange(0, BLOCK_N), tl.arange(0, HEAD_DIM)
    own = first + rows[:, None] * row_stride + dims[None, :]
    q_tile = tl.load(q + own)
    k_ptrs = k + first + keys[None, :] * row_stride + dims[:, None]
    v_ptrs = v + first + keys[:, None] * row_stride + dims[None, :]
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for _ in tl.range(0, length, BLOCK_N):
        scores = tl.dot(q_tile, tl.load(k_ptrs))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
        p = tl.math.exp2(scores * scale - new_max[:, None])
        shrink = tl.math.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        v_tile = tl.load(v_ptrs)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None])
        row_max = new_max
        k_ptrs += BLOCK_N * row_stride
        v_ptrs += BLOCK_N * row_stride
    tl.store(lse + tl.program_id(1) * length + rows, row_max + tl.log2(row_sum))
    tl.store(out + own, (acc / row_sum[:, None]).to(out.dtype.element_ty))


def compiled(head_dim: int, tile: str) -> compile_report.Result:
    """The kernel with a tile ``block_m,block_n,warps,stages``."""
    block_m, block_n, warps, stages = map(int, tile.split(","))
    signature = dict.fromkeys(("q", "k", "v", "out"), "*bf16") | {"lse": "*fp32", "scale": "fp32"}
    signature |= dict.fromkeys(("head_stride", "row_stride", "length"), "i32")
    constants = {"HEAD_DIM": head_dim, "BLOCK_M": block_m, "BLOCK_N": block_n}
    attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "fp32"}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(tutorial_kernel, signature, constants, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    result = compile_report.Result("sm_90", "forward", head_dim, "plain", tile)
    made = compile_report.compile_kernel(source, compile_report.TARGETS["sm_90"], options)
    result.config, result.shared = made.config, made.shared
    compile_report.read_nvidia(result, made)
    return result


def share_of(result: compile_report.Result) -> float:
    """What the model predicts of the compiled kernel."""
    block_m, block_n, warps = result.tile()
    if result.loop is None:
        return 0.0
    head_dim = result.dim
    return static_model.predict(
        result.loop, "forward", block_m, block_n, head_dim, warps, result.registers, result.shared
    ).share


def teraflops(share: float) -> float:
    """Of an H100 at CLOCK."""
    return share * static_model.FLOP_PER_CYCLE * static_model.MULTIPROCESSORS * CLOCK * 1e-12


def calibrate() -> list[results.Row]:
    """A row of results for each head dim with a published figure: the best tile's share and rate."""
    rows = []
    for head_dim, (low, high) in PUBLISHED.items():
        best, share = "", 0.0
        for tile in TILES:
            result = compiled(head_dim, tile)
            reached = share_of(result)
            if result.shared <= compile_report.SHARED_LIMIT["sm_90"] and reached > share:
                best, share = result.config, reached
        rate = teraflops(share)
        note = f"static model, {best}; published {low} to {high}: {rate / low - 1:+.0%} to {rate / high - 1:+.0%}"
        row = {"case": "tutorial", "mode": "forward", "provider": "triton-tutorial", "dtype": "bf16", "causal": "no"}
        row |= {"head_dim": str(head_dim), "tflops": f"{rate:.0f}", "of_matmul": f"{share:.3f}", "note": note}
        rows.append(row | {"triton": triton.__version__})
    return rows


def error() -> str:
    """The model's error on the published figures, as it was when last calibrated."""
    found = [
        f"D {row['head_dim']} {row['tflops']} TFLOP/s, {re.sub('.*; ', '', row['note'])}" for row in results.read(PATH)
    ]
    return f"Its error on Triton's tutorial at {CLOCK / 1e9} GHz: {'; '.join(found) or 'unknown'}."


if __name__ == "__main__":
    results.upsert(PATH, calibrate())
    print(error())
