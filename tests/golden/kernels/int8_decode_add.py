@triton.jit
def triton_tem_fused_add_linear_0(arg_X, arg_VALUES, arg_METADATA, arg_COLUMNS, arg_SCALES, in_ptr5, in_ptr6, out_ptr1):
    V : tl.constexpr = 64
    N : tl.constexpr = 2
    M : tl.constexpr = 8
    O : tl.constexpr = 128
    K : tl.constexpr = 2048
    G : tl.constexpr = 256
    R : tl.constexpr = 128
    BLOCK_O : tl.constexpr = 16
    BLOCK_T : tl.constexpr = 1
    BLOCK_G : tl.constexpr = 128
    GROUP_T : tl.constexpr = 8
    SPLITS : tl.constexpr = 1
    SPLIT_G : tl.constexpr = 256
    EVEN_G : tl.constexpr = True
    EMPTY_ROUND : tl.constexpr = False
    TAIL : tl.constexpr = False
    DTYPE : tl.constexpr = tl.bfloat16
    WIDE : tl.constexpr = False
    COLUMN_BITS : tl.constexpr = 8
    PERMUTE_BYTES : tl.constexpr = True
    ALLOW_TF32 : tl.constexpr = False
    VALUES_STRIDE : tl.constexpr = 128
    VALUES_WIDTH : tl.constexpr = 128
    METADATA_STRIDE : tl.constexpr = 64
    METADATA_WIDTH : tl.constexpr = 64
    WORDS : tl.constexpr = tl.int32
    LEVEL_BITS : tl.constexpr = 8
    QUAD_WORDS : tl.constexpr = 2
    SCALE_GROUP : tl.constexpr = 64
    SCALES_STRIDE : tl.constexpr = 8
    SCALES_WIDTH : tl.constexpr = 8
    PARTS : tl.constexpr = 1
    INDEX_DTYPE : tl.constexpr = tl.int32
    X = arg_X
    VALUES = arg_VALUES
    METADATA = arg_METADATA
    COLUMNS = arg_COLUMNS
    SCALES = arg_SCALES

    # One program computes BLOCK_O rows of one block of the weight for one token, without tensor cores: there is one
    # column to multiply, so the activations are read as they lie, and nothing is brought into order before.
    T = 1
    token = tl.program_id(0).to(INDEX_DTYPE)  # and with it every index below
    tiles_o = (O + BLOCK_O - 1) // BLOCK_O
    tile_o = token % tiles_o
    token = token // tiles_o
    rows = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    x = X + token * 2048

    acc = row_products(x, VALUES, METADATA, COLUMNS, SCALES, rows, tile_o * BLOCK_O // V, G, K, M, VALUES_STRIDE, METADATA_STRIDE,
                       BLOCK_O, BLOCK_G)[:, None]

    idx_o = rows[:, None]
    idx_t = (token + tl.arange(0, BLOCK_T))[None, :]
    mask = (idx_o < O) & (idx_t < T)
    xindex = idx_o + 128*idx_t
    tmp0 = acc.to(tl.bfloat16)
    tmp1 = tmp0.to(tl.float32)
    tmp2 = tl.load(in_ptr5 + (tl.broadcast_to(xindex, [BLOCK_O, BLOCK_T])), mask, eviction_policy='evict_last').to(tl.float32)
    tmp4 = tl.load(in_ptr6 + (tl.broadcast_to(xindex, [BLOCK_O, BLOCK_T])), mask, eviction_policy='evict_last').to(tl.float32)
    tmp3 = tmp1 + tmp2
    tmp5 = tmp3 + tmp4
    tl.store(out_ptr1 + (tl.broadcast_to(xindex, [BLOCK_O, BLOCK_T])), tmp5, mask)


# What the kernels for one token share. A block's kept columns are the same for all its rows, so a thread loads the four
# activations of a group once and uses them for every row that it has: a word of values (two of them) picks its two by a
# permutation of bytes. Threads of a warp lie along a row, four groups each; what they have summed is added up at the end.

