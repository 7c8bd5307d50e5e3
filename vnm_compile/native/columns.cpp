// Which columns the blocks of a matrix of scores keep, on a CPU, and which scores that keeps.
//
// All choices of 4 are tried, or a set of any size is grown. Trying takes as many blocks at a time as a vector has lanes, so
// that nothing is summed up across lanes. Growing goes another way in each block, so there a vector holds rows of one.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int kBytes = 64;
#else
constexpr int kBytes = 32;
#endif
constexpr int kKept = 4;
constexpr int kTogether = 4;     // fourth columns that are summed up at a time: accumulators in registers
constexpr int64_t kRun = 64;     // rows that are summed up one after another
constexpr int kSweeps = 8;       // over the set, exchanging columns, at most
constexpr double kBetter = 1e-6; // relative gain below which nothing is exchanged

template <class A> struct Vectors;
template <> struct Vectors<float> {
  typedef float type __attribute__((vector_size(kBytes)));
  typedef int32_t number;
  typedef int32_t numbers __attribute__((vector_size(kBytes)));
};
template <> struct Vectors<double> {
  typedef double type __attribute__((vector_size(kBytes)));
  typedef int64_t number;
  typedef int64_t numbers __attribute__((vector_size(kBytes)));
};

template <class V> inline V larger(V a, V b) { return a > b ? a : b; }
template <class V> inline V smaller(V a, V b) { return a > b ? b : a; }

// Memory of vectors, aligned to them.
template <class V> struct Scratch {
  explicit Scratch(int64_t count) : memory(new char[(count + 1) * sizeof(V)]) {
    uintptr_t start = (reinterpret_cast<uintptr_t>(memory.get()) + sizeof(V) - 1) / sizeof(V) * sizeof(V);
    first = reinterpret_cast<V *>(start);
  }
  std::unique_ptr<char[]> memory;
  V *first;
};

enum Way : int64_t { kAll, kSums, kTry, kGrow };

// The scores, [rows][columns], and what of each V x M block is kept: `width` columns, and of these n in every row.
struct Problem {
  int64_t rows, columns, stride, v, m, n, width, way, threads;
  int64_t groups() const { return (columns + m - 1) / m; }
  int64_t blocks() const { return (rows + v - 1) / v * groups(); } // side by side, then below
};

// A block of the scores. Past the end it has less than anything real, so that this is kept only where nothing real is left.
template <class A> struct Block {
  Block(const Problem &p, const A *scores, int64_t number)
      : row(number / p.groups() * p.v), column(number % p.groups() * p.m), rows(std::min(p.v, p.rows - row)),
        columns(std::min(p.m, p.columns - column)), stride(p.stride), first(scores + row * stride + column) {}
  A operator()(int64_t r, int64_t c) const {
    return r < rows && c < columns ? first[r * stride + c] : -std::numeric_limits<A>::min();
  }
  int64_t row, column, rows, columns, stride;
  const A *first;
};

// out[c] = the sum over rows of max(least[row], columns[c][row]).
template <class V, int C> inline void sum_larger(const V *least, const V *const *columns, int64_t rows, V *out) {
  for (int c = 0; c < C; ++c)
    out[c] = V{};
  for (int64_t start = 0; start < rows; start += kRun) {
    V sums[C] = {};
    for (int64_t row = start; row < std::min(rows, start + kRun); ++row)
      for (int c = 0; c < C; ++c)
        sums[c] += larger(least[row], columns[c][row]);
    for (int c = 0; c < C; ++c)
      out[c] += sums[c];
  }
}

// The best choices so far of as many blocks as a vector has lanes.
template <class A> struct Best {
  typename Vectors<A>::type value;
  typename Vectors<A>::numbers number;
  void offer(typename Vectors<A>::type other, int64_t its_number) {
    auto better = other > value;
    value = better ? other : value;
    number = better ? typename Vectors<A>::numbers{} + typename Vectors<A>::number(its_number) : number;
  }
};

