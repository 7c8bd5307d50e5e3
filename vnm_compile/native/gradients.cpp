// The gradients of a V:N:M product on a CPU: `grad @ W`, and `grad.T @ x` where W keeps values.
//
// A block of V rows shares the 4 columns that it keeps of M. So both are made of small dense products with 4 columns:
// M / 4 times fewer multiplications than those of a dense weight, in full vectors, without looking at an index inside.
// Tokens are taken in tiles, in which an operand lies transposed where it is read by column.

#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast") // Inductor's flags turn fused multiply-adds off
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

namespace {

#ifdef __AVX512F__
constexpr int kBytes = 64;
constexpr int kMost = 4; // vectors that one run of multiply() sums up, for each of 4 columns: what registers hold
#else
constexpr int kBytes = 32;
constexpr int kMost = 3;
#endif
constexpr int64_t kTile = 2 * kMost * kBytes / 4; // tokens
constexpr int64_t kKept = 4;                      // columns of a group
constexpr int64_t kLine = 16;                     // columns that are transposed at a time: lines that a cache holds
constexpr int64_t kColumns = 1024;                // columns of x that one piece of work covers at most, about
constexpr int64_t kSumColumns = 128;              // the same for the gradient of values
constexpr int64_t kSums = 1 << 16;                // sums that stay in a cache
constexpr int64_t kRun = 64;                      // products that are summed up one after another
constexpr int64_t kPieces = 4;                    // of work for each thread, at least, where there are as many

struct bf16 {
  uint16_t bits;
};

inline float wide(float value) { return value; }
inline double wide(double value) { return value; }
inline float wide(bf16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline void narrow(float value, float &to) { to = value; }
inline void narrow(double value, double &to) { to = value; }
inline void narrow(float value, bf16 &to) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  // To the nearest, ties to even.
  to.bits = nan ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// What all functions are told of the weight and the operands.
struct Problem {
  int64_t tokens, out_features, in_features;
  int64_t v, n, m;
  int64_t grad_stride, x_stride;        // elements from token to token; that of x, or of its gradient
  int64_t values_stride, metadata_stride; // elements from row to row
  int64_t column_bytes, threads;
  int64_t blocks() const { return (out_features + v - 1) / v; }
  int64_t groups() const { return (in_features + m - 1) / m; }
  int64_t tiles() const { return (tokens + kTile - 1) / kTile; }
  // Into how many pieces `count` things are cut, of at most `most`, so that there are enough with `others` for each.
  int64_t pieces(int64_t count, int64_t most, int64_t others) const {
    int64_t least = (count + most - 1) / most, wanted = (kPieces * threads + others - 1) / others;
    return std::min(count, std::max(least, wanted));
  }
};

template <class A> struct Vectors {
  typedef A type __attribute__((vector_size(kBytes)));
  static constexpr int64_t lanes = kBytes / sizeof(A);
  static type load(const A *from) {
    type result;
    std::memcpy(&result, from, kBytes);
    return result;
  }
  static void store(type value, A *to) { std::memcpy(to, &value, kBytes); }
};

inline int64_t rounded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

template <class A> struct Scratch {
  explicit Scratch(int64_t count) : memory(new A[count]) {}
  A *get() const { return memory.get(); }
  std::unique_ptr<A[]> memory;
};

// acc[j][lane] += sum over i of rows[i][lane] * scalars[j][i * step], for 4 j. Summed up on its own first: rounding errors
// grow with the length of a sum.
template <class A, int L>
inline void multiply(const A *rows, int64_t width, const A *const scalars[kKept], int64_t step, int64_t count,
                     A *const acc[kKept], int64_t lane) {
  using V = Vectors<A>;
  typename V::type sums[kKept][L];
  const A *first = scalars[0], *second = scalars[1], *third = scalars[2], *fourth = scalars[3];
  for (int j = 0; j < kKept; ++j)
    for (int l = 0; l < L; ++l)
      sums[j][l] = typename V::type{};
  for (int64_t i = 0; i < count; ++i) {
    typename V::type row[L];
    for (int l = 0; l < L; ++l) {
      row[l] = V::load(rows + i * width + lane + l * V::lanes);
#if defined(__x86_64__)
      __asm__("" : "+x"(row[l])); // once into a register, not once for each product
#endif
    }
    A scalar[kKept] = {first[i * step], second[i * step], third[i * step], fourth[i * step]};
    for (int j = 0; j < kKept; ++j)
      for (int l = 0; l < L; ++l)
        sums[j][l] += row[l] * scalar[j];
  }
  for (int j = 0; j < kKept; ++j)
    for (int l = 0; l < L; ++l)
      V::store(V::load(acc[j] + lane + l * V::lanes) + sums[j][l], acc[j] + lane + l * V::lanes);
}

// The same over all lanes of `width`, a multiple of a vector's.
template <class A>
void multiply_all(const A *rows, int64_t width, const A *const scalars[kKept], int64_t step, int64_t count,
                  A *const acc[kKept]) {
  constexpr int64_t lanes = Vectors<A>::lanes;
  for (int64_t done = 0; done < count; done += kRun) {
    const A *some[kKept] = {scalars[0] + done * step, scalars[1] + done * step, scalars[2] + done * step,
                            scalars[3] + done * step};
    int64_t run = std::min(kRun, count - done), lane = 0;
    for (; lane + kMost * lanes <= width; lane += kMost * lanes)
      multiply<A, kMost>(rows + done * width, width, some, step, run, acc, lane);
    for (; lane + 2 * lanes <= width; lane += 2 * lanes)
      multiply<A, 2>(rows + done * width, width, some, step, run, acc, lane);
    if (lane < width)
      multiply<A, 1>(rows + done * width, width, some, step, run, acc, lane);
  }
}

// 8 x 8 elements, in registers where the compiler has shuffles; they are the smaller half of the work otherwise.
template <class S> inline void transpose_square(const S *from, int64_t stride, float *to, int64_t to_stride) {
  typedef float row __attribute__((vector_size(32)));
#if defined(__clang__) || __GNUC__ >= 12
  row r[8], s[8];
  for (int i = 0; i < 8; ++i)
    for (int k = 0; k < 8; ++k)
      r[i][k] = wide(from[i * stride + k]);
  for (int i = 0; i < 8; i += 2) {
    s[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    s[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; ++k) {
      r[i + 2 * k] = __builtin_shufflevector(s[i + k], s[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      r[i + 2 * k + 1] = __builtin_shufflevector(s[i + k], s[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    s[i] = __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    s[i + 4] = __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int i = 0; i < 8; ++i)
    std::memcpy(to + i * to_stride, &s[i], sizeof(row));
#else
  for (int i = 0; i < 8; ++i)
    for (int k = 0; k < 8; ++k)
      to[k * to_stride + i] = wide(from[i * stride + k]);
#endif
}

template <class S> inline void transpose_square(const S *from, int64_t stride, double *to, int64_t to_stride) {
  for (int i = 0; i < 8; ++i)
    for (int k = 0; k < 8; ++k)
      to[k * to_stride + i] = wide(from[i * stride + k]);
}

// [count, width] as [width][kTile], zeros past the last token.
template <class S, class A>
void transpose(const S *from, int64_t stride, int64_t count, int64_t width, A *to) {
  int64_t whole = count / 8 * 8;
  for (int64_t first = 0; first < width; first += 8) {
    int64_t last = std::min(width, first + 8), done = last - first == 8 ? whole : 0;
    for (int64_t t = 0; t < done; t += 8)
      transpose_square(from + t * stride + first, stride, to + first * kTile + t, kTile);
    for (int64_t c = first; c < last; ++c) {
      for (int64_t t = done; t < count; ++t)
        to[c * kTile + t] = wide(from[t * stride + c]);
      std::fill(to + c * kTile + count, to + (c + 1) * kTile, A(0));
    }
  }
}

// And back.
template <class S, class A>
void transpose_back(const A *from, int64_t count, int64_t width, S *to, int64_t stride) {
  for (int64_t first = 0; first < width; first += kLine)
    for (int64_t t = 0; t < count; ++t)
      for (int64_t c = first; c < std::min(width, first + kLine); ++c)
        narrow(from[c * kTile + t], to[t * stride + c]);
}

struct Structure {
  const uint8_t *metadata;
  const void *columns;
  // Of the whole weight, which column a group's kept one is; past in_features where there is none.
  int64_t column(const Problem &p, int64_t block, int64_t group, int64_t j) const {
    int64_t at = (block * p.groups() + group) * kKept + j;
    int64_t offset = p.column_bytes == 1 ? static_cast<const uint8_t *>(columns)[at]
                                         : static_cast<const uint16_t *>(columns)[at];
    return group * p.m + offset;
  }
  int64_t index(const Problem &p, int64_t row, int64_t value) const {
    return metadata[row * p.metadata_stride + value / 4] >> (2 * (value % 4)) & 3;
  }
};

template <class S, class A>
void input_grad(const Problem &p, const S *grad, const S *values, Structure structure, S *result) {
  int64_t blocks = p.blocks(), groups = p.groups();
  int64_t chunks = p.pieces(groups, std::max<int64_t>(1, kColumns / p.m), p.tiles());
  int64_t some = (groups + chunks - 1) / chunks;
  Scratch<A> kept(blocks * groups * p.v * kKept); // [block][group][row][4]: the values of a row, with zeros
#pragma omp parallel num_threads(p.threads)
  {
    Scratch<A> across(p.v * kTile), sums(some * p.m * kTile), none(kTile);
    std::fill(none.get(), none.get() + kTile, A(0));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < blocks * p.v; ++row)
      for (int64_t group = 0; group < groups; ++group) {
        A *place = kept.get() + ((row / p.v * groups + group) * p.v + row % p.v) * kKept;
        std::fill(place, place + kKept, A(0));
        for (int64_t value = group * p.n; value < (group + 1) * p.n; ++value)
          place[structure.index(p, row, value)] += wide(values[row * p.values_stride + value]);
      }
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < p.tiles() * chunks; ++item) {
      int64_t tile = item / chunks, from = item % chunks * some, to = std::min(groups, from + some);
      int64_t first = from * p.m, last = std::min(p.in_features, to * p.m);
      int64_t tokens = std::min(kTile, p.tokens - tile * kTile);
      std::fill(sums.get(), sums.get() + some * p.m * kTile, A(0));
      for (int64_t block = 0; block < blocks; ++block) {
        int64_t count = std::min(p.v, p.out_features - block * p.v);
        transpose(grad + tile * kTile * p.grad_stride + block * p.v, p.grad_stride, tokens, count, across.get());
        for (int64_t group = from; group < to; ++group) {
          const A *weight = kept.get() + (block * groups + group) * p.v * kKept;
          const A *scalars[kKept] = {weight, weight + 1, weight + 2, weight + 3};
          A *acc[kKept];
          for (int j = 0; j < kKept; ++j) {
            int64_t column = structure.column(p, block, group, j);
            acc[j] = column < last ? sums.get() + (column - first) * kTile : none.get();
          }
          multiply_all(across.get(), kTile, scalars, kKept, count, acc);
        }
      }
      transpose_back(sums.get(), tokens, last - first, result + tile * kTile * p.x_stride + first, p.x_stride);
    }
  }
}

template <class S, class A>
void values_grad(const Problem &p, const S *grad, const S *x, Structure structure, S *result) {
  int64_t blocks = p.blocks(), groups = p.groups(), width = rounded(p.v, Vectors<A>::lanes);
  // Groups of few columns, so that a tile of x is transposed for all blocks at once and sums stay in a cache.
  int64_t chunks = p.pieces(groups, std::max<int64_t>(1, kSumColumns / p.m), blocks);
  int64_t some = (groups + chunks - 1) / chunks;
  int64_t parts = p.pieces(blocks, std::max<int64_t>(1, kSums / (some * kKept * width)), chunks);
  int64_t several = (blocks + parts - 1) / parts;
#pragma omp parallel num_threads(p.threads)
  {
    Scratch<A> across(some * p.m * kTile), rows(kTile * width), sums(several * some * kKept * width), none(kTile);
    std::fill(none.get(), none.get() + kTile, A(0));
    std::fill(rows.get(), rows.get() + kTile * width, A(0));
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < chunks * parts; ++item) {
      int64_t from = item / parts * some, to = std::min(groups, from + some);
      int64_t begin = item % parts * several, end = std::min(blocks, begin + several);
      int64_t first = from * p.m, last = std::min(p.in_features, to * p.m);
      std::fill(sums.get(), sums.get() + several * some * kKept * width, A(0));
      auto sum_of = [&](int64_t block, int64_t group) {
        return sums.get() + ((block - begin) * some + group - from) * kKept * width;
      };
      for (int64_t tile = 0; tile < p.tiles(); ++tile) {
        int64_t tokens = std::min(kTile, p.tokens - tile * kTile);
        transpose(x + tile * kTile * p.x_stride + first, p.x_stride, tokens, last - first, across.get());
        for (int64_t block = begin; block < end; ++block) {
          int64_t count = std::min(p.v, p.out_features - block * p.v);
          const S *source = grad + tile * kTile * p.grad_stride + block * p.v;
          for (int64_t t = 0; t < tokens; ++t) {
            A *row = rows.get() + t * width;
            for (int64_t v = 0; v < count; ++v)
              row[v] = wide(source[t * p.grad_stride + v]);
            std::fill(row + count, row + p.v, A(0));
          }
          for (int64_t group = from; group < to; ++group) {
            const A *scalars[kKept];
            for (int j = 0; j < kKept; ++j) {
              int64_t column = structure.column(p, block, group, j);
              scalars[j] = column < last ? across.get() + (column - first) * kTile : none.get();
            }
            A *sum = sum_of(block, group), *acc[kKept] = {sum, sum + width, sum + 2 * width, sum + 3 * width};
            multiply_all(rows.get(), width, scalars, 1, tokens, acc);
          }
        }
      }
      for (int64_t row = begin * p.v; row < end * p.v; ++row)
        for (int64_t value = from * p.n; value < to * p.n; ++value) {
          int64_t block = row / p.v, group = value / p.n, j = structure.index(p, row, value);
          bool real = row < p.out_features && structure.column(p, block, group, j) < p.in_features;
          A sum = sum_of(block, group)[j * width + row % p.v];
          narrow(real ? sum : A(0), result[row * groups * p.n + value]);
        }
    }
  }
}

} // namespace

// kind: 0 float, 1 double, 2 bfloat16. `numbers` are the fields of Problem, in order. Everything is row-major.

extern "C" void vnm_input_grad(int64_t kind, const int64_t *numbers, const void *grad, const void *values,
                               const uint8_t *metadata, const void *columns, void *result) {
  Problem p;
  std::memcpy(&p, numbers, sizeof(p));
  Structure structure{metadata, columns};
  if (kind == 0)
    input_grad<float, float>(p, (const float *)grad, (const float *)values, structure, (float *)result);
  else if (kind == 1)
    input_grad<double, double>(p, (const double *)grad, (const double *)values, structure, (double *)result);
  else
    input_grad<bf16, float>(p, (const bf16 *)grad, (const bf16 *)values, structure, (bf16 *)result);
}

extern "C" void vnm_values_grad(int64_t kind, const int64_t *numbers, const void *grad, const void *x,
                                const uint8_t *metadata, const void *columns, void *result) {
  Problem p;
  std::memcpy(&p, numbers, sizeof(p));
  Structure structure{metadata, columns};
  if (kind == 0)
    values_grad<float, float>(p, (const float *)grad, (const float *)x, structure, (float *)result);
  else if (kind == 1)
    values_grad<double, double>(p, (const double *)grad, (const double *)x, structure, (double *)result);
  else
    values_grad<bf16, float>(p, (const bf16 *)grad, (const bf16 *)x, structure, (bf16 *)result);
}
