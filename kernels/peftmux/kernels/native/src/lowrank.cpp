// The gathered low-rank operator at one linear site, for all adapters of a step in one call:
//     y[t] = out_scale * (y[t] + (rank_scale * (A x[t])) B) + bias,    per slice of y, accumulated in float32
// where a slice with experts has the ranks of each expert weighed by its share in the softmax of its gate's rows of A.
// Two stages: t = A x for all tokens, then what t adds to y. A unit of work holds all rows of one adapter (up to
// ROWS), so its weights are read once. An element of t or y is computed by one thread in an order that depends on
// nothing but its own row and weights. With many adapters the weights come from memory once a step in pieces too short
// for the hardware to foresee: each unit asks for the next one's while it works.

#include <algorithm>
#include <cmath>
#include <vector>

#include "vec.h"
#include "work.h"

namespace peftmux {

// The layouts of `lowrank/native_path.py`.
struct Slot {
  const void* a;               // [R + experts, in]: after the ranks of all slices the gates of those that have one
  const void* b;               // of each slice, [r, PANEL] for each PANEL columns, the last one narrower
  const float* rank_scale;     // [R + experts]
  const float* out_scale;      // [out], or null together with bias
  const float* bias;           // [out]
  const int32_t* rank_ends;    // [slices]; null: no adapter in this slot
  const int32_t* expert_ends;  // [slices]; null: no gates
};

struct Site {
  int32_t in, out, slices, slots;
  const int32_t* slice_ends;  // [slices]
  const Slot* table;          // [slots]
};

struct Run {
  int32_t slot, start, end;
};

namespace {

constexpr int ROWS = 96;
constexpr int RANKS = W == 16 ? 8 : 4;    // of one tile of the first stage
constexpr int X_ROWS = 3;                 // rows of one tile of the first stage
constexpr int VECTORS = W == 16 ? 4 : 2;  // columns of one tile of the second stage, in vectors
constexpr int Y_ROWS = 4;
constexpr int PANEL = 64;              // as in `lowrank/native_path.py`
constexpr int COLUMNS = 4 * PANEL;     // of one unit of the second stage
constexpr int LINE = 64;               // bytes

// Rows of one adapter: tokens[first .. first + count); its ranks stand at t + offset, [R][count].
struct Group {
  const Slot* slot;
  int first, count;
  int64_t offset;
};

struct ShrinkUnit {
  int group, rank, row;
};

struct ExpandUnit {
  int group, slice, column, row;
  const void* b;  // the slot's panels from `column` on
};

// Asks for the memory behind `next`, as fast as the caller reads its own.
struct Ahead {
  const char* next;

  void fetch(int bytes) {
    if (!next) return;
    for (int i = 0; i < bytes; i += LINE) __builtin_prefetch(next + i, 0, 2);
    next += bytes;
  }
};

struct Plan {
  std::vector<int32_t> tokens;
  std::vector<Group> groups;
  std::vector<ShrinkUnit> shrink;
  std::vector<ExpandUnit> expand;
  std::vector<float> t;
};

// Rows of A.
int rows_of(const Slot& s, int slices) {
  return s.rank_ends[slices - 1] + (s.expert_ends ? s.expert_ends[slices - 1] : 0);
}

void plan_group(Plan& plan, const Site& site, const Slot& slot, int first, int element) {
  Group g{&slot, first, (int)plan.tokens.size() - first, (int64_t)plan.t.size()};
  int index = (int)plan.groups.size(), ranks = rows_of(slot, site.slices);
  plan.groups.push_back(g);
  plan.t.resize(plan.t.size() + (size_t)ranks * g.count);
  for (int row = 0; row < g.count; row += ROWS) {
    for (int rank = 0; rank < ranks; rank += RANKS) plan.shrink.push_back({index, rank, row});
    const char* b = (const char*)slot.b;
    for (int s = 0, begin = 0, rank = 0; s < site.slices; begin = site.slice_ends[s], rank = slot.rank_ends[s], ++s) {
      int64_t column_bytes = (int64_t)(slot.rank_ends[s] - rank) * element;
      if (column_bytes || slot.out_scale)
        for (int c = begin; c < site.slice_ends[s]; c += COLUMNS)
          plan.expand.push_back({index, s, c, row, b + (c - begin) * column_bytes});
      b += (site.slice_ends[s] - begin) * column_bytes;
    }
  }
}

// `runs` is sorted by slot.
void make_plan(Plan& plan, const Site& site, const Run* runs, int count, int element) {
  plan.tokens.clear(), plan.groups.clear(), plan.shrink.clear(), plan.expand.clear(), plan.t.clear();
  for (int i = 0; i < count;) {
    int slot = runs[i].slot, first = (int)plan.tokens.size();
    bool held = slot < site.slots && site.table[slot].rank_ends;
    for (; i < count && runs[i].slot == slot; ++i)
      if (held)
        for (int t = runs[i].start; t < runs[i].end; ++t) plan.tokens.push_back(t);
    if (held) plan_group(plan, site, site.table[slot], first, element);
  }
}

// out[n * ld + m] = scale[n] * dot(x[m], a[n])
template <class T, int M, int N>
void dot_tile(const T* const* x, const T* a, int k, const float* scale, float* out, int64_t ld, Ahead ahead) {
  typedef Dot<T> D;
  vf acc[M][N] = {};
  int i = 0;
  for (; i + D::STEP <= k; i += D::STEP) {
    typename D::V xs[M];
    for (int m = 0; m < M; ++m) xs[m] = D::get(x[m] + i);
    ahead.fetch(N * D::STEP * sizeof(T));
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      typename D::V as = D::get(a + (int64_t)n * k + i);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) acc[m][n] = D::mac(acc[m][n], xs[m], as);
    }
  }
  if (i < k)
    for (int n = 0; n < N; ++n) {
      typename D::V as = D::get(a + (int64_t)n * k + i, k - i);
      for (int m = 0; m < M; ++m) acc[m][n] = D::mac(acc[m][n], D::get(x[m] + i, k - i), as);
    }
  for (int n = 0; n < N; ++n)
    for (int m = 0; m < M; ++m) out[n * ld + m] = scale[n] * sum(acc[m][n]);
}