// Try every choice for `lanes` blocks that lie side by side in x, [M][V]. Of four columns a row keeps its largest score, or
// its two largest: those of three columns, and the fourth in the place of the smaller one where it is larger.
template <class A> Best<A> try_all(const Problem &p, const typename Vectors<A>::type *x, typename Vectors<A>::type *room) {
  using V = typename Vectors<A>::type;
  Best<A> best{V{} - std::numeric_limits<A>::infinity(), {}};
  V *high = room, *low = high + p.v, *least = low + p.v;
  int64_t number = 0;
  for (int64_t i = 0; i < p.m; ++i)
    for (int64_t j = i + 1; j < p.m; ++j) {
      for (int64_t row = 0; row < p.v; ++row) {
        high[row] = larger(x[i * p.v + row], x[j * p.v + row]);
        low[row] = smaller(x[i * p.v + row], x[j * p.v + row]);
      }
      for (int64_t k = j + 1; k + 1 < p.m; ++k) {
        V largest{};
        for (int64_t start = 0; start < p.v; start += kRun) {
          V sum{};
          for (int64_t row = start; row < std::min(p.v, start + kRun); ++row) {
            V most = larger(high[row], x[k * p.v + row]);
            least[row] = p.n == 1 ? most : larger(low[row], smaller(high[row], x[k * p.v + row]));
            sum += most;
          }
          largest += sum;
        }
        if (p.n == 1)
          largest = V{};
        for (int64_t q = k + 1; q < p.m; q += kTogether) {
          const V *columns[kTogether] = {};
          int64_t count = std::min<int64_t>(kTogether, p.m - q);
          for (int64_t c = 0; c < kTogether; ++c)
            columns[c] = x + (q + std::min(c, count - 1)) * p.v;
          V sums[kTogether];
          if (count == 1)
            sum_larger<V, 1>(least, columns, p.v, sums);
          else if (count == 2)
            sum_larger<V, 2>(least, columns, p.v, sums);
          else
            sum_larger<V, kTogether>(least, columns, p.v, sums);
          for (int64_t c = 0; c < count; ++c)
            best.offer(largest + sums[c], number++);
        }
      }
    }
  return best;
}

// The numbers of the choices in the order in which they are tried.
std::vector<int64_t> choices_of(int64_t m) {
  std::vector<int64_t> choices;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = i + 1; j < m; ++j)
      for (int64_t k = j + 1; k < m; ++k)
        for (int64_t q = k + 1; q < m; ++q)
          choices.insert(choices.end(), {i, j, k, q});
  return choices;
}

// Try all for several blocks at a time.
template <class A> struct Trying {
  using V = typename Vectors<A>::type;
  static constexpr int64_t lanes = sizeof(V) / sizeof(A);

  Trying(const Problem &p) : p(p), choices(choices_of(p.m)), x(p.m * p.v), room(3 * p.v) {
    std::fill(x.first, x.first + p.m * p.v, V{});
  }

  void find(const A *scores, int64_t first, int64_t count, int64_t *result) {
    for (int64_t lane = 0; lane < count; ++lane) {
      Block<A> block(p, scores, first + lane);
      for (int64_t row = 0; row < p.v; ++row)
        for (int64_t column = 0; column < p.m; ++column)
          reinterpret_cast<A *>(x.first + column * p.v + row)[lane] = block(row, column);
    }
    Best<A> best = try_all<A>(p, x.first, room.first);
    for (int64_t lane = 0; lane < count; ++lane)
      std::copy_n(choices.begin() + best.number[lane] * kKept, kKept, result + lane * kKept);
  }

private:
  const Problem &p;
  std::vector<int64_t> choices;
  Scratch<V> x, room; // [M][V]; what try_all needs
};

