// Attention over a paged key/value cache, for all rows of a step in one call (`attention/reference.py` has the formula).
//
// A unit of work is a block of one row's queries, some key/value heads with all query heads that read them, and a span
// of the keys. It goes over the keys in tiles with a running maximum (Milakov and Gimelshein, 2018, arXiv 1805.02867).
// In a tile, keys are transposed once so that a lane is a key, and every query head reuses them. A unit takes as many
// key/value heads as leave work for every thread, since a token's heads lie side by side in the cache. Decode rows with
// long contexts are cut into spans of SPAN keys whose results are merged afterwards. No result depends on other rows,
// on how units are cut or on the number of threads.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "vec.h"
#include "work.h"

namespace peftmux {
namespace {

constexpr int TILE = 4 * W;     // keys
constexpr int SPAN = 1024;      // keys of one unit of a decode row
constexpr int BLOCK_HEADS = 32;  // query heads of one unit, all its queries together
constexpr int VH = W == 16 ? 4 : 2;      // query heads of one register tile
constexpr int VECTORS = W == 16 ? 4 : 2;  // value columns of one register tile, in vectors

template <class T>
struct Problem {
  const T* q;  // [T, H, key_dim], tokens q_stride apart
  int64_t q_stride;
  const T* k;  // [NB, block, kv_heads, key_dim]
  const T* v;  // [NB, block, kv_heads, value_dim]
  T* out;      // [T, H, value_dim]
  const float* sinks;    // [H] or null
  const int32_t* table;  // [rows + 1][table_stride]: first token, context, blocks
  int64_t table_stride;
  int32_t rows, heads, kv_heads, key_dim, value_dim, block;
  float scale, softcap;  // softcap 0: none
  int32_t window;        // 0: none
  int32_t most;          // queries of a row that is computed here; rows with more are left to the caller
  int32_t threads;

  int group() const { return heads / kv_heads; }
};

// Queries first .. first + queries of a row, key/value heads kv_first .. kv_last, keys low .. high. The results of
// kv_head go to partial + kv_head * spans, or with spans 0 to the output.
struct Unit {
  int row, first, queries, kv_first, kv_last, low, high, partial, spans;
};

// What one query head has seen so far.
struct Running {
  float largest, total;
};

// How keys and queries meet: a dword holds one float, or two bfloat16 values.
template <class T>
struct Pair;

template <>
struct Pair<float> {
  static constexpr int PER_DWORD = 1;
  static vf mac(vf acc, vu key, uint32_t query) {
    float q;
    memcpy(&q, &query, 4);
    return fma((vf)key, splat(q), acc);
  }
};

template <>
struct Pair<bf16> {
  static constexpr int PER_DWORD = 2;
  static vf mac(vf acc, vu key, uint32_t query) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)key, (__m512bh)_mm512_set1_epi32((int)query));
#else
    vu q = query - vu{};
    acc = fma((vf)(key << 16), (vf)(q << 16), acc);
    return fma((vf)(key & 0xffff0000u), (vf)(q & 0xffff0000u), acc);
#endif
  }
};

#if defined(__clang__)
#define PEFTMUX_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PEFTMUX_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vu){__VA_ARGS__})
#endif

inline vu zip_low(vu a, vu b) {
#if defined(__AVX512F__)
  return PEFTMUX_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#else
  return PEFTMUX_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#endif
}

inline vu zip_high(vu a, vu b) {
#if defined(__AVX512F__)
  return PEFTMUX_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
  return PEFTMUX_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#endif
}

