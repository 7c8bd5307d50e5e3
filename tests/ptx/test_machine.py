"""The interpreter itself: what instructions compute, and what is an error."""

from __future__ import annotations

import numpy as np
import pytest

from tests.codegen.triton import ptx as inline
from tests.ptx.asynchronous import INPUT_HAZARD
from tests.ptx.errors import NotModelled, PTXError
from tests.ptx.machine import Machine
from tests.ptx.matrices import expand
from tests.ptx.memory import GlobalMemory
from tests.ptx.parse import parse

# Each thread's place in the first and the second buffer, four bytes apart, and in shared memory.
PLACES = """
    mov.u32 %r0, %tid.x;
    shl.b32 %r1, %r0, 2;
    ld.param.b64 %rd0, [k_param_0];
    ld.param.b64 %rd1, [k_param_1];
    mad.wide.u32 %rd2, %r0, 4, %rd0;
    mad.wide.u32 %rd3, %r0, 4, %rd1;
"""


def execute(body: str, given: np.ndarray, threads: int = 32, shared: int = 1024, late: bool = False) -> tuple:
    """Run a kernel of one block over a buffer of words; another of the same size is what it may write to."""
    program = parse(f"""
        .visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1)
        .reqntid {threads}
        {{
            .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<99>; .reg .b64 %rd<19>;
            {PLACES}{body}
            ret;
        }}""")
    memory = GlobalMemory([given.view(np.uint8), np.full(4 * given.size, 0xFF, np.uint8)])
    addresses = [memory.address(0), memory.address(1)]
    machine = Machine(program, memory, addresses, np.zeros((1, 3), np.int64), (1, 1, 1), shared, late, 10_000)
    with np.errstate(all="ignore"):
        machine.run()
    return memory.contents(1).view(given.dtype).copy(), machine


def words(number: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1 << 32, number, dtype=np.uint32)


def test_bytes_are_permuted_as_in_inline_assembly():
    given = words()
    result, _ = execute(
        "ld.global.b32 %r2, [%rd2]; prmt.b32 %r3, %r2, 0x12345678, %r2; st.global.b32 [%rd3], %r3;", given
    )
    (expected,) = inline.execute("prmt.b32 $0, $1, 0x12345678, $1;", "=r,r", [given.view(np.int32)])
    assert (result == expected.view(np.uint32)).all()


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.s32 %r3, %r2, -5;", lambda x: x - np.uint32(5)),
        ("mul.hi.u32 %r3, %r2, 77;", lambda x: (x.astype(np.uint64) * 77 >> 32).astype(np.uint32)),
        ("shr.s32 %r3, %r2, 40;", lambda x: np.where(x >> 31, 0xFFFFFFFF, 0).astype(np.uint32)),
        ("shl.b32 %r3, %r2, 32;", lambda x: np.zeros_like(x)),
        ("bfe.s32 %r3, %r2, 3, 5;", lambda x: ((x << 24).view(np.int32) >> 27).view(np.uint32)),
        ("bfe.u32 %r3, %r2, 3, 5;", lambda x: x >> 3 & 31),
        ("div.s32 %r3, %r2, 7;", lambda x: np.trunc(x.view(np.int32) / 7).astype(np.int32).view(np.uint32)),
        ("rem.s32 %r3, %r2, 7;", lambda x: np.fmod(x.view(np.int32), 7).view(np.uint32)),
        ("cvt.s16.s8 %rs0, %rs1; cvt.s32.s16 %r3, %rs0;", None),
        ("shfl.sync.bfly.b32 %r3, %r2, 4, 31, -1;", lambda x: x[np.arange(32) ^ 4]),
        ("shfl.sync.idx.b32 %r3, %r2, 4, 31, -1;", lambda x: np.full_like(x, x[4])),
        ("setp.lt.s32 %p1, %r2, 0; selp.b32 %r3, 1, 2, %p1;", lambda x: np.where(x >> 31, 1, 2).astype(np.uint32)),
        ("mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r3, {%rs2, %rs1};", lambda x: x << 16 | x >> 16),
    ],
    ids=lambda each: each.split()[0] if isinstance(each, str) else "",
)
def test_arithmetic(instruction, expected):
    given = words()
    body = f"ld.global.b32 %r2, [%rd2]; cvt.u16.u32 %rs1, %r2; {instruction} st.global.b32 [%rd3], %r3;"
    expected = expected or (lambda x: (x << 24).view(np.int32).__rshift__(24).view(np.uint32))
    assert (execute(body, given)[0] == expected(given)).all()