template <class T, int N>
void dot_rows(const T* const* x, int rows, const T* a, int k, const float* scale, float* out, int64_t ld,
              Ahead ahead) {
  int m = 0;
  for (; m + X_ROWS <= rows; m += X_ROWS, ahead.next = nullptr)
    dot_tile<T, X_ROWS, N>(x + m, a, k, scale, out + m, ld, ahead);
  if (rows - m == 2) dot_tile<T, 2, N>(x + m, a, k, scale, out + m, ld, ahead);
  if (rows - m == 1) dot_tile<T, 1, N>(x + m, a, k, scale, out + m, ld, ahead);
}

template <class T>
void shrink(const Site& site, Plan& plan, int unit, const T* x, int64_t x_stride) {
  const ShrinkUnit& u = plan.shrink[unit];
  const Group& g = plan.groups[u.group];
  const T* rows[ROWS];
  int count = std::min(ROWS, g.count - u.row), k = site.in;
  for (int m = 0; m < count; ++m) rows[m] = x + plan.tokens[g.first + u.row + m] * x_stride;
  int end = std::min(u.rank + RANKS, rows_of(*g.slot, site.slices));
  Ahead ahead{};
  if (unit + 1 < (int)plan.shrink.size()) {
    const ShrinkUnit& then = plan.shrink[unit + 1];
    ahead.next = (const char*)((const T*)plan.groups[then.group].slot->a + (int64_t)then.rank * k);
  }
  for (int n = u.rank; n < end;) {
    const T* a = (const T*)g.slot->a + (int64_t)n * k;
    const float* scale = g.slot->rank_scale + n;
    float* out = plan.t.data() + g.offset + (int64_t)n * g.count + u.row;
    if (end - n == RANKS) {
      dot_rows<T, RANKS>(rows, count, a, k, scale, out, g.count, ahead);
      n += RANKS;
    } else {
      dot_rows<T, 1>(rows, count, a, k, scale, out, g.count, Ahead{});
      n += 1;
    }
  }
}

// What a tile of the second stage reads besides y: t[j * t_stride + m], b[j * b_stride + c], j < ranks.
template <class T>
struct Terms {
  const float* t;
  int64_t t_stride;
  const T* b;
  int64_t b_stride;
  int ranks;
  const float* out_scale;
  const float* bias;
};

inline vf finish(vf y, vf added, const float* out_scale, const float* bias, int n) {
  vf v = y + added;
  if (!out_scale) return v;
  return n < W ? fma(v, load(out_scale, n), load(bias, n)) : fma(v, load(out_scale), load(bias));
}

