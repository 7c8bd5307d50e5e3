@gluon.jit
def spread(x, shape: gl.constexpr):  # type: ignore[no-untyped-def]
    """A scalar or a block as a block of a shape."""
    if x.type.is_block():  # noqa: SIM108 (Gluon would compile both)
        result = x.broadcast_to(shape)
    else:
        result = gl.full(shape, x, x.dtype)
    return result


@gluon.jit
def maximum(a, b):  # type: ignore[no-untyped-def]
    """The larger; NaN where one is."""
    return gl.where((a > b) | (a != a), a, b)


@gluon.jit
def minimum(a, b):  # type: ignore[no-untyped-def]
    """The smaller; NaN where one is."""
    return gl.where((a < b) | (a != a), a, b)


def source_of(cls, fn=None, *args, **kwargs):  # type: ignore[no-untyped-def]
    """Make the source of a Gluon kernel where somebody makes one of a Triton kernel."""
    return object.__new__(GluonASTSource if cls is ASTSource and fn is not None and fn.is_gluon() else cls)


if ASTSource.__new__ is object.__new__:
    ASTSource.__new__ = source_of  # type: ignore[method-assign, assignment]

@triton_heuristics.template(

num_stages=3,
num_warps=1,
triton_meta={'enable_fp_fusion': True, 'signature': {'arg_X': '*bf16', 'arg_VALUES': '*bf16', 'arg_METADATA': '*u8', 'arg_COLUMNS': '*u8', 'in_ptr4': '*bf16', 'out_ptr1': '*bf16'}, 'device': DeviceProperties(type='cuda', index=0, multi_processor_count=108, cc=80, major=8, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32), 'constants': {}, 'configs': [{(0,): [['tt.divisibility', 16]], (1,): [['tt.divisibility', 16]], (2,): [['tt.divisibility', 16]], (3,): [['tt.divisibility', 16]], (4,): [['tt.divisibility', 16]], (5,): [['tt.divisibility', 16]]}]},
inductor_meta={'kernel_name': 'triton_tem_fused_add_gelu_linear_1', 'backend_hash': '8E8BAF4C42480F9CEE9D62A35E43AE470FDD23C56A78BF59E02EECEE60E59743', 'assert_indirect_indexing': True, 'autotune_local_cache': True, 'autotune_pointwise': True, 'autotune_remote_cache': None, 'force_disable_caches': False, 'dynamic_scale_rblock': True, 'incremental_autotune': False, 'max_autotune': False, 'max_autotune_pointwise': False, 'min_split_scan_rblock': 256, 'spill_threshold': 16, 'store_cubin': False, 'deterministic': False, 'batch_invariant': False, 'force_filter_reduction_configs': False, 'mix_order_reduction_allow_multi_stages': True, 'dynamic_disable_pipelining': True, 'are_deterministic_algorithms_enabled': False, 'grid_type': 'FixedGrid', 'fixed_grid': ['_grid_0', '_grid_1', '_grid_2'], 'extra_launcher_args': ['_grid_0', '_grid_1', '_grid_2'], 'config_args': {'V': 64, 'N': 2, 'M': 8, 'O': 128, 'K': 1000, 'G': 125, 'R': 128, 'BLOCK_O': 16, 'BLOCK_T': 32, 'BLOCK_G': 32, 'GROUP_T': 8, 'SPLITS': 1, 'SPLIT_G': 128, 'EVEN_G': False, 'EMPTY_ROUND': False, 'TAIL': False, 'DTYPE': 'gl.bfloat16', 'WIDE': False, 'COLUMN_BITS': 8, 'PERMUTE_BYTES': True, 'ALLOW_TF32': False, 'VALUES_STRIDE': 256, 'VALUES_WIDTH': 256, 'METADATA_STRIDE': 32, 'METADATA_WIDTH': 32, 'WORDS': 'tl.int32', 'PARTS': 1, 'WARPS_O': 1, 'WARPS_T': 1, 'STAGES': 3, 'METADATA_COPY': 4}},

)
@gluon.jit
def triton_tem_fused_add_gelu_linear_1(arg_X, arg_VALUES, arg_METADATA, arg_COLUMNS, in_ptr4, out_ptr1):
    V : tl.constexpr = 64
    N : tl.constexpr = 2
    M : tl.constexpr = 8
    O : tl.constexpr = 128
    K : tl.constexpr = 1000
    G : tl.constexpr = 125
    R : tl.constexpr = 128
    BLOCK_O : tl.constexpr = 16
    BLOCK_T : tl.constexpr = 32
    BLOCK_G : tl.constexpr = 32
    GROUP_T : tl.constexpr = 8
    SPLITS : tl.constexpr = 1
    SPLIT_G : tl.constexpr = 128
    EVEN_G : tl.constexpr = False
    EMPTY_ROUND : tl.constexpr = False
    TAIL : tl.constexpr = False
    DTYPE : tl.constexpr = gl.bfloat16
    WIDE : tl.constexpr = False
    COLUMN_BITS : tl.constexpr = 8
    PERMUTE_BYTES : tl.constexpr = True
    ALLOW_TF32 : tl.constexpr = False
    VALUES_STRIDE : tl.constexpr = 256
    VALUES_WIDTH : tl.constexpr = 256
    METADATA_STRIDE : tl.constexpr = 32
    METADATA_WIDTH : tl.constexpr = 32
    WORDS : tl.constexpr = tl.int32
    PARTS : tl.constexpr = 1
    WARPS_O : tl.constexpr = 1
    WARPS_T : tl.constexpr = 1
    STAGES : tl.constexpr = 3
    METADATA_COPY : tl.constexpr = 4
    INDEX_DTYPE : tl.constexpr = tl.int32
    X = arg_X
    VALUES = arg_VALUES
    METADATA = arg_METADATA
    COLUMNS = arg_COLUMNS

    # One program computes BLOCK_O rows of one block of the weight for BLOCK_T tokens, on sparse tensor cores:
    #
    #              groups, BLOCK_G at a time                       tokens
    #            +---------------+                              +-----------+
    #    BLOCK_O | values        |  fragments as they lie       |  y        | BLOCK_O
    #            | metadata      |          |                   +-----------+
    #            +---------------+          v                        ^
    #      kept  +---------------+    [BLOCK_O, 2 of 4 BLOCK_G] @ [4 BLOCK_G, BLOCK_T]
    #   columns  | 4 per group   |                                   ^
    #            +---------------+ --- which rows of x^T to load ----+
    #
    # All three come through a ring of STAGES tiles in shared memory, by asynchronous copies.
    T = 200
    stride_x = 200  # tokens, rounded up so that rows are aligned

    # Programs next to each other share rows of the weight or tokens, so that caches hold what they read.
    pid = gl.program_id(0).to(INDEX_DTYPE)  # and with it every index below
    tiles_o = (O + BLOCK_O - 1) // BLOCK_O
    tiles_t = (T + BLOCK_T - 1) // BLOCK_T
    width = GROUP_T * tiles_o
    first_t = (pid // width) * GROUP_T
    many_t = min(tiles_t - first_t, GROUP_T)
    tile_t = first_t + (pid % width) % many_t
    tile_o = (pid % width) // many_t

    begin = 0
    end = G

    rounds = (end - begin + BLOCK_G - 1) // BLOCK_G
    MOST_ROUNDS: gl.constexpr = (SPLIT_G + BLOCK_G - 1) // BLOCK_G

    # What a thread copies: 8 tokens of four rows of x, the kept columns of a group; 8 values; 4 words of metadata.
    WARPS: gl.constexpr = WARPS_O * WARPS_T
    X_THREADS: gl.constexpr = min(BLOCK_T // 8, 32)
    x_copy: gl.constexpr = gl.BlockedLayout([4, 8], [32 // X_THREADS, X_THREADS], [WARPS, 1], [1, 0])
    WIDTH: gl.constexpr = N * BLOCK_G  # values of a row
    QUADS: gl.constexpr = WIDTH // 8  # of a row: 16 bits of metadata, for 8 values
    values_copy: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [WARPS, 1], [1, 0])
    QUAD_THREADS: gl.constexpr = QUADS // METADATA_COPY
    metadata_copy: gl.constexpr = gl.BlockedLayout([1, METADATA_COPY], [32 // QUAD_THREADS, QUAD_THREADS], [WARPS, 1], [1, 0])
    # Chunks of 16 bytes are swizzled, so that what ldmatrix reads at once lies in different banks.
    x_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 4 * BLOCK_G, BLOCK_T], swizzled(2 * BLOCK_T))
    values_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_O, WIDTH], swizzled(2 * WIDTH))
    metadata_ring = gl.allocate_shared_memory(gl.int16, [STAGES, BLOCK_O, QUADS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))

    term = gl.arange(0, 4 * BLOCK_G, layout=gl.SliceLayout(1, x_copy))
    tokens = tile_t * BLOCK_T + gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, x_copy))
    columns = COLUMNS + tile_o * BLOCK_O // V * G * 4
    rows = tile_o * BLOCK_O + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, values_copy))
    value = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, values_copy))
    values = VALUES + rows[:, None] * VALUES_STRIDE + value[None, :]
    rows = tile_o * BLOCK_O + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, metadata_copy))
    quad = gl.arange(0, QUADS, layout=gl.SliceLayout(0, metadata_copy))
    metadata = METADATA.to(gl.pointer_type(gl.int16), bitcast=True) + rows[:, None] * METADATA_STRIDE + quad[None, :]

    column = kept_columns(columns, term, begin, G, M)
    for first in gl.static_range(STAGES - 1):
        if first < MOST_ROUNDS:
            group = begin + first * BLOCK_G
            copy_tiles(x_ring, values_ring, metadata_ring, first, X, values, metadata, value, quad, column, group, tokens,
                       stride_x, K)
            column = kept_columns(columns, term, group + BLOCK_G, G, M)
        async_copy.commit_group()

    accumulators: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS_O, WARPS_T], instr_shape=[16, 8])
    acc = gl.full([BLOCK_O, BLOCK_T], 0.0, gl.float32, layout=accumulators)
    slot = 0
    free = STAGES - 1
    for ahead in range(STAGES - 1, rounds + STAGES - 1):
        async_copy.wait_group(STAGES - 2)
        barrier()
        acc = multiply(acc, values_ring.index(slot), metadata_ring.index(slot), x_ring.index(slot), accumulators,
                       BLOCK_O, BLOCK_T, BLOCK_G, WARPS_O, WARPS_T)
        if ahead < rounds:
            group = begin + ahead * BLOCK_G
            copy_tiles(x_ring, values_ring, metadata_ring, free, X, values, metadata, value, quad, column, group,
                       tokens, stride_x, K)
            column = kept_columns(columns, term, group + BLOCK_G, G, M)
        async_copy.commit_group()
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
        free = gl.where(free == STAGES - 1, 0, free + 1)

    # A thread stores 8 features of a token.
    O_THREADS: gl.constexpr = min(BLOCK_O // 8, 8)
    stored: gl.constexpr = gl.BlockedLayout([8, 1], [O_THREADS, 32 // O_THREADS], [1, WARPS], [0, 1])
    acc = gl.convert_layout(acc, stored)
    idx_o = (tile_o * BLOCK_O + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, stored)))[:, None]
    idx_t = (tile_t * BLOCK_T + gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, stored)))[None, :]
    mask = (idx_o < O) & (idx_t < T)

    xindex = idx_o + 128*idx_t
    tmp0 = acc.to(tl.bfloat16)
    tmp1 = tmp0.to(tl.float32)
    tmp2 = tl.load(in_ptr4 + (spread(idx_o, [BLOCK_O, BLOCK_T])), mask, eviction_policy='evict_last').to(tl.float32)
    tmp3 = tmp1 + tmp2
    tmp4 = tmp3.to(tl.float32)
    tmp5 = gl.full([], 0.5, tl.float32)
    tmp6 = tmp4 * tmp5
    tmp7 = gl.full([], 0.7071067811865476, tl.float32)
    tmp8 = tmp4 * tmp7
    tmp9 = libdevice.erf(tmp8)
    tmp10 = gl.full([], 1.0, tl.float32)
    tmp11 = tmp9 + tmp10
    tmp12 = tmp6 * tmp11
    tmp13 = tmp12.to(tl.float32)
    tl.store(out_ptr1 + (spread(idx_o + 128*idx_t, [BLOCK_O, BLOCK_T])), tmp13, mask)



