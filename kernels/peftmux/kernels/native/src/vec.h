// One vector of W floats, with the widths, roundings and fused products of the instruction set we compile for.
// Every result is a function of its own inputs only: no reassociation is left to the compiler (-ffp-contract=off).
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace peftmux {

#if defined(__AVX512F__)
constexpr int W = 16;
#else
constexpr int W = 8;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct bf16 {
  uint16_t bits;
};

template <class V, class P>
inline V peek(const P* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class P>
inline void poke(P* p, const V& v) {
  memcpy(p, &v, sizeof v);
}

inline vf splat(float x) { return x - vf{}; }

inline vi lanes() {
  vi v;
  for (int i = 0; i < W; ++i) v[i] = i;
  return v;
}

// a * b + c with one rounding, where the machine has it.
inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  vf r;
  for (int i = 0; i < W; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#else
  return a * b + c;
#endif
}

inline vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
inline vf larger(vf a, vf b) { return choose(a > b, a, b); }

inline float sum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float a[W];
  poke(a, v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) a[i] += a[i + half];
  return a[0];
#endif
}

inline float largest(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < W; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

// bfloat16 is the upper half of a float.
inline vf widen(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }

// Round to nearest, ties to even; a NaN stays one.
inline vh narrow(vf v) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
  vu u = (vu)v;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vi nan = v != v;
  return __builtin_convertvector((vu)((nan & 0x7fc0) | (~nan & (vi)rounded)), vh);
#endif
}

inline vf load(const float* p) { return peek<vf>(p); }
inline vf load(const bf16* p) { return widen(peek<vh>(p)); }
inline void store(float* p, vf v) { poke(p, v); }
inline void store(bf16* p, vf v) { poke(p, narrow(v)); }

// The first n < W elements, zeros behind them.
template <class T>
inline vf load(const T* p, int n) {
  T buffer[W] = {};
  memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}

template <class T>
inline void store(T* p, vf v, int n) {
  T buffer[W];
  store(buffer, v);
  memcpy(p, buffer, n * sizeof(T));
}

// Operands of a dot product: STEP elements at a time into W float accumulators.
template <class T>
struct Dot {
  typedef vf V;
  static constexpr int STEP = W;
  static V get(const T* p) { return load(p); }
  static V get(const T* p, int n) { return load(p, n); }
  static vf mac(vf acc, V a, V b) { return fma(a, b, acc); }
};

#if defined(__AVX512BF16__)
template <>
struct Dot<bf16> {
  typedef __m512i V;
  static constexpr int STEP = 2 * W;
  static V get(const bf16* p) { return _mm512_loadu_si512(p); }
  static V get(const bf16* p, int n) { return _mm512_maskz_loadu_epi16((uint32_t)((1ull << n) - 1), p); }
  static vf mac(vf acc, V a, V b) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
};
#endif

// exp(x), relative error below 2e-7 for x <= 88; 0 below -87.3. Cody-Waite reduction and Taylor's series of degree 7.
inline vf exp(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  vf shifted = fma(x, splat(1.44269504089f), magic);
  vf n = shifted - magic;
  vf r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  vf p = splat(1.0f / 5040);
  p = fma(p, r, splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  vf power = (vf)(((vi)shifted - (vi)magic + 127) << 23);
  return choose(x < splat(-87.3f), vf{}, p * power);
}

// tanh(x): an odd series below 0.3, else from exp.
inline vf tanh(vf x) {
  vf a = choose(x < vf{}, -x, x);
  a = choose(a > splat(20.0f), splat(20.0f), a);
  vf big = 1.0f - 2.0f / (exp(a + a) + 1.0f);
  vf q = a * a;
  vf p = splat(62.0f / 2835);
  p = fma(p, q, splat(-17.0f / 315));
  p = fma(p, q, splat(2.0f / 15));
  p = fma(p, q, splat(-1.0f / 3));
  vf small = fma(a * q, p, a);
  vf t = choose(a < splat(0.3f), small, big);
  return choose(x < vf{}, -t, t);
}

}  // namespace peftmux