// One block whose set of columns grows and changes: vectors of rows, `span` of them.
template <class A> struct Growing {
  using V = typename Vectors<A>::type;
  static constexpr int64_t lanes = sizeof(V) / sizeof(A);

  Growing(const Problem &p)
      : p(p), span((p.v + lanes - 1) / lanes), x(p.m * span), largest((p.n + 1) * span), least(span), inside(p.m) {}

  void find(const Block<A> &block, int64_t *result) {
    std::fill(x.first, x.first + p.m * span, V{});
    for (int64_t row = 0; row < p.v; ++row)
      for (int64_t column = 0; column < p.m; ++column)
        reinterpret_cast<A *>(x.first + column * span)[row] = block(row, column);
    forget();
    std::fill(inside.begin(), inside.end(), false);
    for (int64_t position = 0; position < p.width; ++position) {
      std::copy_n(largest.first + (p.n - 1) * span, span, least.first);
      double gain;
      result[position] = most_gained(gain);
      inside[result[position]] = true;
      take(result[position]);
    }
    double value = kept();
    bool improved = true;
    for (int sweep = 0; sweep < kSweeps && improved; ++sweep) {
      improved = false;
      for (int64_t position = 0; position < p.width; ++position) {
        inside[result[position]] = false;
        double others = value - leave(result[position]), gain;
        int64_t candidate = most_gained(gain);
        if (others + gain > value * (1 + kBetter)) {
          result[position] = candidate;
          forget();
          for (int64_t each = 0; each < p.width; ++each)
            take(result[each]);
          value = kept();
          improved = true;
        }
        inside[result[position]] = true;
      }
    }
    std::sort(result, result + p.width);
  }

private:
  void forget() { std::fill(largest.first, largest.first + (p.n + 1) * span, V{}); }

  // Sort a column into the n + 1 largest scores of every row.
  void take(int64_t column) {
    for (int64_t i = 0; i < span; ++i) {
      V score = x.first[column * span + i];
      for (int64_t place = 0; place <= p.n; ++place) {
        V &held = largest.first[place * span + i];
        V more = larger(held, score);
        score = smaller(held, score);
        held = more;
      }
    }
  }

  // What the set loses without one of its columns; `least` is then what a column has to beat in every row.
  double leave(int64_t column) {
    V lost{};
    for (int64_t i = 0; i < span; ++i) {
      V score = x.first[column * span + i];
      V last = largest.first[(p.n - 1) * span + i], next = largest.first[p.n * span + i];
      least.first[i] = score >= last ? next : last;
      lost += score >= last ? score - next : V{};
    }
    return across(lost);
  }

  // Of the columns outside of the set the one that adds most, the first among equals.
  int64_t most_gained(double &gain) const {
    int64_t winner = -1;
    gain = -1;
    for (int64_t column = 0; column < p.m; ++column) {
      if (inside[column])
        continue;
      V sum{};
      for (int64_t i = 0; i < span; ++i)
        sum += larger(x.first[column * span + i] - least.first[i], V{});
      double its = across(sum);
      if (winner < 0 || its > gain) {
        winner = column;
        gain = its;
      }
    }
    return winner;
  }

  double kept() const {
    double total = 0;
    for (int64_t place = 0; place < p.n; ++place) {
      V sum{};
      for (int64_t i = 0; i < span; ++i)
        sum += largest.first[place * span + i];
      total += across(sum);
    }
    return total;
  }

  static double across(V sum) {
    double total = 0;
    for (int64_t lane = 0; lane < lanes; ++lane)
      total += sum[lane];
    return total;
  }

  const Problem &p;
  int64_t span;
  Scratch<V> x, largest, least; // [M][span]; [n + 1][span], from the largest score down; [span]
  std::vector<char> inside;
};

// The columns with the largest sums, the first among equals.
template <class A> void largest_sums(const Problem &p, const Block<A> &block, std::vector<A> &sums, int64_t *result) {
  std::fill(sums.begin(), sums.end(), A(0));
  for (int64_t row = 0; row < p.v; ++row)
    for (int64_t column = 0; column < p.m; ++column)
      sums[column] += block(row, column);
  std::vector<int64_t> order(p.m);
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort_copy(order.begin(), order.end(), result, result + p.width, [&](int64_t a, int64_t b) {
    return sums[a] > sums[b] || (sums[a] == sums[b] && a < b);
  });
  std::sort(result, result + p.width);
}

