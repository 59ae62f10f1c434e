"""The PTX interpreter, on programs written by hand; with CUDA's wheels, also on one card's narrow kernels."""

import importlib
import os
import subprocess
import sys
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "ahead_of_time"))
ptx = importlib.import_module("ptx")
BLOCKS, THREADS = 3, 64
N = BLOCKS * THREADS
# Thread k of the grid has x[k], y[k] and z[k] in %r3, %r4 and %r5, and writes %r6 to out[k].
KERNEL = """
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1, .param .u64 kernel_param_2,
                       .param .u64 kernel_param_3)
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    ld.param.u64 %rd1, [kernel_param_0];
    ld.param.u64 %rd2, [kernel_param_1];
    ld.param.u64 %rd3, [kernel_param_2];
    ld.param.u64 %rd4, [kernel_param_3];
    cvta.to.global.u64 %rd4, %rd4;
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mad.lo.s32 %r1, %r2, 64, %r1;  // the thread of the grid
    mul.wide.u32 %rd5, %r1, 4;
    add.s64 %rd1, %rd1, %rd5;
    add.s64 %rd2, %rd2, %rd5;
    add.s64 %rd3, %rd3, %rd5;
    add.s64 %rd4, %rd4, %rd5;
    ld.global.b32 %r3, [%rd1];
    ld.global.b32 %r4, [%rd2];
    ld.global.b32 %r5, [%rd3];
    {}
    st.global.b32 [%rd4], %r6;
    ret;
}}
"""


def floats(seed):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=N) * 2.0 ** rng.integers(-12, 5, N)).astype("f4")


X, Y = floats(0), floats(1)
ODD = np.where(np.arange(N) % 5, X, np.float32(np.nan))
B, K = Y.view("u4"), np.arange(N, dtype="u4")


def run(lines, x=X, y=Y, z=Y, dtype="f4"):
    """The output of these lines, and the machine; the kernel's parameters and the arrays differ in order."""
    machine = ptx.Machine([y, z, x], [np.empty(N, dtype)], [2, 0, 1, 3], BLOCKS, THREADS)
    machine.run(ptx.parse(KERNEL.format(lines)))
    return machine.output(0, np.empty(N, dtype)), machine


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("add.rn.f32 %r6, %r3, %r4;", ODD + Y),
        ("sub.f32 %r6, %r3, 0f3FC00000;", ODD - np.float32(1.5)),
        ("mul.f32 %r6, %r3, %r4; neg.f32 %r6, %r6;", -(ODD * Y)),
        ("div.full.f32 %r6, %r3, %r4;", ODD / Y),
        ("max.f32 %r6, %r3, %r4;", np.fmax(ODD, Y)),
        ("min.NaN.f32 %r6, %r3, %r4;", np.minimum(ODD, Y)),
        ("setp.gt.f32 %p1, %r3, %r4; selp.f32 %r6, %r3, %r4, %p1;", np.where(ODD > Y, ODD, Y)),
        ("setp.leu.f32 %p1, %r3, %r4; selp.f32 %r6, %r3, %r4, %p1;", np.where(ODD > Y, Y, ODD)),
        ("setp.ne.f32 %p1, %r3, %r3; selp.b32 %r6, 1, 0, %p1;", np.zeros(N, "u4")),
        ("setp.lt.s32 %p1, %r4, 0; setp.eq.or.b32 %p1, %r1, 3, %p1; selp.b32 %r6, 1, 0, %p1;", (B >> 31) | (K == 3)),
        ("ex2.approx.ftz.f32 %r6, %r3;", np.exp2(ODD.astype("f8")).astype("f4")),
        ("cvt.sat.f32.f32 %r6, %r3;", np.where(np.isnan(ODD), np.float32(0), np.clip(ODD, 0, 1))),
        ("cvt.rzi.s32.f32 %r6, %r3;", np.where(np.isnan(ODD), 0, np.trunc(X)).astype("i4")),
        ("cvt.rn.f32.u32 %r6, %r4;", B.astype("f4")),
        ("cvt.rn.bf16.f32 %rs1, %r4; cvt.f32.bf16 %r6, %rs1;", Y.astype(ml_dtypes.bfloat16).astype("f4")),
        ("cvt.rn.f16x2.f32 %r6, %r4, %r5;", np.repeat(Y.astype("f2"), 2).view("u4")),
        (
            "mov.b64 %rd6, {%r3, %r4}; add.rn.f32x2 %rd6, %rd6, %rd6; mov.b64 {_, %r6}, %rd6;",
            Y + Y,
        ),
        ("mov.b32 {%rs1, %rs2}, %r4; mov.b32 %r6, {%rs2, %rs1};", B << 16 | B >> 16),
        ("prmt.b32 %r6, %r4, %r1, 0x4012U;", B.byteswap() >> 8 | K << 24),
        ("prmt.b32 %r6, %r4, 0, 0xBBB3U;", B.view("i4") >> 24),
        ("shr.s32 %r6, %r4, 3;", B.view("i4") >> 3),
        ("shr.u32 %r6, %r4, 3;", B >> 3),
        ("cvt.u16.u32 %rs1, %r4; cvt.s16.s8 %rs2, %rs1; cvt.s32.s16 %r6, %rs2;", B.astype("i1").astype("i4")),
        ("mul.lo.s32 %r6, %r4, -3; add.s32 %r6, %r6, 1;", B * np.uint32(2**32 - 3) + np.uint32(1)),
        ("shfl.sync.idx.b32 %r6, %r4, 0, 31, -1;", np.repeat(B[::32], 32)),
        ("elect.sync _|%p1, -1; selp.b32 %r6, 7, 0, %p1;", np.where(np.arange(N) % 32, 0, 7)),
        ("ld.global.s8 %rs1, [%rd2+3]; cvt.s32.s16 %r6, %rs1;", B.view("i4") >> 24),
    ],
    ids=lambda x: x.split(" %")[0] if isinstance(x, str) else "",
)
def test_instructions(lines, expected):
    out, _ = run(lines, ODD)
    np.testing.assert_array_equal(out.view(expected.dtype if expected.itemsize == 4 else "i4"), expected)