@triton.jit
def row_products(x, values, metadata, columns, scales, rows, block, groups: tl.constexpr, in_features: tl.constexpr,
                 M: tl.constexpr, values_stride: tl.constexpr, metadata_stride: tl.constexpr,
                 BLOCK_O: tl.constexpr, BLOCK_G: tl.constexpr):
    """Products of rows of the weight and one token's activations: [BLOCK_O]."""
    quads: tl.constexpr = BLOCK_G // 4
    values = values.to(tl.pointer_type(tl.int32), bitcast=True) + rows[:, None] * values_stride
    metadata = metadata.to(tl.pointer_type(tl.uint16), bitcast=True) + rows[:, None] * metadata_stride
    columns = columns.to(tl.pointer_type(tl.int32), bitcast=True) + block * groups
    x = x.to(tl.pointer_type(tl.int16), bitcast=True)
    acc = tl.zeros([BLOCK_O, quads], dtype=tl.float32)
    for group in range(0, groups, BLOCK_G):
        quad = group // 4 + tl.arange(0, quads)
        # One element a thread, as the words below have one quad a thread: a wider load would have to change threads.
        code = tl.load(metadata + tl.multiple_of(quad, 1)[None, :]).to(tl.int32)
        word = group // 4 * 2 + tl.arange(0, quads * 2)
        words = tl.load(values + tl.multiple_of(word, 2)[None, :])
        first, second = tl.split(tl.reshape(words, [BLOCK_O, quads, 2]))
        l0, l1, l2, l3, l4, l5, l6, l7 = levels(first, second)
        a0, b0 = kept_activations(x, columns, 4 * quad, groups, in_features, M)
        a1, b1 = kept_activations(x, columns, 4 * quad + 1, groups, in_features, M)
        a2, b2 = kept_activations(x, columns, 4 * quad + 2, groups, in_features, M)
        a3, b3 = kept_activations(x, columns, 4 * quad + 3, groups, in_features, M)
        x0, x1, x2, x3 = pick_quad(code, a0, b0, a1, b1, a2, b2, a3, b3)
        products = tl.zeros([BLOCK_O, quads], dtype=tl.float32)
        products += l0 * low_half(x0)
        products += l1 * high_half(x0)
        products += l2 * low_half(x1)
        products += l3 * high_half(x1)
        products += l4 * low_half(x2)
        products += l5 * high_half(x2)
        products += l6 * low_half(x3)
        products += l7 * high_half(x3)
        which = quad // 8
        scale = tl.load(scales + rows[:, None] * 8 + which[None, :])
        acc += products * scale.to(tl.float32)
    return tl.sum(acc, 1)


@triton.jit
def kept_activations(x, columns, group, groups: tl.constexpr, in_features: tl.constexpr, M: tl.constexpr):
    """The four activations of each group, in two words: [1, groups] each. Those past the last feature are zeros."""
    # One load brings the four columns of a group.
    four = tl.load(columns + group)

    column = group * M + ((four >> 0) & 255).to(tl.int32)
    x0 = tl.load(x + column).to(tl.int32)

    column = group * M + ((four >> 8) & 255).to(tl.int32)
    x1 = tl.load(x + column).to(tl.int32)

    column = group * M + ((four >> 16) & 255).to(tl.int32)
    x2 = tl.load(x + column).to(tl.int32)

    column = group * M + ((four >> 24) & 255).to(tl.int32)
    x3 = tl.load(x + column).to(tl.int32)

    return ((x0 & 0xFFFF) | (x1 << 16))[None, :], ((x2 & 0xFFFF) | (x3 << 16))[None, :]


@triton.jit
def pick_quad(code, a0, b0, a1, b1, a2, b2, a3, b3):
    """For the four words of a quad the two activations that its values multiply, of four each: a the first two, b the
    others.

    code ^ code >> 1 tells the six pairs of indices apart in three bits. They select from a table of eight bytes which
    two bytes the first index means, and from another which the second.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 key, first, second, how;
        shr.u32 key, $4, 1;
        xor.b32 key, key, $4;
        and.b32 key, key, 0x7777;
        prmt.b32 first, 0x32105400, 0x00103210, key;
        prmt.b32 second, 0x76767600, 0x00325454, key;
        prmt.b32 how, first, second, 0x40;
        prmt.b32 $0, $5, $6, how;
        prmt.b32 how, first, second, 0x51;
        prmt.b32 $1, $7, $8, how;
        prmt.b32 how, first, second, 0x62;
        prmt.b32 $2, $9, $10, how;
        prmt.b32 how, first, second, 0x73;
        prmt.b32 $3, $11, $12, how;
        }""",
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
        [code, a0, b0, a1, b1, a2, b2, a3, b3],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )



@triton.jit
def low_half(word):
    """The value in the lower 16 bits of a word: bf16 is the upper half of an fp32."""
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def high_half(word):
    """The value in the upper 16 bits of a word."""
    return (word & -65536).to(tl.float32, bitcast=True)



# Quantised values. The 8 levels of a quad lie in 2 words, and share a scale. No level is converted: with its
# sign bit inverted it counts from the lowest one, and below the exponent of a float whose last bit is worth 1 it is that
# float's fraction. What the exponent adds is subtracted; all of it is exact.

@triton.jit
def levels(first, second):
    """The levels of a quad as fp32: a0, b0, a1, b1, a2, b2, a3, b3."""
    first = first.to(tl.int32) ^ -2139062144
    a0 = (first & 255 | 1258291200).to(tl.float32, bitcast=True) - 8388736.0
    b0 = (first & 65280 | 1191182336).to(tl.float32, bitcast=True) - 32896.0
    a1 = ((first >> 16) & 255 | 1258291200).to(tl.float32, bitcast=True) - 8388736.0
    b1 = ((first >> 16) & 65280 | 1191182336).to(tl.float32, bitcast=True) - 32896.0
    second = second.to(tl.int32) ^ -2139062144
    a2 = (second & 255 | 1258291200).to(tl.float32, bitcast=True) - 8388736.0
    b2 = (second & 65280 | 1191182336).to(tl.float32, bitcast=True) - 32896.0
    a3 = ((second >> 16) & 255 | 1258291200).to(tl.float32, bitcast=True) - 8388736.0
    b3 = ((second >> 16) & 65280 | 1191182336).to(tl.float32, bitcast=True) - 32896.0
    return a0, b0, a1, b1, a2, b2, a3, b3