// Mark in every row of a block the n largest scores in `columns`, the first among equals.
template <class A> void mark(const Problem &p, const Block<A> &block, const int64_t *columns, bool *mask) {
  std::vector<int64_t> order(p.width);
  std::vector<A> scores(p.m);
  for (int64_t row = 0; row < block.rows; ++row) {
    for (int64_t i = 0; i < p.width; ++i)
      scores[columns[i]] = block(row, columns[i]);
    auto before = [&](int64_t a, int64_t b) { return scores[a] > scores[b] || (scores[a] == scores[b] && a < b); };
    std::copy_n(columns, p.width, order.begin());
    if (p.n <= 2) { // by far the most
      for (int64_t place = 0; place < std::min(p.n, p.width - 1); ++place)
        for (int64_t i = p.width - 1; i > place; --i)
          if (before(order[i], order[i - 1]))
            std::swap(order[i], order[i - 1]);
    } else if (p.n < p.width) {
      std::nth_element(order.begin(), order.begin() + p.n - 1, order.end(), before);
    }
    for (int64_t i = 0; i < p.n; ++i)
      if (order[i] < block.columns)
        mask[(block.row + row) * p.columns + block.column + order[i]] = true;
  }
}

// Whether there is a NaN, where nothing is found then.
template <class A> bool has_nan(const Problem &p, const A *scores) {
  int64_t found = 0;
#pragma omp parallel for num_threads(p.threads) reduction(| : found)
  for (int64_t row = 0; row < p.rows; ++row) {
    int64_t here = 0;
    for (int64_t column = 0; column < p.columns; ++column)
      here |= scores[row * p.stride + column] != scores[row * p.stride + column];
    found |= here;
  }
  return found != 0;
}

template <class A> int64_t project(const Problem &p, const A *scores, int64_t *columns, bool *mask) {
  constexpr int64_t lanes = Trying<A>::lanes;
  if (has_nan(p, scores))
    return 1;
#pragma omp parallel num_threads(p.threads)
  {
    std::unique_ptr<Trying<A>> trying(p.way == kTry ? new Trying<A>(p) : nullptr);
    std::unique_ptr<Growing<A>> growing(p.way == kGrow ? new Growing<A>(p) : nullptr);
    std::vector<A> sums(p.m);
    std::vector<int64_t> found(lanes * p.width);
    int64_t blocks = p.blocks();
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < blocks; first += lanes) {
      int64_t count = std::min(lanes, blocks - first);
      if (trying)
        trying->find(scores, first, count, found.data());
      for (int64_t lane = 0; lane < count; ++lane) {
        Block<A> block(p, scores, first + lane);
        int64_t *its = found.data() + lane * p.width;
        if (growing)
          growing->find(block, its);
        else if (p.way == kSums)
          largest_sums(p, block, sums, its);
        else if (p.way == kAll)
          std::iota(its, its + p.width, 0);
        if (columns)
          std::copy_n(its, p.width, columns + (first + lane) * p.width);
        if (mask)
          mark(p, block, its, mask);
      }
    }
  }
  return 0;
}

} // namespace

// `numbers` are the fields of Problem, in order; scores are float or double. What is not asked for is null: the columns,
// [blocks][width], and the mask, [rows][columns], false so far. The answer is 1 if there is a NaN among the scores, else 0.

extern "C" int64_t vnm_project(int64_t wide, const int64_t *numbers, const void *scores, int64_t *columns, bool *mask) {
  Problem p;
  std::memcpy(&p, numbers, sizeof(p));
  return wide ? project<double>(p, (const double *)scores, columns, mask)
              : project<float>(p, (const float *)scores, columns, mask);
}