def test_a_fused_product_is_rounded_once():
    # Terms that cancel, and terms so far apart that float64 does not hold the sum.
    power = np.exp2(np.random.default_rng(2).integers(-40, 40, N))
    z = np.where(np.arange(N) % 2, -X * Y, X * Y * power).astype("f4")
    nearest, _ = run("fma.rn.f32 %r6, %r3, %r4, %r5;", z=z)
    below, _ = run("fma.rm.f32 %r6, %r3, %r4, %r5;", z=z)

    def exact(x):
        return Fraction(float(x))

    for x, y, c, near, low in zip(X, Y, z, nearest, below, strict=True):
        total = exact(x) * exact(y) + exact(c)
        others = [np.nextafter(near, np.float32(to)) for to in (-np.inf, np.inf)]
        assert abs(exact(near) - total) <= min(abs(exact(other) - total) for other in others)
        assert exact(low) <= total < exact(np.nextafter(low, np.float32(np.inf)))


def test_a_loop_is_counted_turn_by_turn():
    lines = """
        mov.b32 %r6, 0;
        mov.b32 %r7, 0;
    $again:
        ld.global.b32 %r8, [%rd1];
        add.f32 %r6, %r6, %r8;
        add.s32 %r7, %r7, 1;
        setp.lt.u32 %p1, %r7, 4;
        @%p1 bra $again;
    """
    out, machine = run(lines)
    np.testing.assert_array_equal(out, X + X + X + X)
    warps = N // ptx.WARP
    turn = machine.turn()
    assert (turn.instructions, turn.bytes, turn.requests, turn.sectors) == (5, 4 * N, warps, 4 * warps)
    assert turn.touched == 0  # the first load of x was before the loop
    assert machine.counts.bytes == 4 * N * (3 + 4 + 1)


@pytest.mark.parametrize(
    ("place", "n_bytes", "sectors"),
    [
        ("sub.s64 %rd6, %rd1, %rd5;", 4, 1),  # all threads load x[0]
        ("add.s64 %rd6, %rd1, 0;", 128, 4),  # neighbours
        ("shr.u64 %rd6, %rd5, 5; shl.b64 %rd6, %rd6, 5; sub.s64 %rd6, %rd1, %rd6;", 32, 1),  # the first 8 over and over
    ],
)
def test_a_request_is_its_different_bytes_and_sectors(place, n_bytes, sectors):
    before, after = (run(f"{lines} mov.b32 %r6, 0;")[1].counts for lines in ("", f"{place} ld.global.b32 %r8, [%rd6];"))
    warps = N // ptx.WARP
    more = [b - a for a, b in zip(before, after, strict=True)]
    assert more[1:4] == [n_bytes * warps, warps, sectors * warps]


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [
        ("tanh.approx.f32 %r6, %r3;", NotImplementedError, r"tanh\.approx\.f32"),
        ("add.sat.f32 %r6, %r3, %r4;", NotImplementedError, r"add\.sat\.f32"),
        ("@%p1 add.f32 %r6, %r3, %r4;", NotImplementedError, r"@%p1 add\.f32"),
        ("ld.volatile.global.b32 %r6, [%rd1];", NotImplementedError, r"ld\.volatile"),
        ("ld.global.b32 %r6, [%rd1+4];", IndexError, r"\[%rd1\+4\]: outside"),
        ("ld.global.b32 %r6, [%rd1+-4];", IndexError, r"\[%rd1\+-4\]: outside"),
        ("ld.global.b64 %rd6, [%rd1];", IndexError, "not aligned|outside"),
        ("ld.global.b32 %r6, [%rd4];", IndexError, "a load from an output"),
        ("st.global.b32 [%rd1], %r3;", IndexError, "a store into an input"),
        ("sub.s64 %rd4, %rd4, %rd5; st.global.b32 [%rd4], %r3;", ValueError, "different values in one place"),
        ("mov.b32 %r6, 0; ret;", ValueError, r"768 of 768 bytes of output 0 are not written"),
        ("setp.gt.f32 %p1, %r3, 0f00000000; @%p1 bra $end; $end: mov.b32 %r6, 0;", ValueError, "threads part ways"),
        ("shl.b32 %r6, %r3, 32;", ValueError, "a shift by more bits"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_it_refuses(lines, error, message):
    with pytest.raises(error, match=message):
        run(lines)


@pytest.mark.skipif(find_spec("jax_cuda12_plugin") is None, reason="no CUDA wheels, see ahead_of_time/run")
def test_compiled_kernels_are_the_scan():
    command = [sys.executable, str(ROOT / "ahead_of_time/gpu.py"), "h100", "--only", "narrow"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("\nh100") > 30