// Transpose W x W dwords: log2(W) rounds of a perfect shuffle.
inline void transpose(vu (&m)[W]) {
  for (int round = 1; round < W; round *= 2) {
    vu n[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      n[2 * i] = zip_low(m[i], m[i + W / 2]);
      n[2 * i + 1] = zip_high(m[i], m[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) m[i] = n[i];
  }
}

// The buffers of one thread; `dwords` of a key, rounded up to whole vectors. `heads` are those of one key/value head,
// all queries of the unit together: query by query, head by head.
struct Scratch {
  std::vector<uint32_t> queries;  // [kv_heads][heads][dwords]
  std::vector<float> sums;        // [kv_heads][heads][value_dim]
  std::vector<Running> running;   // [kv_heads][heads]
  std::vector<uint32_t> keys;     // [dwords][TILE]
  std::vector<float> weights;     // [heads][TILE]
  std::vector<float> rescale;     // [heads]

  void fit(int kv_heads, int heads, int dwords, int value_dim) {
    queries.assign((size_t)kv_heads * heads * dwords, 0);
    sums.assign((size_t)kv_heads * heads * value_dim, 0.0f);
    running.assign(kv_heads * heads, Running{-INFINITY, 0.0f});
    keys.resize((size_t)dwords * TILE);
    weights.resize((size_t)heads * TILE);
    rescale.resize(heads);
  }
};

// Keys are elements of `rows`, `groups` times W of them (the last ones may repeat), key_dim long.
template <class T>
void transpose_keys(const T* const* rows, int groups, int key_dim, uint32_t* keys) {
  const int step = W * Pair<T>::PER_DWORD;
  for (int g = 0; g < groups; ++g)
    for (int d = 0; d < key_dim; d += step) {
      vu m[W];
      if (d + step <= key_dim)
        for (int i = 0; i < W; ++i) m[i] = peek<vu>(rows[g * W + i] + d);
      else
        for (int i = 0; i < W; ++i) {
          m[i] = vu{};
          memcpy(&m[i], rows[g * W + i] + d, (key_dim - d) * sizeof(T));
        }
      transpose(m);
      for (int i = 0; i < W; ++i) poke(keys + (size_t)(d / Pair<T>::PER_DWORD + i) * TILE + g * W, m[i]);
    }
}

// scores[h][key] = query h . key, for H query heads and G groups of W keys.
template <class T, int H, int G>
void score_tile(const uint32_t* queries, const uint32_t* keys, int dwords, int used, float* scores) {
  vf acc[H][G] = {};
  for (int d = 0; d < used; ++d) {
    vu k[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) k[g] = peek<vu>(keys + (size_t)d * TILE + g * W);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) acc[h][g] = Pair<T>::mac(acc[h][g], k[g], queries[h * dwords + d]);
  }
  for (int h = 0; h < H; ++h)
    for (int g = 0; g < G; ++g) poke(scores + h * TILE + g * W, acc[h][g]);
}

template <class T, int H>
void score_heads(const uint32_t* queries, const uint32_t* keys, int dwords, int used, int groups, float* scores) {
  int g = 0;
  if (groups == 4) score_tile<T, H, 4>(queries, keys, dwords, used, scores), g = 4;
  if (groups - g >= 2) score_tile<T, H, 2>(queries, keys, dwords, used, scores), g = 2;
  if (groups - g == 1) score_tile<T, H, 1>(queries, keys + g * W, dwords, used, scores + g * W);
}

// body(h, n) for neighbouring heads h .. h + n, n a compile-time constant of at most VH.
template <class Body>
inline void each_heads(int heads, const Body& body) {
  int h = 0;
  for (; h + VH <= heads; h += VH) body(h, std::integral_constant<int, VH>{});
  if (VH > 3 && heads - h == 3) body(h, std::integral_constant<int, 3>{});
  if (heads - h == 2) body(h, std::integral_constant<int, 2>{});
  if (heads - h == 1) body(h, std::integral_constant<int, 1>{});
}

template <class T>
void score(const uint32_t* queries, int heads, int dwords, int used, int groups, Scratch& s) {
  each_heads(heads, [&](int h, auto n) {
    score_heads<T, n>(queries + (size_t)h * dwords, s.keys.data(), dwords, used, groups, &s.weights[h * TILE]);
  });
}

// Scores of one head in, weights exp(score - largest) out; keys from cache index `at` on. Returns the factor for what
// was summed before.
float soften(float* scores, int groups, int at, int first, int last, float scale, float softcap, Running& running) {
  vf s[TILE / W], top = splat(-INFINITY);
  for (int g = 0; g < groups; ++g) {
    vf x = peek<vf>(scores + g * W) * scale;
    if (softcap != 0) x = tanh(x / softcap) * softcap;
    vi index = lanes() + (at + g * W);
    s[g] = choose((index >= first) & (index <= last), x, splat(-INFINITY));
    top = larger(s[g], top);
  }
  float before = running.largest, now = std::max(before, largest(top));
  if (now == -INFINITY) now = 0;  // nothing seen yet: every weight below is 0
  vf total = {};
  for (int g = 0; g < groups; ++g) {
    s[g] = exp(s[g] - now);
    total += s[g];
    poke(scores + g * W, s[g]);
  }
  float factor = before == -INFINITY ? 0.0f : std::exp(before - now);
  running.largest = std::max(before, largest(top));
  running.total = running.total * factor + sum(total);
  return factor;
}

// sums[h][c] = sums[h][c] * rescale[h] + sum over the tile's keys of weights[h][j] * values[j][c]: H heads, C vectors.
template <class T, int H, int C>
void weigh_tile(const float* weights, const T* const* values, int keys, int column, const float* rescale, float* sums,
                int value_dim) {
  vf acc[H][C];
  for (int h = 0; h < H; ++h)
    for (int c = 0; c < C; ++c) acc[h][c] = load(sums + (size_t)h * value_dim + column + c * W) * rescale[h];
  for (int j = 0; j < keys; ++j) {
    vf v[C];
    for (int c = 0; c < C; ++c) v[c] = load(values[j] + column + c * W);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      vf w = splat(weights[h * TILE + j]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[h][c] = fma(w, v[c], acc[h][c]);
    }
  }
  for (int h = 0; h < H; ++h)
    for (int c = 0; c < C; ++c) store(sums + (size_t)h * value_dim + column + c * W, acc[h][c]);
}

// The last n < W columns of one head.
template <class T>
void weigh_tail(const float* weights, const T* const* values, int keys, int column, float rescale, float* sums, int n) {
  vf acc = load(sums + column, n) * rescale;
  for (int j = 0; j < keys; ++j) acc = fma(splat(weights[j]), load(values[j] + column, n), acc);
  store(sums + column, acc, n);
}

template <class T, int H>
void weigh_heads(const float* weights, const T* const* values, int keys, const float* rescale, float* sums, int dim) {
  int c = 0;
  for (; c + VECTORS * W <= dim; c += VECTORS * W) weigh_tile<T, H, VECTORS>(weights, values, keys, c, rescale, sums, dim);
  for (; c + W <= dim; c += W) weigh_tile<T, H, 1>(weights, values, keys, c, rescale, sums, dim);
  for (int h = 0; c < dim && h < H; ++h)
    weigh_tail<T>(weights + h * TILE, values, keys, c, rescale[h], sums + (size_t)h * dim, dim - c);
}

template <class T>
void weigh(const Scratch& s, int heads, const T* const* values, int keys, float* sums, int dim) {
  each_heads(heads, [&](int h, auto n) {
    weigh_heads<T, n>(&s.weights[h * TILE], values, keys, &s.rescale[h], sums + (size_t)h * dim, dim);
  });
}

// Divide what was seen by its total, with the sink's weight in it.
template <class T>
void finish(const Problem<T>& p, const float* sums, Running r, int head, T* out) {
  float factor = 1;
  if (p.sinks) {
    float top = std::max(r.largest, p.sinks[head]);
    factor = std::exp(r.largest - top);
    r.total = r.total * factor + std::exp(p.sinks[head] - top);
  }
  factor /= r.total;
  int c = 0;
  for (; c + W <= p.value_dim; c += W) store(out + c, load(sums + c) * factor);
  if (c < p.value_dim) store(out + c, load(sums + c, p.value_dim - c) * factor, p.value_dim - c);
}

// Partial results of the spans of decode rows: [partial][group] sums and running values.
struct Partials {
  std::vector<float> sums;
  std::vector<Running> running;
};

template <class T>
void attend(const Problem<T>& p, const Unit& u, Scratch& s, Partials& partials) {
  const int32_t* row = p.table + u.row * p.table_stride;
  const int group = p.group(), heads = u.queries * group, kv_heads = u.kv_last - u.kv_first, dim = p.value_dim;
  const int used = (p.key_dim + Pair<T>::PER_DWORD - 1) / Pair<T>::PER_DWORD, dwords = (used + W - 1) / W * W;
  const int index = row[1] - (row[p.table_stride] - row[0]) + u.first;  // of the first query, in the cache
  s.fit(kv_heads, heads, dwords, dim);
  for (int kv = 0; kv < kv_heads; ++kv)
    for (int h = 0; h < heads; ++h) {
      int head = (u.kv_first + kv) * group + h % group;
      const T* q = p.q + (row[0] + u.first + h / group) * p.q_stride + (int64_t)head * p.key_dim;
      memcpy(&s.queries[((size_t)kv * heads + h) * dwords], q, p.key_dim * sizeof(T));
    }
  for (int at = u.low; at < u.high; at += TILE) {
    int count = std::min(TILE, u.high - at), groups = (count + W - 1) / W;
    const T *keys[TILE], *values[TILE];
    for (int j = 0; j < groups * W; ++j) {
      int key = at + std::min(j, count - 1);
      int64_t slot = ((int64_t)row[2 + key / p.block] * p.block + key % p.block) * p.kv_heads + u.kv_first;
      keys[j] = p.k + slot * p.key_dim;
      values[j] = p.v + slot * dim;
    }
    for (int kv = 0; kv < kv_heads; ++kv) {
      transpose_keys(keys, groups, p.key_dim, s.keys.data());
      score<T>(&s.queries[(size_t)kv * heads * dwords], heads, dwords, used, groups, s);
      for (int h = 0; h < heads; ++h) {
        int last = index + h / group, first = p.window ? last - p.window + 1 : 0;
        s.rescale[h] = soften(&s.weights[h * TILE], groups, at, first, std::min(last, u.high - 1), p.scale, p.softcap,
                              s.running[kv * heads + h]);
      }
      weigh<T>(s, heads, values, count, &s.sums[(size_t)kv * heads * dim], dim);
      for (int j = 0; j < groups * W; ++j) keys[j] += p.key_dim, values[j] += dim;
    }
  }
  for (int kv = 0; kv < kv_heads; ++kv)
    for (int h = 0; h < heads; ++h) {
      int kv_head = u.kv_first + kv, head = kv_head * group + h % group;
      const float* sums = &s.sums[((size_t)kv * heads + h) * dim];
      const Running& running = s.running[kv * heads + h];
      if (u.spans) {
        int64_t to = (int64_t)(u.partial + kv_head * u.spans) * group + h;
        std::copy(sums, sums + dim, &partials.sums[to * dim]);
        partials.running[to] = running;
      } else {
        finish(p, sums, running, head, p.out + ((int64_t)(row[0] + u.first + h / group) * p.heads + head) * dim);
      }
    }
}

// The spans of one decode row and key/value head: partials first .. first + count.
struct Merge {
  int row, kv_head, first, count;
};

template <class T>
void merge(const Problem<T>& p, const Merge& m, Partials& partials) {
  const int group = p.group(), dim = p.value_dim;
  for (int g = 0; g < group; ++g) {
    Running all{-INFINITY, 0.0f};
    for (int i = 0; i < m.count; ++i)
      all.largest = std::max(all.largest, partials.running[(m.first + i) * group + g].largest);
    float* sums = &partials.sums[((int64_t)m.first * group + g) * dim];  // the first span's, where all are gathered
    for (int i = 0; i < m.count; ++i) {
      const Running& r = partials.running[(m.first + i) * group + g];
      const float* from = &partials.sums[((int64_t)(m.first + i) * group + g) * dim];
      float factor = std::exp(r.largest - all.largest);
      all.total += r.total * factor;
      for (int c = 0; c < dim; ++c) sums[c] = (i ? sums[c] : 0.0f) + from[c] * factor;
    }
    int head = m.kv_head * group + g;
    int64_t token = p.table[m.row * p.table_stride];
    finish(p, sums, all, head, p.out + (token * p.heads + head) * dim);
  }
}

struct Plan {
  std::vector<Unit> units;
  std::vector<Merge> merges;
  Partials partials;
};

// The key/value heads of one unit: all of them, unless that leaves too few units for the threads.
template <class T>
int heads_at_once(const Problem<T>& p, int units) {
  int wanted = p.threads > 1 ? 4 * p.threads : 1;
  int parts = std::min(p.kv_heads, std::max(1, (wanted + units - 1) / std::max(1, units)));
  return (p.kv_heads + parts - 1) / parts;
}

template <class T>
void make_plan(const Problem<T>& p, Plan& plan) {
  plan.units.clear(), plan.merges.clear();
  int partials = 0, block = std::max(1, BLOCK_HEADS / p.group()), units = 0;
  auto queries_of = [&](int r) { return p.table[(r + 1) * p.table_stride] - p.table[r * p.table_stride]; };
  for (int r = 0; r < p.rows; ++r) units += queries_of(r) > p.most ? 0 : (queries_of(r) + block - 1) / block;
  const int at_once = heads_at_once(p, units);
  for (int r = 0; r < p.rows; ++r) {
    int queries = queries_of(r), context = p.table[r * p.table_stride + 1];
    for (int first = 0; first < queries && queries <= p.most; first += block) {
      int count = std::min(block, queries - first), at = context - queries + first;
      int low = p.window ? std::max(0, at - p.window + 1) : 0, high = at + count;
      int spans = queries == 1 ? (high - low + SPAN - 1) / SPAN : 1;
      for (int h = 0; h < p.kv_heads; h += at_once) {
        int last = std::min(p.kv_heads, h + at_once);
        if (spans == 1) plan.units.push_back({r, first, count, h, last, low, high, 0, 0});
        for (int s = 0; s < spans && spans > 1; ++s)
          plan.units.push_back({r, first, count, h, last, low + s * SPAN, std::min(high, low + (s + 1) * SPAN),
                                partials + s, spans});
      }
      for (int h = 0; h < p.kv_heads && spans > 1; ++h, partials += spans)
        plan.merges.push_back({r, h, partials, spans});
    }
  }
  plan.partials.sums.resize((size_t)partials * p.group() * p.value_dim);
  plan.partials.running.resize((size_t)partials * p.group());
}

template <class T>
void run(const Problem<T>& p, int tokens) {
  static thread_local Plan plan;
  Plan& mine = plan;
  make_plan(p, mine);
  int used = p.table[p.rows * p.table_stride];
  std::fill_n((uint8_t*)(p.out + (int64_t)used * p.heads * p.value_dim),
              (int64_t)(tokens - used) * p.heads * p.value_dim * sizeof(T), 0);
  share(p.threads, (int)mine.units.size(), [&](int i) {
    static thread_local Scratch scratch;
    attend(p, mine.units[i], scratch, mine.partials);
  });
  share(p.threads, (int)mine.merges.size(), [&](int i) { merge(p, mine.merges[i], mine.partials); });
}

template <class T>
void store_kv(const T* k, int64_t k_stride, const T* v, int64_t v_stride, T* k_cache, T* v_cache, const int64_t* slots,
              int tokens, int k_width, int v_width) {
  for (int t = 0; t < tokens; ++t) {
    memcpy(k_cache + slots[t] * k_width, k + t * k_stride, k_width * sizeof(T));
    memcpy(v_cache + slots[t] * v_width, v + t * v_stride, v_width * sizeof(T));
  }
}

}  // namespace
}  // namespace peftmux