def test_floats_are_rounded_to_the_nearest():
    given = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    body = "ld.global.b32 %r2, [%rd2]; cvt.rn.bf16x2.f32 %r3, %r2, 0f3F800000; st.global.b32 [%rd3], %r3;"
    result, _ = execute(body, given)
    bits = result.view(np.uint32)
    assert (bits & 0xFFFF == 0x3F80).all()
    upper = (bits & np.uint32(0xFFFF0000)).view(np.float32)
    assert (np.abs(upper - given) <= np.abs(given) * 2.0**-8).all()


def test_a_warp_multiplies_matrices():
    """Fragments as the PTX ISA draws them: row by row, of f16, and of the identity."""
    a = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float16)
    loads = []
    for r in range(4):  # row g + 8 (r % 2), columns 2 t + 8 (r / 2) and the next
        offset = 4 * (64 * (r % 2) + 4 * (r // 2))
        loads.append(f"ld.global.b32 %r{10 + r}, [%rd5+{offset}];")
    body = f"""
        shr.u32 %r2, %r0, 2; and.b32 %r3, %r0, 3; shl.b32 %r4, %r2, 3; add.s32 %r4, %r4, %r3;
        mad.wide.u32 %rd5, %r4, 4, %rd0; {" ".join(loads)}
        shl.b32 %r5, %r3, 1; setp.eq.s32 %p1, %r2, %r5; selp.b32 %r6, 0x3C00, 0, %p1;
        add.s32 %r5, %r5, 1; setp.eq.s32 %p1, %r2, %r5; selp.b32 %r7, 0x3C000000, 0, %p1; or.b32 %r20, %r6, %r7;
        mov.b32 %r21, 0; mov.b32 %r30, 0f3F800000;
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{%r40, %r41, %r42, %r43}}, {{%r10, %r11, %r12, %r13}},
            {{%r20, %r21}}, {{%r30, %r30, %r30, %r30}};
        shl.b32 %r8, %r2, 2; add.s32 %r8, %r8, %r3;
        mad.wide.u32 %rd6, %r8, 8, %rd1;
        st.global.v2.b32 [%rd6], {{%r40, %r41}}; st.global.v2.b32 [%rd6+256], {{%r42, %r43}};
    """
    result, _ = execute(body, a.reshape(-1).view(np.float32))
    expected = a[:, :8].astype(np.float32) + 1
    assert (result.view(np.float32).reshape(16, 8) == expected).all()


@pytest.mark.parametrize(
    ("body", "needed"),
    [
        # Read by another warp than has written.
        ("st.shared.b32 [%r1], %r0; bar.sync 0; ld.shared.b32 %r3, [%r2];", 1),
        ("st.shared.b32 [%r1], %r0; bar.sync 0; ld.shared.b32 %r3, [%r1];", 0),
        # The first of two orders it; overwritten by another than has read, by the same, and elsewhere.
        ("st.shared.b32 [%r1], %r0; bar.sync 0; bar.sync 0; ld.shared.b32 %r3, [%r2];", 0),
        ("st.shared.b32 [%r1], %r0; ld.shared.b32 %r3, [%r1]; bar.sync 0; st.shared.b32 [%r2], %r0;", 1),
        ("st.shared.b32 [%r1], %r0; ld.shared.b32 %r3, [%r1]; bar.sync 0; st.shared.b32 [%r1], %r0;", 0),
        ("st.shared.b32 [%r1], %r0; bar.sync 0; st.shared.b32 [%r2+256], %r0;", 0),
    ],
)
def test_barriers_that_order_what_no_other_does(body, needed):
    program = parse(f"""
        .visible .entry k() .reqntid 64
        {{
            .reg .b32 %r<9>;
            mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 2; xor.b32 %r2, %r1, 128; {body}
            ret;
        }}""")
    machine = Machine(program, GlobalMemory([]), [], np.zeros((1, 3), np.int64), (1, 1, 1), 1024, False, 1000)
    machine.shared.watch(together=32)
    machine.run()
    assert len(machine.shared.ordering.needed) == needed


def test_half_a_register_may_be_undefined_where_it_is_dropped():
    """LLVM puts words together of a half that it needs and one that nobody has written."""
    given = words()
    halves = "ld.global.b32 %r2, [%rd2]; mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r3, {%rs8, %rs1};"
    body = halves + "{use} st.global.b32 [%rd3], %r4;"
    result, _ = execute(body.replace("{use}", "shr.u32 %r4, %r3, 16;"), given)
    assert (result == given & 0xFFFF).all()
    for use in ("shr.u32 %r4, %r3, 15;", "mov.b32 %r4, %r3;", "mov.b32 %r3, {%rs1, %rs8}; shr.u32 %r4, %r3, 16;"):
        with pytest.raises(PTXError, match="used before it is written"):
            execute(body.replace("{use}", use), given)


@pytest.mark.parametrize("selector", [0, 1])
def test_sparse_values_are_put_where_their_metadata_says(selector):
    """mma.sp: two of every four columns; row g + 8 in the upper half of a word of thread 2s or 2s + 1 of four."""
    random = np.random.default_rng(0)
    full, stored = np.zeros((1, 16, 32), np.uint16), np.zeros((1, 16, 16), np.uint16)
    metadata = np.zeros((1, 32), np.uint32)
    for row in range(16):
        for quad in range(8):
            places = np.sort(random.permutation(4)[:2])
            for i, place in enumerate(places):
                stored[0, row, 2 * quad + i] = full[0, row, 4 * quad + place] = random.integers(1, 999)
            lane = 4 * (row % 8) + 2 * selector + quad // 4
            metadata[0, lane] |= int(places[0] | places[1] << 2) << (16 * (row // 8) + 4 * (quad % 4))
    assert (expand(stored, metadata, selector) == full).all()
    with pytest.raises(PTXError, match="not in order"):
        expand(stored, metadata * 0, selector)


SWAP = (
    "st.shared.b32 [%r1], %r0; {between} xor.b32 %r2, %r1, {far}; ld.shared.b32 %r3, [%r2]; st.global.b32 [%rd3], %r3;"
)


@pytest.mark.parametrize(
    ("threads", "between", "far", "fault"),
    [
        (32, "bar.warp.sync -1;", 4, None),
        (32, "", 4, "race"),
        (64, "bar.sync 0;", 128, None),
        (64, "bar.warp.sync -1;", 128, "race"),
        (64, "", 0, None),
        (64, "bar.sync 0;", 512, "before it is written"),
        (64, "bar.sync 0;", 4096, "out of bounds"),
    ],
)
def test_what_threads_tell_each_other_is_ordered(threads, between, far, fault):
    body = SWAP.format(between=between, far=far)
    if fault:
        with pytest.raises(PTXError, match=fault):
            execute(body, words(threads), threads)
    else:
        result, _ = execute(body, words(threads), threads)
        assert (result == (np.arange(threads) ^ far // 4)).all()


COPY = """
    cp.async.ca.shared.global [%r1], [%rd2], 4;
    {commit} {wait} ld.shared.b32 %r3, [%r1]; st.global.b32 [%rd3], %r3;
"""


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("commit", "wait", "fault"),
    [
        ("cp.async.commit_group;", "cp.async.wait_group 0;", None),
        ("cp.async.commit_group;", "cp.async.wait_group 1;", "while it is copied"),
        ("", "cp.async.wait_group 0;", "while it is copied"),
        ("", "cp.async.wait_all;", None),
        ("cp.async.commit_group;", "", "while it is copied"),
    ],
)
def test_copies_are_waited_for(late, commit, wait, fault):
    body = COPY.format(commit=commit, wait=wait)
    if fault:
        # A race, whether the bytes happen to be there or not; read before they have ever been written, even more so.
        with pytest.raises(PTXError, match=f"{fault}|before it is written"):
            execute(body, words(), late=late)
    else:
        assert (execute(body, words(), late=late)[0] == words()).all()


PRODUCT = """
    st.shared.v4.b32 [%r9], {{%r0, %r0, %r0, %r0}}; bar.sync 0; {fence}
    mov.b32 %r10, 0; mov.b32 %r11, 0; mov.b32 %r12, 0; mov.b32 %r13, 0;
    mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0;
    mov.pred %p1, 0; mov.b64 %rd9, 0x4000001000010000;
    {order}
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%r20, %r21, %r22, %r23}}, {{%r10, %r11, %r12, %r13}}, %rd9,
        %p1, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    {wait}
    mov.b32 %r10, %r20;
"""


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("fence", "order", "wait", "fault"),
    [
        ("fence.proxy.async;", "wgmma.fence.sync.aligned;", "wgmma.wait_group.sync.aligned 0;", None),
        ("", "wgmma.fence.sync.aligned;", "wgmma.wait_group.sync.aligned 0;", "fence.proxy.async"),
        ("fence.proxy.async;", "", "wgmma.wait_group.sync.aligned 0;", "since the last wgmma.fence"),
        ("fence.proxy.async;", "wgmma.fence.sync.aligned;", "wgmma.wait_group.sync.aligned 1;", "while wgmma adds"),
    ],
)
def test_products_of_warp_groups_are_fenced_and_waited_for(late, fence, order, wait, fault):
    body = "shl.b32 %r9, %r0, 4;" + PRODUCT.format(fence=fence, order=order, wait=wait)
    if fault:
        with pytest.raises(PTXError, match=fault):
            execute(body, words(128), 128, shared=2048, late=late)
    else:
        assert not execute(body, words(128), 128, shared=2048, late=late)[1].hazards


def test_registers_that_a_product_reads_are_noted_when_they_are_written():
    body = "shl.b32 %r9, %r0, 4;" + PRODUCT.format(
        fence="fence.proxy.async;", order="wgmma.fence.sync.aligned;", wait="mov.b32 %r10, 1;"
    ).replace("mov.b32 %r10, %r20;", "wgmma.wait_group.sync.aligned 0;")
    assert execute(body, words(128), 128, shared=2048)[1].hazards == {(INPUT_HAZARD, "%r10")}


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("ld.global.b32 %r2, [%rd2+4];", "load out of bounds"),
        ("ld.global.b32 %r2, [%rd2+2];", "misaligned"),
        ("st.global.b32 [%rd2+-4], %r0;", "store out of bounds"),
        ("ld.shared.v2.b32 {%r2, %r3}, [%r1];", "misaligned"),
        ("st.global.b32 [%rd3], %r7;", "used before it is written"),
        ("setp.lt.u32 %p1, %r0, 9; @%p1 mov.b32 %r7, 0; st.global.b32 [%rd3], %r7;", "used before it is written"),
        ("setp.lt.u32 %p1, %r7, 9; @%p1 st.global.b32 [%rd3], %r0;", "used before it is written"),
        ("st.global.b32 [%rd1], %r0;", "different values"),
        ("st.global.b32 [%rd3], %r0; xor.b32 %r2, %r0, 1; mad.wide.u32 %rd4, %r2, 4, %rd1; ld.global.b32 %r3, [%rd4];",
         "another thread"),
        ("setp.lt.u32 %p1, %r0, 9; @%p1 bar.warp.sync -1;", "not together"),
        ("setp.lt.u32 %p1, %r0, 9; @%p1 ret; bar.sync 0;", "not together"),
        ("$L: bra $L;", "on and on"),
        ("rem.u32 %r3, 7, %r0;", "division by zero"),
    ],
    ids=range(13),
)  # fmt: skip
def test_faults(body, fault):
    with pytest.raises(PTXError, match=fault):
        execute(body, words())


def test_threads_that_have_left_are_missed_at_a_barrier():
    with pytest.raises(PTXError, match="have left"):
        execute("setp.lt.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0;", words(64), 64)


@pytest.mark.parametrize(
    "instruction",
    [
        "add.sat.s32 %r2, %r0, 1;",
        "tcgen05.wait::ld.sync.aligned;",
        "bar.sync 1;",
        "ld.volatile.global.b32 %r2, [%rd2];",
    ],
)
def test_what_is_not_known_is_named(instruction):
    with pytest.raises(NotModelled, match=instruction.split()[0].rstrip(";").replace(".", "[.]")):
        execute(instruction, words())


def test_registers_of_inline_assembly_are_its_own():
    inner = "{ .reg .b32 key; mov.b32 key, 7; }"
    body = f"{{ .reg .b32 key; mov.b32 key, 5; {inner} mov.b32 %r2, key; }} st.global.b32 [%rd3], %r2;"
    assert (execute(body, words())[0] == 5).all()
