// Vectors of 16 floats, by clang's vector extension: the compiler maps them to one or more registers of any
// instruction set.

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace {

constexpr int V = 16;  // elements of a vector; columns of a panel; tokens of a KV block

typedef float vf __attribute__((vector_size(64)));
typedef float vf_u __attribute__((vector_size(64), aligned(4)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef int8_t vb __attribute__((vector_size(16), aligned(1)));
typedef uint8_t vub __attribute__((vector_size(16), aligned(1)));

inline vf splat(float a) { return vf{a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a}; }
inline vf load(const float* p) { return *reinterpret_cast<const vf_u*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vf_u*>(p) = v; }
inline vf fma(vf a, vf b, vf c) { return __builtin_elementwise_fma(a, b, c); }
inline vf max(vf a, vf b) { return __builtin_elementwise_max(a, b); }
inline vf select(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
inline long min(long a, long b) { return a < b ? a : b; }
inline long ceil_div(long a, long b) { return (a + b - 1) / b; }

// Reductions fold the upper half onto the lower half, so the order of additions is fixed.
#define FOLD(OP, A, B, C, D, E, F, G, H) \
  v = OP(v, __builtin_shufflevector(v, v, A, B, C, D, E, F, G, H, A, B, C, D, E, F, G, H))
#define FOLD_ALL(OP)                      \
  FOLD(OP, 8, 9, 10, 11, 12, 13, 14, 15); \
  FOLD(OP, 4, 5, 6, 7, 4, 5, 6, 7);       \
  FOLD(OP, 2, 3, 2, 3, 2, 3, 2, 3);       \
  FOLD(OP, 1, 1, 1, 1, 1, 1, 1, 1)
inline vf add(vf a, vf b) { return a + b; }
inline float horizontal_sum(vf v) {
  FOLD_ALL(add);
  return v[0];
}
inline float horizontal_max(vf v) {
  FOLD_ALL(max);
  return v[0];
}

// e^x to about 2 ulp: 2^n times a polynomial in the remainder (Cephes expf). 0 for x < -87.
inline vf exp(vf x) {
  const vf low = splat(-87.0f), high = splat(88.0f);
  const vi under = x < low;
  x = __builtin_elementwise_min(max(x, low), high);
  const vf n = __builtin_elementwise_roundeven(x * 1.44269504f);
  vf r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  vf p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + 1.0f);
  const vi scale = (__builtin_convertvector(n, vi) + 127) << 23;
  return select(under, vf{}, p * (vf)scale);
}

// 2^x for x <= 0 to about 2 ulp: 2^n times a polynomial in the remainder (Cephes exp2f). 0 for x < -126.
inline vf exp2_below_0(vf x) {
  const vf clamped = max(x, splat(-127.0f)), n = __builtin_elementwise_roundeven(clamped), r = clamped - n;
  vf p = splat(1.535336188319500e-4f);
  p = fma(p, r, splat(1.339887440266574e-3f));
  p = fma(p, r, splat(9.618437357674640e-3f));
  p = fma(p, r, splat(5.550332471162809e-2f));
  p = fma(p, r, splat(2.402264791363012e-1f));
  p = fma(p, r, splat(6.931472028550421e-1f));
  p = fma(p, r, splat(1.0f));
  const vi scaled = (vi)p + (__builtin_convertvector(n, vi) << 23);
  return select(x < splat(-126.0f), vf{}, (vf)scaled);
}

// Natural logarithm of normal, positive numbers to about 2 ulp (Cephes logf).
inline vf log(vf x) {
  vi exponent = (((vi)x >> 23) & 255) - 126;
  vf m = (vf)(((vi)x & 0x007fffff) | 0x3f000000);  // in [0.5, 1)
  const vi small = m < splat(0.70710678f);
  exponent += small;  // -1 where true
  m = select(small, m + m, m) - 1.0f;
  vf p = splat(7.0376836292e-2f);
  p = fma(p, m, splat(-1.1514610310e-1f));
  p = fma(p, m, splat(1.1676998740e-1f));
  p = fma(p, m, splat(-1.2420140846e-1f));
  p = fma(p, m, splat(1.4249322787e-1f));
  p = fma(p, m, splat(-1.6668057665e-1f));
  p = fma(p, m, splat(2.0000714765e-1f));
  p = fma(p, m, splat(-2.4999993993e-1f));
  p = fma(p, m, splat(3.3333331174e-1f));
  const vf square = m * m, e = __builtin_convertvector(exponent, vf);
  vf y = p * m * square;
  y = fma(e, splat(-2.12194440e-4f), y) - 0.5f * square;
  return fma(e, splat(0.693359375f), m + y);
}

inline vf silu(vf x) { return x / (1.0f + exp(-x)); }

inline uint16_t to_bf16(float f) {  // round to nearest even; NaN stays NaN
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16 | 0x40);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

inline float from_bf16(uint16_t h) {
  const uint32_t u = uint32_t(h) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

// Stores the first `columns` elements of a vector.
inline void put(float* out, vf value, long columns) {
  if (columns >= V) return store(out, value);
  float s[V];
  memcpy(s, &value, sizeof s);
  memcpy(out, s, size_t(columns) * 4);
}

inline float mean_square(const float* x, long n) {
  vf s[2] = {};
  long i = 0;
  for (; i + 2 * V <= n; i += 2 * V)
    for (int j = 0; j < 2; ++j) s[j] = fma(load(x + i + j * V), load(x + i + j * V), s[j]);
  float rest = 0;
  for (; i < n; ++i) rest += x[i] * x[i];
  return (horizontal_sum(s[0] + s[1]) + rest) / float(n);
}

inline void scale_by(float* out, const float* x, const float* weight, float a, long n) {
  long i = 0;
  for (; i + V <= n; i += V) store(out + i, load(x + i) * a * load(weight + i));
  for (; i < n; ++i) out[i] = x[i] * a * weight[i];
}

}  // namespace