@gluon.jit
def kept_columns(columns, term, group, groups: gl.constexpr, M: gl.constexpr):
    """The features that the kept columns of BLOCK_G groups stand for."""
    of_group = group + term // 4
    place = group * 4 + term
    offset = gl.load(columns + place, mask=of_group < groups, other=0)
    return of_group * M + offset.to(gl.int32)


@gluon.jit
def copy_tiles(x_ring, values_ring, metadata_ring, stage, x, values, metadata, value, quad, column, group, tokens, stride,
               in_features: gl.constexpr):
    """Begin to copy what a round multiplies: kept rows of x^T, values and metadata."""
    # Tokens past the last lie in the padding of the rows: they are read, never stored.
    inside = (tokens < stride)[None, :]
    # Terms past the last group, and columns of the last group past the last feature, are zeros.
    inside = inside & (column < in_features)[:, None]
    # In the width of the tokens: a feature times a row's length may be beyond 32 bits where neither factor is.
    begin_copy(x_ring.index(stage), x + column[:, None].to(tokens.dtype) * stride + tokens[None, :], mask=inside)
    begin_copy(values_ring.index(stage), values + group * 2, mask=(value + group * 2 < 256)[None, :])
    begin_copy(metadata_ring.index(stage), metadata + group // 4, mask=(quad + group // 4 < 32)[None, :])


# Products of a warp on sparse tensor cores (PTX ISA, mma.sp.m16n8k32): lane 4 g + t of a warp holds
#
#    A  registers 0 to 3: the words t (rows g, g + 8) and t + 4 (rows g, g + 8) of eight; a word is the values of a group
#    E  the indices of four groups, of rows g and g + 8: for the first product of two those of quad t in lanes 0 and 1,
#       for the second in lanes 2 and 3
#    B  registers 0 to 3: terms 2 t and 2 t + 1 of each eight, of token g
#    C  registers 0 to 3: tokens 2 t and 2 t + 1 of rows g and g + 8
#
# A row's values and metadata lie in memory in this very order, so nothing is brought into another: ldmatrix loads A, and a
# lane's two quads of metadata become one word.

@gluon.jit
def multiply(acc, values, metadata, x, accumulators: gl.constexpr, BLOCK_O: gl.constexpr, BLOCK_T: gl.constexpr,
             BLOCK_G: gl.constexpr, WARPS_O: gl.constexpr, WARPS_T: gl.constexpr):
    """`acc` and the product of a round's tiles, 16 groups at a time."""
    of_values: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=accumulators, k_width=2)
    of_x: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=accumulators, k_width=2)
    for chunk in gl.static_range(BLOCK_G // 16):
        # [rows, product, half, t, of a word] to [rows, t, half, product, of a word]
        a = values.slice(32 * chunk, 32, dim=1).load(of_values)
        a = gl.permute(gl.reshape(a, [BLOCK_O, 2, 2, 4, 2]), [0, 3, 2, 1, 4])
        first_a, second_a = gl.split(words(a))
        e = indices(metadata.slice(4 * chunk, 4, dim=1), BLOCK_O, WARPS_O, WARPS_T)
        # [product, register / 2, register % 2, t, of a word, tokens / 8, g] to [register / 2, g, tokens / 8, t, register % 2, ...]
        b = x.slice(64 * chunk, 64, dim=0).load(of_x)
        b = gl.permute(gl.reshape(b, [2, 2, 2, 4, 2, BLOCK_T // 8, 8]), [1, 6, 5, 3, 2, 0, 4])
        first_b, second_b = gl.split(words(b))
        acc = gl.inline_asm_elementwise(
            """
            mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$8,$10,$9,$11}, {$16,$17,$18,$19}, {$4,$5,$6,$7}, $24, 0x0;
            mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$12,$14,$13,$15}, {$20,$21,$22,$23}, {$0,$1,$2,$3}, $24, 0x1;
            """,
            "=&f,=&f,=&f,=&f,f,f,f,f,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [acc, over_tokens(first_a, accumulators, BLOCK_O, BLOCK_T, WARPS_O, WARPS_T),
             over_tokens(second_a, accumulators, BLOCK_O, BLOCK_T, WARPS_O, WARPS_T),
             over_rows(first_b, accumulators, BLOCK_O, BLOCK_T, WARPS_O, WARPS_T),
             over_rows(second_b, accumulators, BLOCK_O, BLOCK_T, WARPS_O, WARPS_T),
             over_elements(e, accumulators, BLOCK_O, BLOCK_T, WARPS_O, WARPS_T)],
            dtype=gl.float32,
            is_pure=True,
            pack=4,
        )
    return acc


@gluon.jit
def words(pairs):
    """Words of two 16-bit elements each, the first in the lower half."""
    low, high = gl.split(pairs)
    return (low.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF) | (high.to(gl.int16, bitcast=True).to(gl.int32) << 16)



@gluon.jit
def indices(metadata, BLOCK_O: gl.constexpr, WARPS_O: gl.constexpr, WARPS_T: gl.constexpr):
    """A lane's indices: [BLOCK_O / 16, g, t], of quad t of row g in the lower half, of row g + 8 in the upper."""
    both = of_two_rows(metadata.load(of_metadata(BLOCK_O, WARPS_O, WARPS_T)), BLOCK_O)
    # A group that is not there has the indices 0 and 0; tensor cores want them in order: 0 and 1.
    both = both | (~(both | (both >> 1)) & 0x44444444)
    return both


@gluon.jit
def of_two_rows(quads, BLOCK_O: gl.constexpr):
    """Words [BLOCK_O / 16, g, t] of quads of 16 bits: row g's in the lower half, row g + 8's in the upper."""
    low, high = gl.split(gl.permute(gl.reshape(quads.to(gl.int32), [BLOCK_O // 16, 2, 8, 4]), [0, 2, 3, 1]))
    return (low & 0xFFFF) | (high << 16)


# How an operand's words are spread over [BLOCK_O, BLOCK_T], so that a lane finds them beside its accumulators.

@gluon.jit
def over_tokens(a, accumulators: gl.constexpr, BLOCK_O: gl.constexpr, BLOCK_T: gl.constexpr,
                WARPS_O: gl.constexpr, WARPS_T: gl.constexpr):
    """A's words [BLOCK_O, t, half]: half 0 beside even tokens, 1 beside odd ones."""
    layout: gl.constexpr = of_tiles_of_tokens(BLOCK_O, BLOCK_T, WARPS_O, WARPS_T)
    a = gl.convert_layout(gl.reshape(a, [BLOCK_O, 8]), gl.SliceLayout(1, layout), assert_trivial=True)
    a = gl.expand_dims(a, 1).broadcast_to([BLOCK_O, BLOCK_T // 8, 8])
    return gl.convert_layout(gl.reshape(a, [BLOCK_O, BLOCK_T]), accumulators, assert_trivial=True)


@gluon.jit
def over_rows(b, accumulators: gl.constexpr, BLOCK_O: gl.constexpr, BLOCK_T: gl.constexpr,
              WARPS_O: gl.constexpr, WARPS_T: gl.constexpr):
    """B's words [register / 2, g, BLOCK_T / 8, t, register % 2]: registers 0 and 1 beside rows g, 2 and 3 beside g + 8."""
    layout: gl.constexpr = of_tiles_of_rows(BLOCK_O, BLOCK_T, WARPS_O, WARPS_T)
    b = gl.convert_layout(gl.reshape(b, [16, BLOCK_T]), gl.SliceLayout(0, layout), assert_trivial=True)
    b = gl.expand_dims(b, 0).broadcast_to([BLOCK_O // 16, 16, BLOCK_T])
    return gl.convert_layout(gl.reshape(b, [BLOCK_O, BLOCK_T]), accumulators, assert_trivial=True)


@gluon.jit
def over_elements(e, accumulators: gl.constexpr, BLOCK_O: gl.constexpr, BLOCK_T: gl.constexpr,
                  WARPS_O: gl.constexpr, WARPS_T: gl.constexpr):
    """Metadata [BLOCK_O / 16, g, t] beside all accumulators of a lane."""
    layout: gl.constexpr = of_elements(BLOCK_O, BLOCK_T, WARPS_O, WARPS_T)
    e = gl.convert_layout(e, gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(5, layout))), assert_trivial=True)
    e = gl.expand_dims(gl.expand_dims(gl.expand_dims(e, 1), 3), 5)
    e = gl.reshape(e.broadcast_to([BLOCK_O // 16, 2, 8, BLOCK_T // 8, 4, 2]), [BLOCK_O, BLOCK_T])
    return gl.convert_layout(e, accumulators, assert_trivial=True)


# Layouts as bases: where the next element of a thread, of a lane, of a warp lies.

@gluon.constexpr_function
def swizzled(row_bytes):
    """Of rows in a ring: eight that follow each other have their chunks of 16 bytes in different places."""
    chunks = min(8, row_bytes // 16)
    return gl.SwizzledSharedLayout(vec=8, per_phase=8 // chunks, max_phase=chunks, order=[1, 0])


@gluon.constexpr_function
def steps(count, first, dim, rank):
    """Bases of `count` things in dimension `dim`, `first` apart."""
    return [[(first << i) * (d == dim) for d in range(rank)] for i in range(count.bit_length() - 1)]



@gluon.constexpr_function
def of_metadata(rows, warps_o, warps_t):
    """[rows, 4]: quad t of rows g and g + 8."""
    registers = [[8, 0], *steps(rows // 16 // warps_o, 16 * warps_o, 0, 2)]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    warps = [*[[0, 0]] * (warps_t.bit_length() - 1), *steps(warps_o, 16, 0, 2)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [rows, 4])


@gluon.constexpr_function
def of_tiles_of_tokens(rows, tokens, warps_o, warps_t):
    """The accumulators as [rows, tokens / 8, 8]."""
    registers = [[0, 0, 1], [8, 0, 0], *steps(tokens // 8 // warps_t, warps_t, 1, 3)]
    registers += steps(rows // 16 // warps_o, 16 * warps_o, 0, 3)
    lanes = [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    warps = [*steps(warps_t, 1, 1, 3), *steps(warps_o, 16, 0, 3)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [rows, tokens // 8, 8])


@gluon.constexpr_function
def of_tiles_of_rows(rows, tokens, warps_o, warps_t):
    """The accumulators as [rows / 16, 16, tokens]."""
    registers = [[0, 0, 1], [0, 8, 0], *steps(tokens // 8 // warps_t, 8 * warps_t, 2, 3)]
    registers += steps(rows // 16 // warps_o, warps_o, 0, 3)
    lanes = [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    warps = [*steps(warps_t, 8, 2, 3), *steps(warps_o, 1, 0, 3)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [rows // 16, 16, tokens])


@gluon.constexpr_function
def of_elements(rows, tokens, warps_o, warps_t):
    """The accumulators as [rows / 16, 2, 8, tokens / 8, 4, 2]."""
    registers = [[0, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0], *steps(tokens // 8 // warps_t, warps_t, 3, 6)]
    registers += steps(rows // 16 // warps_o, warps_o, 0, 6)
    lanes = [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 2, 0], [0, 0, 1, 0, 0, 0], [0, 0, 2, 0, 0, 0], [0, 0, 4, 0, 0, 0]]
    warps = [*steps(warps_t, 1, 3, 6), *steps(warps_o, 1, 0, 6)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [rows // 16, 2, 8, tokens // 8, 4, 2])
