@triton.jit
def triton_tem_fused_add_gelu_linear_1(arg_X, arg_VALUES, arg_METADATA, arg_COLUMNS, in_ptr4, out_ptr1):
    V : tl.constexpr = 128
    N : tl.constexpr = 2
    M : tl.constexpr = 16
    O : tl.constexpr = 256
    K : tl.constexpr = 512
    G : tl.constexpr = 32
    R : tl.constexpr = 256
    BLOCK_O : tl.constexpr = 64
    BLOCK_T : tl.constexpr = 32
    BLOCK_G : tl.constexpr = 16
    GROUP_T : tl.constexpr = 8
    SPLITS : tl.constexpr = 1
    SPLIT_G : tl.constexpr = 32
    EVEN_G : tl.constexpr = True
    EMPTY_ROUND : tl.constexpr = False
    TAIL : tl.constexpr = False
    DTYPE : tl.constexpr = tl.bfloat16
    WIDE : tl.constexpr = False
    COLUMN_BITS : tl.constexpr = 8
    PERMUTE_BYTES : tl.constexpr = True
    ALLOW_TF32 : tl.constexpr = False
    VALUES_STRIDE : tl.constexpr = 32
    VALUES_WIDTH : tl.constexpr = 32
    METADATA_STRIDE : tl.constexpr = 8
    METADATA_WIDTH : tl.constexpr = 8
    WORDS : tl.constexpr = tl.int32
    PARTS : tl.constexpr = 1
    INDEX_DTYPE : tl.constexpr = tl.int32
    X = arg_X
    VALUES = arg_VALUES
    METADATA = arg_METADATA
    COLUMNS = arg_COLUMNS

    # One program computes BLOCK_O rows of one block of the weight for BLOCK_T tokens:
    #
    #              groups, BLOCK_G at a time                       tokens
    #            +---------------+                              +-----------+
    #    BLOCK_O | values        |  words from memory           |  y        | BLOCK_O
    #            | metadata      |  expand in registers         |           |
    #            +---------------+          |                   +-----------+
    #                                       v                        ^
    #      kept  +---------------+    [BLOCK_O, 4 BLOCK_G]  @  [4 BLOCK_G, BLOCK_T]
    #   columns  | 4 per group   |                                   ^
    #            +---------------+ --- which rows of x^T to load ----+
    T = 300
    stride_x = 304  # tokens, rounded up so that rows are aligned

    # Programs next to each other share rows of the weight or tokens, so that caches hold what they read.
    pid = tl.program_id(0).to(INDEX_DTYPE)  # and with it every index below
    tiles_o = (O + BLOCK_O - 1) // BLOCK_O
    tiles_t = (T + BLOCK_T - 1) // BLOCK_T
    width = GROUP_T * tiles_o
    first_t = (pid // width) * GROUP_T
    many_t = min(tiles_t - first_t, GROUP_T)
    tile_t = first_t + (pid % width) % many_t
    tile_o = (pid % width) // many_t

    begin = 0
    end = G


    rows = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    tokens = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    block = tile_o * BLOCK_O // V
    values = VALUES.to(tl.pointer_type(tl.int32), bitcast=True)
    metadata = METADATA.to(tl.pointer_type(tl.uint16), bitcast=True)
    columns = COLUMNS.to(tl.pointer_type(tl.int32), bitcast=True)

    acc = tl.zeros([BLOCK_O, BLOCK_T], dtype=tl.float32)
    for group in range(begin, end, BLOCK_G):
        w = weight_tile(values, metadata, rows, group, VALUES_STRIDE, METADATA_STRIDE, BLOCK_O, BLOCK_G)
        x = activation_tile(X, columns, block, group, tokens, stride_x, G, K, M, BLOCK_G)
        acc = tl.dot(w, x, acc, allow_tf32=ALLOW_TF32)

    idx_o = rows[:, None]
    idx_t = tokens[None, :]
    mask = (idx_o < O) & (idx_t < T)

    xindex = idx_o + 256*idx_t
    tmp0 = acc.to(tl.bfloat16)
    tmp1 = tmp0.to(tl.float32)
    tmp2 = tl.load(in_ptr4 + (tl.broadcast_to(idx_o, [BLOCK_O, BLOCK_T])), mask, eviction_policy='evict_last').to(tl.float32)
    tmp3 = tmp1 + tmp2
    tmp4 = tmp3.to(tl.float32)
    tmp5 = tl.full([1], 0.5, tl.float32)
    tmp6 = tmp4 * tmp5
    tmp7 = tl.full([1], 0.7071067811865476, tl.float32)
    tmp8 = tmp4 * tmp7
    tmp9 = libdevice.erf(tmp8)
    tmp10 = tl.full([1], 1.0, tl.float32)
    tmp11 = tmp9 + tmp10
    tmp12 = tmp6 * tmp11
    tmp13 = tmp12.to(tl.float32)
    tl.store(out_ptr1 + (tl.broadcast_to(idx_o + 256*idx_t, [BLOCK_O, BLOCK_T])), tmp13, mask)



# What the sparse kernels share. Four groups of a row are a quad: one element of metadata holds its indices.
#
# A dot product may add its terms in any order, so a tile's kept columns are put in the order in which a thread of the
# tensor cores holds them (PTX ISA, fragments of mma.m16n8k16 and wgmma): lane q of four owns the terms 2q, 2q+1, 2q+8
# and 2q+9 of every 16. These are the four kept columns of one group, so what a thread loads it also expands and
# multiplies, and no value crosses lanes or shared memory:
#
#     group 4 (q C + c) + i, kept column 2 h + l  ->  term 64 c + 16 i + 8 h + 2 q + l        C = BLOCK_G / 16

@triton.jit
def weight_tile(values, metadata, rows, group, values_stride, metadata_stride,
                BLOCK_O: tl.constexpr, BLOCK_G: tl.constexpr):
    """The kept columns of rows x BLOCK_G groups, zeros filled in: [BLOCK_O, 4 BLOCK_G], terms in fragment order."""
    quads: tl.constexpr = BLOCK_G // 4
    quad = group // 4 + tl.arange(0, quads)
    code = tl.load(metadata + rows[:, None] * metadata_stride + quad[None, :]).to(tl.int32)

    # One word holds the 2 values of a group.
    word = group + tl.arange(0, BLOCK_G)
    words = tl.load(values + rows[:, None] * values_stride + word[None, :])
    even, odd = tl.split(tl.reshape(words, [BLOCK_O, quads, 2, 2]))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)

    e0, e1, e2, e3 = expand_quad(w0, w1, w2, w3, code)


    tile = tl.join(tl.join(e0, e2), tl.join(e1, e3))  # [BLOCK_O, quads, l, h, i / 2, i % 2]
    tile = tl.reshape(tile, [BLOCK_O, 4, BLOCK_G // 16, 2, 2, 4])  # [BLOCK_O, q, c, l, h, i]
    return tl.reshape(tl.permute(tile, [0, 2, 5, 4, 1, 3]), [BLOCK_O, 4 * BLOCK_G])



@triton.jit
def halves(word):
    """The two 16-bit values of a word: [..., 2]."""
    low = word.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    high = (word >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high)



@triton.jit
def expand_quad(w0, w1, w2, w3, code):
    """Four words of two values to [..., l, h] each: bytes are moved by permutations that are looked up by permutations.

    code ^ code >> 1 tells the six pairs of indices apart in three bits. They select, for each of the four kept columns,
    from a table of eight bytes how to fill its two: 0x10 first value, 0x32 second value, 0x44 zero.
    """
    low0, high0, low1, high1, low2, high2, low3, high3 = tl.inline_asm_elementwise(
        """{
        .reg .b32 key, col0, col1, col2, col3, how;
        shr.u32 key, $8, 1;
        xor.b32 key, key, $8;
        and.b32 key, key, 0x7777;
        prmt.b32 col0, 0x44104444, 0x44104410, key;
        prmt.b32 col1, 0x10444444, 0x44321044, key;
        prmt.b32 col2, 0x44441044, 0x44443232, key;
        prmt.b32 col3, 0x32323244, 0x44444444, key;
        prmt.b32 how, col0, col1, 0x40;
        prmt.b32 $0, $9, 0, how;
        prmt.b32 how, col2, col3, 0x40;
        prmt.b32 $1, $9, 0, how;
        prmt.b32 how, col0, col1, 0x51;
        prmt.b32 $2, $10, 0, how;
        prmt.b32 how, col2, col3, 0x51;
        prmt.b32 $3, $10, 0, how;
        prmt.b32 how, col0, col1, 0x62;
        prmt.b32 $4, $11, 0, how;
        prmt.b32 how, col2, col3, 0x62;
        prmt.b32 $5, $11, 0, how;
        prmt.b32 how, col0, col1, 0x73;
        prmt.b32 $6, $12, 0, how;
        prmt.b32 how, col2, col3, 0x73;
        prmt.b32 $7, $12, 0, how;
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r",
        [code, w0, w1, w2, w3],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    e0 = tl.join(halves(low0), halves(high0))
    e1 = tl.join(halves(low1), halves(high1))
    e2 = tl.join(halves(low2), halves(high2))
    e3 = tl.join(halves(low3), halves(high3))
    return e0, e1, e2, e3




@triton.jit
def activation_tile(x, columns, block, group, tokens, stride, groups: tl.constexpr, in_features: tl.constexpr,
                    M: tl.constexpr, BLOCK_G: tl.constexpr):
    """The activations that BLOCK_G groups of a block of rows need: [4 BLOCK_G, tokens], terms in fragment order."""
    term = tl.arange(0, 4 * BLOCK_G)
    of_group = group + 4 * (((term >> 1) & 3) * (BLOCK_G // 16) + (term >> 6)) + ((term >> 4) & 3)
    kept = 2 * ((term >> 3) & 1) + (term & 1)
    # One load brings the four columns of a group.
    four = tl.load(columns + block * groups + of_group)
    column = of_group * M + ((four >> 8 * kept) & 255).to(tl.int32)
    # Tokens past the last lie in the padding of the rows: they are read, never stored.
    inside = (tokens < stride)[None, :]
    # In the width of the tokens: a feature times a row's length may be beyond 32 bits where neither factor is.
    return tl.load(x + column[:, None].to(tokens.dtype) * stride + tokens[None, :], mask=inside, other=0.0)
