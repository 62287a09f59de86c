// y = x W^T + b in bfloat16 for small batches, where reading W takes the time: on the CPU's matrix tiles (AMX, Intel's
// "Architecture Instruction Set Extensions and Future Features", chapter on Intel AMX). W lies in the order in which
// the tiles read it (`dense/layout.py`), so that each thread streams through memory. Sums are float32 in the order of
// the input's elements, whatever else is in the batch, and are rounded once.

#include <algorithm>
#include <cstdint>

#include "vec.h"
#include "work.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

namespace peftmux {
namespace {

constexpr int TILE = 16;                    // rows of a tile, and its floats in a row
constexpr int DEPTH = 32;                   // input elements of a tile
constexpr int64_t STEP = 2 * TILE * DEPTH;  // elements of W for two tiles side by side
constexpr int ROWS = 2 * TILE;              // batch rows, and
constexpr int COLUMNS = 2 * TILE;           // outputs, that are summed at a time
constexpr int CHUNK = 256;                  // batch rows that pass over a panel of W while it is in the cache
constexpr int AHEAD = 8192;                 // bytes of W that are asked for before they are read, where it is read once
constexpr int64_t SERIAL = 1 << 16;         // elements of W that are not worth waking other threads for

// The operand of LDTILECFG: tiles 0 to 3 are sums, 4 and 5 are rows of x, 6 and 7 are columns of W.
struct alignas(64) Shapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16];

  Shapes(int first, int second) : rows{} {
    const int each[8] = {first, first, second, second, first, second, TILE, TILE};
    for (int i = 0; i < 8; ++i) {
      rows[i] = (uint8_t)each[i];
      if (!each[i]) bytes[i] = 0;
    }
  }
};

struct Product {
  const bf16* x;
  int64_t stride;  // elements from one row of x to the next
  const bf16* w;
  const bf16* bias;  // or null
  bf16* y;           // rows of `outputs` elements
  int rows, steps, outputs;

  int panels() const { return (outputs + COLUMNS - 1) / COLUMNS; }
};

// Asks for lines of W into the second-level cache; past its end this does nothing.
inline const char* fetch(const char* next, int lines) {
  for (int i = 0; i < lines; ++i) _mm_prefetch(next + 64 * i, _MM_HINT_T1);
  return next + 64 * lines;
}

// Tiles 0 to 3 = x W^T: of ROWS rows, or of the first TILE where there are no more. Meanwhile W from `next` on is
// fetched, `lines` for each tile: as much as is read (ONCE), or less.
template <bool BOTH, bool ONCE>
inline void sum_tiles(const bf16* x, int64_t stride, const bf16* w, int steps, const char* next, int lines) {
  const bf16* below = x + TILE * stride;
  if (ONCE) lines = TILE;
  _tile_zero(0);
  _tile_zero(1);
  if (BOTH) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int s = 0; s < steps; ++s, w += STEP, x += DEPTH, below += DEPTH) {
    _tile_loadd(6, w, 64);
    next = fetch(next, lines);
    _tile_loadd(4, x, stride * sizeof(bf16));
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + STEP / 2, 64);
    next = fetch(next, lines);
    _tile_dpbf16ps(1, 4, 7);
    if (BOTH) {
      _tile_loadd(5, below, stride * sizeof(bf16));
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

template <bool BOTH>
inline void sum_pass(const bf16* x, int64_t stride, const bf16* w, int steps, int pass, int passes) {
  if (passes == 1) return sum_tiles<BOTH, true>(x, stride, w, steps, (const char*)w + AHEAD, 0);
  int lines = (TILE + passes - 1) / passes;  // of the next panel, all of which is fetched while this one is in the cache
  const char* next = (const char*)(w + steps * STEP) + (int64_t)pass * steps * 2 * lines * 64;
  sum_tiles<BOTH, false>(x, stride, w, steps, next, lines);
}

// One tile of sums to y, from `column` on.
void finish(const Product& p, const float* sums, int row, int rows, int column) {
  int count = std::min(TILE, p.outputs - column);
  if (count <= 0) return;
  vf bias = p.bias ? count == TILE ? load(p.bias + column) : load(p.bias + column, count) : vf{};
  for (int r = 0; r < rows; ++r) {
    bf16* to = p.y + (int64_t)(row + r) * p.outputs + column;
    vf v = load(sums + r * TILE) + bias;
    if (count == TILE)
      store(to, v);
    else
      store(to, v, count);
  }
}

// `first` rows from `row` on and `second` below, each TILE at most, by COLUMNS outputs. The tiles have these rows' shape.
// The panel is in the cache where this is not the first pass over it.
void block(const Product& p, int row, int first, int second, int panel, int pass, int passes) {
  alignas(64) float sums[4][TILE * TILE];
  int column = panel * COLUMNS;
  const bf16* x = p.x + row * p.stride;
  const bf16* w = p.w + (int64_t)panel * p.steps * STEP;
  for (int r = row; r < row + first + second; ++r) __builtin_prefetch(p.y + (int64_t)r * p.outputs + column, 1);
  if (second)
    sum_pass<true>(x, p.stride, w, p.steps, pass, passes);
  else
    sum_pass<false>(x, p.stride, w, p.steps, pass, passes);
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  finish(p, sums[0], row, first, column);
  finish(p, sums[1], row, first, column + TILE);
  if (!second) return;
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  finish(p, sums[2], row + TILE, second, column);
  finish(p, sums[3], row + TILE, second, column + TILE);
}

// Rows [begin, end) by panels [from, to).
void stretch(const Product& p, int begin, int end, int from, int to) {
  int shape = 0, passes = (end - begin + ROWS - 1) / ROWS;
  for (int panel = from; panel < to; ++panel)
    for (int pass = 0; pass < passes; ++pass) {
      int row = begin + pass * ROWS, rows = std::min(ROWS, end - row);
      int first = std::min(TILE, rows), second = rows - first;
      if (rows != shape) {
        Shapes shapes(first, second);
        _tile_loadconfig(&shapes);
        shape = rows;
      }
      block(p, row, first, second, panel, pass, passes);
    }
  _tile_release();  // else every switch of this thread saves the tiles
}

void multiply(const Product& p, int threads) {
  if ((int64_t)p.outputs * p.steps * DEPTH < SERIAL) threads = 1;
  int panels = p.panels(), width = std::max(1, panels / (4 * threads)), units = (panels + width - 1) / width;
  share(threads, units * ((p.rows + CHUNK - 1) / CHUNK), [&](int unit) {
    int begin = unit / units * CHUNK, from = unit % units * width;
    stretch(p, begin, std::min(p.rows, begin + CHUNK), from, std::min(panels, from + width));
  });
}

}  // namespace
}  // namespace peftmux

// May this process use the tiles? Asks Linux for them (ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA), for all its threads.
extern "C" int32_t peftmux_dense_ready() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// x: [rows, >= steps * 32] of neighbouring elements, w: as `dense/layout.py`, bias: [outputs] or null, y: [rows, outputs].
extern "C" void peftmux_dense_bf16(const peftmux::bf16* x, int64_t stride, const peftmux::bf16* w,
                                   const peftmux::bf16* bias, peftmux::bf16* y, int32_t rows, int32_t steps,
                                   int32_t outputs, int32_t threads) {
  peftmux::multiply({x, stride, w, bias, y, rows, steps, outputs}, threads);
}
#endif
