// Row-wise operators of a transformer layer, each rounded once (`elementwise/reference.py` has the formulas). A row's
// result depends on nothing else.

#include <algorithm>
#include <cmath>

#include "vec.h"
#include "work.h"

namespace peftmux {
namespace {

constexpr int64_t SERIAL = 1 << 16;  // elements that are not worth waking other threads for
constexpr int64_t UNIT = 1 << 14;    // elements of one unit of work

// body(row) for all rows of `width` elements.
template <class Body>
void each_row(int64_t rows, int64_t width, int threads, const Body& body) {
  int64_t step = std::max<int64_t>(1, UNIT / std::max<int64_t>(1, width));
  share(rows * width < SERIAL ? 1 : threads, (int)((rows + step - 1) / step), [&](int unit) {
    for (int64_t r = unit * step; r < std::min(rows, (unit + 1) * step); ++r) body(r);
  });
}

// body(column, load or store count): whole vectors, then what is left.
template <class Body>
inline void each_vector(int width, const Body& body) {
  int c = 0;
  for (; c + W <= width; c += W) body(c, W);
  if (c < width) body(c, width - c);
}

template <class T>
inline vf get(const T* p, int n) {
  return n == W ? load(p) : load(p, n);
}

template <class T>
inline void put(T* p, vf v, int n) {
  if (n == W)
    store(p, v);
  else
    store(p, v, n);
}

template <class T>
void rms_norm_row(const T* x, const T* weight, T* out, int width, float eps) {
  vf squares = {};
  each_vector(width, [&](int c, int n) {
    vf v = get(x + c, n);
    squares = fma(v, v, squares);
  });
  float scale = 1.0f / std::sqrt(sum(squares) / width + eps);
  each_vector(width, [&](int c, int n) { put(out + c, get(x + c, n) * scale * get(weight + c, n), n); });
}

template <class T>
void swiglu_row(const T* gate, const T* up, T* out, int width) {
  each_vector(width, [&](int c, int n) {
    vf g = get(gate + c, n);
    vf capped = choose(g < splat(-88.0f), splat(-88.0f), g);
    put(out + c, g / (1.0f + exp(-capped)) * get(up + c, n), n);
  });
}

// Turns the first 2 * half elements of x: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), halves apart.
template <class T>
void rotate_row(T* x, const T* cos, const T* sin, int half) {
  each_vector(half, [&](int c, int n) {
    vf a = get(x + c, n), b = get(x + half + c, n);
    vf first = fma(a, get(cos + c, n), -(b * get(sin + c, n)));
    vf second = fma(b, get(cos + half + c, n), a * get(sin + half + c, n));
    put(x + c, first, n);
    put(x + half + c, second, n);
  });
}

}  // namespace
}  // namespace peftmux

#define PEFTMUX_ELEMENTWISE(NAME, T)                                                                                \
  extern "C" void peftmux_rms_norm_##NAME(const T* x, int64_t stride, const T* weight, T* out, int64_t rows,         \
                                          int32_t width, float eps, int32_t threads) {                              \
    peftmux::each_row(rows, width, threads, [=](int64_t r) {                                                        \
      peftmux::rms_norm_row(x + r * stride, weight, out + r * width, width, eps);                                   \
    });                                                                                                             \
  }                                                                                                                 \
  extern "C" void peftmux_swiglu_##NAME(const T* x, int64_t stride, T* out, int64_t rows, int32_t width,             \
                                        int32_t threads) {                                                          \
    peftmux::each_row(rows, width, threads, [=](int64_t r) {                                                        \
      peftmux::swiglu_row(x + r * stride, x + r * stride + width, out + r * width, width);                          \
    });                                                                                                             \
  }                                                                                                                 \
  extern "C" void peftmux_rotate_##NAME(T* x, int64_t token_stride, int64_t head_stride, const T* cos, const T* sin, \
                                        int64_t angle_stride, int64_t tokens, int32_t heads, int32_t half,           \
                                        int32_t threads) {                                                          \
    peftmux::each_row(tokens, (int64_t)heads * half * 2, threads, [=](int64_t t) {                                   \
      for (int h = 0; h < heads; ++h)                                                                               \
        peftmux::rotate_row(x + t * token_stride + h * head_stride, cos + t * angle_stride, sin + t * angle_stride,  \
                            half);                                                                                  \
    });                                                                                                             \
  }

PEFTMUX_ELEMENTWISE(f32, float)
PEFTMUX_ELEMENTWISE(bf16, peftmux::bf16)