#define PEFTMUX_ATTENTION(NAME, T)                                                                                    \
  extern "C" void peftmux_attention_##NAME(                                                                           \
      const T* q, int64_t q_stride, const T* k, const T* v, T* out, const float* sinks, const int32_t* table,         \
      int64_t table_stride, int32_t rows, int32_t tokens, int32_t heads, int32_t kv_heads, int32_t key_dim,           \
      int32_t value_dim, int32_t block, float scale, float softcap, int32_t window, int32_t most,                     \
      int32_t threads) {                                                                                              \
    peftmux::run(peftmux::Problem<T>{q, q_stride, k, v, out, sinks, table, table_stride, rows, heads, kv_heads,       \
                                     key_dim, value_dim, block, scale, softcap, window, most, threads},               \
                 tokens);                                                                                             \
  }                                                                                                                   \
  extern "C" void peftmux_store_kv_##NAME(const T* k, int64_t k_stride, const T* v, int64_t v_stride, T* k_cache,     \
                                          T* v_cache, const int64_t* slots, int32_t tokens, int32_t k_width,          \
                                          int32_t v_width) {                                                          \
    peftmux::store_kv(k, k_stride, v, v_stride, k_cache, v_cache, slots, tokens, k_width, v_width);                   \
  }

PEFTMUX_ATTENTION(f32, float)
PEFTMUX_ATTENTION(bf16, peftmux::bf16)