// M rows, C whole vectors of columns from y[m] on.
template <class T, int M, int C>
void add_tile(const Terms<T>& s, T* const* y, int column, Ahead ahead) {
  vf acc[M][C] = {};
  for (int j = 0; j < s.ranks; ++j) {
    vf b[C];
    for (int c = 0; c < C; ++c) b[c] = load(s.b + j * s.b_stride + c * W);
    ahead.fetch(C * W * sizeof(T));
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      vf t = splat(s.t[j * s.t_stride + m]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[m][c] = fma(t, b[c], acc[m][c]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int c = 0; c < C; ++c) {
      T* to = y[m] + column + c * W;
      const float* scale = s.out_scale ? s.out_scale + c * W : nullptr;
      store(to, finish(load(to), acc[m][c], scale, s.bias + c * W, W));
    }
}

// One row, the last n < W columns.
template <class T>
void add_tail(const Terms<T>& s, T* y, int n) {
  vf acc = {};
  for (int j = 0; j < s.ranks; ++j) acc = fma(splat(s.t[j * s.t_stride]), load(s.b + j * s.b_stride, n), acc);
  store(y, finish(load(y, n), acc, s.out_scale, s.bias, n), n);
}

// M rows, all columns of the unit that begins at `column`; s as for the first row, `ahead` as for the first tile of rows.
template <class T, int M>
void add_rows(Terms<T> s, const Slot& slot, T* const* y, const T* panel, int column, int end, Ahead ahead) {
  for (; column < end; column += PANEL) {
    int width = std::min(PANEL, end - column), c = 0;
    s.b_stride = width;
    auto at = [&](int offset) {
      s.b = panel + offset;
      s.out_scale = slot.out_scale ? slot.out_scale + column + offset : nullptr;
      s.bias = slot.out_scale ? slot.bias + column + offset : nullptr;
      return column + offset;
    };
    for (; c + VECTORS * W <= width; c += VECTORS * W) {
      add_tile<T, M, VECTORS>(s, y, at(c), ahead);
      if (ahead.next) ahead.next += (int64_t)s.ranks * VECTORS * W * sizeof(T);
    }
    for (; c + W <= width; c += W) add_tile<T, M, 1>(s, y, at(c), Ahead{});
    if (c < width) {
      at(c);
      const float* t = s.t;
      for (int m = 0; m < M; ++m, ++s.t) add_tail<T>(s, y[m] + column + c, width - c);
      s.t = t;
    }
    panel += (int64_t)s.ranks * width;
  }
}

// Puts a weighed copy in the place of the t of a unit's rows. logits[e * t_stride + m]: of expert e, row m.
template <class T>
void weigh(Terms<T>& s, const float* logits, int experts, int rows) {
  static thread_local std::vector<float> weighed;
  weighed.resize((size_t)s.ranks * rows);
  int share = s.ranks / experts;
  for (int m = 0; m < rows; ++m) {
    float largest = logits[m], sum = 0;
    for (int e = 1; e < experts; ++e) largest = std::max(largest, logits[e * s.t_stride + m]);
    for (int e = 0; e < experts; ++e) sum += std::exp(logits[e * s.t_stride + m] - largest);
    for (int e = 0; e < experts; ++e) {
      float weight = std::exp(logits[e * s.t_stride + m] - largest) / sum;
      for (int j = e * share; j < (e + 1) * share; ++j) weighed[(size_t)j * rows + m] = weight * s.t[j * s.t_stride + m];
    }
  }
  s.t = weighed.data();
  s.t_stride = rows;
}

template <class T>
void expand(const Site& site, const Plan& plan, int unit, T* y, int64_t y_stride) {
  const ExpandUnit& u = plan.expand[unit];
  const Group& g = plan.groups[u.group];
  const Slot& slot = *g.slot;
  T* rows[ROWS];
  int count = std::min(ROWS, g.count - u.row);
  for (int m = 0; m < count; ++m) rows[m] = y + plan.tokens[g.first + u.row + m] * y_stride;
  int first_rank = u.slice ? slot.rank_ends[u.slice - 1] : 0;
  int end = std::min(u.column + COLUMNS, site.slice_ends[u.slice]);
  Terms<T> s{};
  s.t = plan.t.data() + g.offset + (int64_t)first_rank * g.count + u.row;
  s.t_stride = g.count;
  s.ranks = slot.rank_ends[u.slice] - first_rank;
  const T* b = (const T*)u.b;
  if (slot.expert_ends) {
    int before = u.slice ? slot.expert_ends[u.slice - 1] : 0;
    int experts = slot.expert_ends[u.slice] - before;
    const float* logits = plan.t.data() + g.offset + (int64_t)(slot.rank_ends[site.slices - 1] + before) * g.count;
    if (experts) weigh(s, logits + u.row, experts, count);
  }
  Ahead ahead{unit + 1 < (int)plan.expand.size() ? (const char*)plan.expand[unit + 1].b : nullptr};
  int m = 0;
  for (; m + Y_ROWS <= count; m += Y_ROWS, s.t += Y_ROWS, ahead.next = nullptr)
    add_rows<T, Y_ROWS>(s, slot, rows + m, b, u.column, end, ahead);
  for (; m < count; ++m, ++s.t, ahead.next = nullptr) add_rows<T, 1>(s, slot, rows + m, b, u.column, end, ahead);
}

template <class T>
void apply(const Site& site, T* y, int64_t y_stride, const T* x, int64_t x_stride, const Run* runs, int count,
           int threads) {
  static thread_local Plan plan;
  make_plan(plan, site, runs, count, sizeof(T));
  Plan& p = plan;
  share(
      threads, (int)p.shrink.size(), [&](int i) { shrink<T>(site, p, i, x, x_stride); },
      (int)p.expand.size(), [&](int i) { expand<T>(site, p, i, y, y_stride); });
}

}  // namespace

}  // namespace peftmux

extern "C" void peftmux_lowrank_f32(const peftmux::Site* site, float* y, int64_t y_stride, const float* x,
                                    int64_t x_stride, const peftmux::Run* runs, int32_t count, int32_t threads) {
  peftmux::apply(*site, y, y_stride, x, x_stride, runs, count, threads);
}

extern "C" void peftmux_lowrank_bf16(const peftmux::Site* site, peftmux::bf16* y, int64_t y_stride,
                                     const peftmux::bf16* x, int64_t x_stride, const peftmux::Run* runs, int32_t count,
                                     int32_t threads) {
  peftmux::apply(*site, y, y_stride, x, x_stride, runs, count, threads);
}
