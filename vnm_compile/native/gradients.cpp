// The gradients of a V:N:M product on a CPU: `grad @ W`, and `grad.T @ x` where W keeps values.
//
// A block of V rows shares the 4 columns that it keeps of M. So both are made of small dense products with 4 columns:
// M / 4 times fewer multiplications than those of a dense weight, in full vectors, without looking at an index inside.
// Tokens are taken in tiles, in which an operand lies transposed where it is read by column.

#include <memory>

namespace {

#ifdef __AVX512F__
constexpr int kMost = 4; // vectors that one run of multiply() sums up, for each of 4 columns: what registers hold
#else
constexpr int kMost = 3;
#endif
constexpr int64_t kTile = 2 * kMost * kBytes / 4; // tokens
constexpr int64_t kKept = 4;                      // columns of a group
constexpr int64_t kColumns = 1024;                // columns of x that one piece of work covers at most, about
constexpr int64_t kSumColumns = 128;              // the same for the gradient of values
constexpr int64_t kSums = 1 << 16;                // sums that stay in a cache
constexpr int64_t kRun = 64;                      // products that are summed up one after another
constexpr int64_t kPieces = 4;                    // of work for each thread, at least, where there are as many

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

template <class A> struct Scratch {
  explicit Scratch(int64_t count) : memory(new A[count]) {}
  A *get() const { return memory.get(); }
  std::unique_ptr<A[]> memory;
};

// acc[j][lane] += sum over i of rows[i][lane] * scalars[j][i * step], for 4 j. Summed up on its own first: rounding errors
// grow with the length of a sum.
template <class P, int L>
inline void multiply(const typename P::Unit *rows, int64_t width, const typename P::Unit *const scalars[kKept],
                     int64_t step, int64_t count, typename P::Sum *const acc[kKept], int64_t lane) {
  using Rows = Vectors<typename P::Unit>;
  using Sums = Vectors<typename P::Sum>;
  typename Sums::type sums[kKept][L];
  const typename P::Unit *first = scalars[0], *second = scalars[1], *third = scalars[2], *fourth = scalars[3];
  for (int j = 0; j < kKept; ++j)
    for (int l = 0; l < L; ++l)
      sums[j][l] = typename Sums::type{};
  for (int64_t i = 0; i < count; ++i) {
    typename Rows::type row[L];
    for (int l = 0; l < L; ++l) {
      typename Rows::type loaded = Rows::load(rows + i * width + lane + l * Rows::lanes);
#if defined(__x86_64__)
      __asm__("" : "+x"(loaded)); // once into a register, not once for each product
#endif
      row[l] = loaded;
    }
    typename P::Unit scalar[kKept] = {first[i * step], second[i * step], third[i * step], fourth[i * step]};
    for (int j = 0; j < kKept; ++j)
      for (int l = 0; l < L; ++l)
        sums[j][l] = P::add(sums[j][l], row[l], scalar[j]);
  }
  for (int j = 0; j < kKept; ++j)
    for (int l = 0; l < L; ++l)
      Sums::store(Sums::load(acc[j] + lane + l * Sums::lanes) + sums[j][l], acc[j] + lane + l * Sums::lanes);
}

// The same over all lanes of `width`, a multiple of a vector's.
template <class P>
void multiply_all(const typename P::Unit *rows, int64_t width, const typename P::Unit *const scalars[kKept],
                  int64_t step, int64_t count, typename P::Sum *const acc[kKept]) {
  constexpr int64_t lanes = Vectors<typename P::Sum>::lanes;
  for (int64_t done = 0; done < count; done += kRun) {
    const typename P::Unit *some[kKept] = {scalars[0] + done * step, scalars[1] + done * step,
                                           scalars[2] + done * step, scalars[3] + done * step};
    int64_t run = std::min(kRun, count - done), lane = 0;
    for (; lane + kMost * lanes <= width; lane += kMost * lanes)
      multiply<P, kMost>(rows + done * width, width, some, step, run, acc, lane);
    for (; lane + 2 * lanes <= width; lane += 2 * lanes)
      multiply<P, 2>(rows + done * width, width, some, step, run, acc, lane);
    if (lane < width)
      multiply<P, 1>(rows + done * width, width, some, step, run, acc, lane);
  }
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

template <class P>
void input_grad(const Problem &p, const typename P::Operand *grad, const typename P::Operand *values,
                Structure structure, typename P::Operand *result) {
  using U = typename P::Unit;
  using A = typename P::Sum;
  int64_t blocks = p.blocks(), groups = p.groups(), height = units<P>(p.v);
  int64_t chunks = p.pieces(groups, std::max<int64_t>(1, kColumns / p.m), p.tiles());
  int64_t some = (groups + chunks - 1) / chunks;
  Scratch<U> kept(blocks * groups * height * kKept); // [block][group][rows][4]: the values of rows, with zeros
#pragma omp parallel num_threads(p.threads)
  {
    Scratch<U> across(height * kTile);
    Scratch<A> sums(some * p.m * kTile), none(kTile);
    std::fill(none.get(), none.get() + kTile, A(0));
#pragma omp for schedule(static)
    for (int64_t several = 0; several < blocks * height; ++several)
      for (int64_t group = 0; group < groups; ++group) {
        int64_t block = several / height, first = several % height * P::per;
        U *place = kept.get() + ((block * groups + group) * height + several % height) * kKept;
        std::fill(place, place + kKept, U{});
        for (int64_t in_block = first; in_block < std::min(p.v, first + P::per); ++in_block)
          for (int64_t value = group * p.n; value < (group + 1) * p.n; ++value) {
            int64_t row = block * p.v + in_block;
            P::put(place[structure.index(p, row, value)], values[row * p.values_stride + value], in_block);
          }
      }
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < p.tiles() * chunks; ++item) {
      int64_t tile = item / chunks, from = item % chunks * some, to = std::min(groups, from + some);
      int64_t first = from * p.m, last = std::min(p.in_features, to * p.m);
      int64_t tokens = std::min(kTile, p.tokens - tile * kTile);
      std::fill(sums.get(), sums.get() + some * p.m * kTile, A(0));
      for (int64_t block = 0; block < blocks; ++block) {
        int64_t count = std::min(p.v, p.out_features - block * p.v);
        Across<P> source{grad + tile * kTile * p.grad_stride + block * p.v, p.grad_stride, count};
        transpose(source, tokens, units<P>(count), across.get(), kTile);
        for (int64_t group = from; group < to; ++group) {
          const U *weight = kept.get() + (block * groups + group) * height * kKept;
          const U *scalars[kKept] = {weight, weight + 1, weight + 2, weight + 3};
          A *acc[kKept];
          for (int j = 0; j < kKept; ++j) {
            int64_t column = structure.column(p, block, group, j);
            acc[j] = column < last ? sums.get() + (column - first) * kTile : none.get();
          }
          multiply_all<P>(across.get(), kTile, scalars, kKept, units<P>(count), acc);
        }
      }
      transpose_back(sums.get(), kTile, tokens, last - first, result + tile * kTile * p.x_stride + first, p.x_stride);
    }
  }
}

template <class P>
void values_grad(const Problem &p, const typename P::Operand *grad, const typename P::Operand *x, Structure structure,
                 typename P::Operand *result) {
  using U = typename P::Unit;
  using A = typename P::Sum;
  constexpr int64_t kUnits = kTile / P::per; // of a tile of tokens
  int64_t blocks = p.blocks(), groups = p.groups(), width = rounded(p.v, Vectors<A>::lanes);
  // Groups of few columns, so that a tile of x is transposed for all blocks at once and sums stay in a cache.
  int64_t chunks = p.pieces(groups, std::max<int64_t>(1, kSumColumns / p.m), blocks);
  int64_t some = (groups + chunks - 1) / chunks;
  int64_t parts = p.pieces(blocks, std::max<int64_t>(1, kSums / (some * kKept * width)), chunks);
  int64_t several = (blocks + parts - 1) / parts;
#pragma omp parallel num_threads(p.threads)
  {
    Scratch<U> across(some * p.m * kUnits), rows(kUnits * width), none(kUnits);
    Scratch<A> sums(several * some * kKept * width);
    std::fill(none.get(), none.get() + kUnits, U{});
    std::fill(rows.get(), rows.get() + kUnits * width, U{});
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
        Down<P> columns{x + tile * kTile * p.x_stride + first, p.x_stride, tokens, last - first};
        transpose(columns, units<P>(tokens), last - first, across.get(), kUnits);
        for (int64_t block = begin; block < end; ++block) {
          int64_t count = std::min(p.v, p.out_features - block * p.v);
          Down<P> source{grad + tile * kTile * p.grad_stride + block * p.v, p.grad_stride, tokens, count};
          copy(source, units<P>(tokens), count, rows.get(), width);
          if (count < p.v)
            for (int64_t t = 0; t < units<P>(tokens); ++t)
              std::fill(rows.get() + t * width + count, rows.get() + t * width + p.v, U{});
          for (int64_t group = from; group < to; ++group) {
            const U *scalars[kKept];
            for (int j = 0; j < kKept; ++j) {
              int64_t column = structure.column(p, block, group, j);
              scalars[j] = column < last ? across.get() + (column - first) * kUnits : none.get();
            }
            A *sum = sum_of(block, group), *acc[kKept] = {sum, sum + width, sum + 2 * width, sum + 3 * width};
            multiply_all<P>(rows.get(), width, scalars, 1, units<P>(tokens), acc);
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
    input_grad<Single<float, float>>(p, (const float *)grad, (const float *)values, structure, (float *)result);
  else if (kind == 1)
    input_grad<Single<double, double>>(p, (const double *)grad, (const double *)values, structure, (double *)result);
  else
    input_grad<Half>(p, (const bf16 *)grad, (const bf16 *)values, structure, (bf16 *)result);
}

extern "C" void vnm_values_grad(int64_t kind, const int64_t *numbers, const void *grad, const void *x,
                                const uint8_t *metadata, const void *columns, void *result) {
  Problem p;
  std::memcpy(&p, numbers, sizeof(p));
  Structure structure{metadata, columns};
  if (kind == 0)
    values_grad<Single<float, float>>(p, (const float *)grad, (const float *)x, structure, (float *)result);
  else if (kind == 1)
    values_grad<Single<double, double>>(p, (const double *)grad, (const double *)x, structure, (double *)result);
  else
    values_grad<Half>(p, (const bf16 *)grad, (const bf16 *)x, structure, (bf16 *)result);
}
