@triton.jit
def triton_tem_fused_add_linear_1(arg_X, arg_VALUES, arg_METADATA, arg_COLUMNS, in_ptr4, in_ptr5, out_ptr1):
    V : tl.constexpr = 64
    N : tl.constexpr = 2
    M : tl.constexpr = 8
    O : tl.constexpr = 128
    K : tl.constexpr = 256
    G : tl.constexpr = 32
    R : tl.constexpr = 128
    BLOCK_O : tl.constexpr = 32
    BLOCK_T : tl.constexpr = 32
    BLOCK_G : tl.constexpr = 16
    GROUP_T : tl.constexpr = 8
    SPLITS : tl.constexpr = 1
    SPLIT_G : tl.constexpr = 32
    EVEN_G : tl.constexpr = True
    EMPTY_ROUND : tl.constexpr = False
    TAIL : tl.constexpr = False
    DTYPE : tl.constexpr = tl.float16
    WIDE : tl.constexpr = False
    COLUMN_BITS : tl.constexpr = 8
    PERMUTE_BYTES : tl.constexpr = False
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
    T = 40
    stride_x = 40  # tokens, rounded up so that rows are aligned

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

    xindex = idx_o + 128*idx_t
    tmp0 = acc.to(tl.float16)
    tmp1 = tmp0.to(tl.float32)
    tmp2 = tl.load(in_ptr4 + (tl.broadcast_to(idx_o, [BLOCK_O, BLOCK_T])), mask, eviction_policy='evict_last').to(tl.float32)
    tmp4 = tl.load(in_ptr5 + (tl.broadcast_to(idx_o + 128*idx_t, [BLOCK_O, BLOCK_T])), mask, eviction_policy='evict_last').to(tl.float32)
    tmp3 = tmp1 + tmp2
    tmp5 = tmp3 + tmp4
    tl.store(out_ptr1 + (tl.broadcast_to(idx_o + 128*idx_t, [BLOCK_O, BLOCK_T])), tmp5, mask)



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

    e0, e1, e2, e3 = expand(w0, code), expand(w1, code >> 4), expand(w2, code >> 8), expand(w3, code >> 12)


    tile = tl.join(tl.join(e0, e2), tl.join(e1, e3))  # [BLOCK_O, quads, l, h, i / 2, i % 2]
    tile = tl.reshape(tile, [BLOCK_O, 4, BLOCK_G // 16, 2, 2, 4])  # [BLOCK_O, q, c, l, h, i]
    return tl.reshape(tl.permute(tile, [0, 2, 5, 4, 1, 3]), [BLOCK_O, 4 * BLOCK_G])



@triton.jit
def halves(word):
    """The two 16-bit values of a word: [..., 2]."""
    low = word.to(tl.uint16).to(tl.float16, bitcast=True)
    high = (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.join(low, high)



@triton.jit
def expand(word, code):
    """A group's 2 values, shifted to their places among four: [...] to [..., l, h]."""

    bits = word.to(tl.uint32, bitcast=True)
    four = (bits & 0xFFFF).to(tl.uint64) << ((code & 3) * 16).to(tl.uint64)
    four |= (bits >> 16).to(tl.uint64) << ((code & 12) * 4).to(tl.uint64)

    return tl.join(halves(four.to(tl.uint32)), halves((four >> 32).to(tl.uint32)))




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
