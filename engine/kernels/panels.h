// Panels: 16 columns of a matrix, stored by pairs of k, and the product of rows with panels.
//
// A weight matrix consists of panels. So does a block of 16 cached keys, whose columns are tokens, and a block of 16
// cached values, whose columns are head elements.
//
// Each element of a product is one chain of fused multiply-adds in the order of k, whatever the number of rows,
// columns and threads. So a row's bits depend on that row alone.
//
// Shapes: M rows, N columns, K inner.

#pragma once

#include "vectors.h"

namespace {

constexpr int GROUP = 64;  // int4: values of k that share a scale
#if defined(__AVX512F__)
constexpr int MR = 12;  // rows of a register tile: of 32 registers, MR x 2 hold sums, 4 weights and 1 a broadcast
#else
constexpr int MR = 2;
#endif

// Formats of a panel. `bytes(K)` is the panel's size. `pair` unpacks the 16 columns of k and k + 1. `get` and `set`
// access one element. `scale` multiplies finished sums by the columns' scales, where a format has such scales.

struct F32 {
  typedef float T;
  static size_t bytes(long K) { return size_t(K) * V * 4; }
  static size_t bytes_of_pairs(long i) { return size_t(i) * V * 8; }
  static void pair(const char* p, long k, vf& even, vf& odd) {
    const float* w = reinterpret_cast<const float*>(p) + k * V;
    even = load(w);
    odd = load(w + V);
  }
  static float get(const char* p, long, long k, int c) { return reinterpret_cast<const float*>(p)[k * V + c]; }
  static void set(char* p, long k, int c, float f) { reinterpret_cast<float*>(p)[k * V + c] = f; }
  static vf scale(const char*, long, vf acc) { return acc; }
};

struct BF16 {
  typedef uint16_t T;
  static size_t bytes(long K) { return size_t(K) * V * 2; }
  static size_t bytes_of_pairs(long i) { return size_t(i) * V * 4; }
  static void pair(const char* p, long k, vf& even, vf& odd) {
    vu u;
    memcpy(&u, p + k * V * 2, sizeof u);
    even = (vf)(u << 16);
    odd = (vf)(u & 0xffff0000u);
  }
  static long at(long k, int c) { return (k / 2) * 2 * V + c * 2 + (k & 1); }
  static float get(const char* p, long, long k, int c) {
    return from_bf16(reinterpret_cast<const uint16_t*>(p)[at(k, c)]);
  }
  static void set(char* p, long k, int c, float f) { reinterpret_cast<uint16_t*>(p)[at(k, c)] = to_bf16(f); }
  static vf scale(const char*, long, vf acc) { return acc; }
};

struct I8 {  // one scale per column, behind the panel's numbers
  static size_t bytes(long K) { return size_t(K) * V + V * 4; }
  static size_t bytes_of_pairs(long i) { return size_t(i) * V * 2; }
  static void pair(const char* p, long k, vf& even, vf& odd) {
    vb a, b;
    memcpy(&a, p + k * V, V);
    memcpy(&b, p + k * V + V, V);
    even = __builtin_convertvector(__builtin_convertvector(a, vi), vf);
    odd = __builtin_convertvector(__builtin_convertvector(b, vi), vf);
  }
  static float* scales(char* p, long K) { return reinterpret_cast<float*>(p + K * V); }
  static float get(const char* p, long K, long k, int c) {
    return float(reinterpret_cast<const int8_t*>(p)[k * V + c]) * scales(const_cast<char*>(p), K)[c];
  }
  static vf scale(const char* p, long K, vf acc) { return acc * load(scales(const_cast<char*>(p), K)); }
};

struct I4 {  // a byte holds k in its low half and k + 1 in its high half, both plus 8; scales per group at the end
  static size_t bytes(long K) { return size_t(K) / 2 * V + size_t(ceil_div(K, GROUP)) * V * 4; }
  static float* scales(char* p, long K) { return reinterpret_cast<float*>(p + K / 2 * V); }
  static void nibbles(const char* p, long k, vf& even, vf& odd) {
    vub b;
    memcpy(&b, p + k / 2 * V, V);
    const vi u = __builtin_convertvector(b, vi);
    even = __builtin_convertvector((u & 15) - 8, vf);
    odd = __builtin_convertvector((u >> 4) - 8, vf);
  }
  static float get(const char* p, long K, long k, int c) {
    const uint8_t byte = reinterpret_cast<const uint8_t*>(p)[k / 2 * V + c];
    return float((k & 1 ? byte >> 4 : byte & 15) - 8) * scales(const_cast<char*>(p), K)[k / GROUP * V + c];
  }
  static vf scale(const char*, long, vf acc) { return acc; }
};

// acc[m][n] += row m of x times panel n, over `pairs` pairs of k. Row m of x begins at m * SM floats, pair i at
// i * SP. Prefetches the same offsets of `next[n]`: these are more streams than the hardware prefetcher follows.
template <class W, int M, int NV, int SM, int SP>
inline __attribute__((always_inline)) void multiply(vf (&acc)[M][NV], const float* x, const char* const* panels,
                                                    const char* const* next, long pairs) {
  for (long i = 0; i < pairs; ++i, x += SP) {
    vf even[NV], odd[NV];
    for (int n = 0; n < NV; ++n) W::pair(panels[n], 2 * i, even[n], odd[n]);
    for (int n = 0; n < NV; ++n) __builtin_prefetch(next[n] + W::bytes_of_pairs(i));
#pragma clang loop unroll(full)
    for (int m = 0; m < M; ++m) {
      const vf a = splat(x[m * SM]), b = splat(x[m * SM + 1]);
      for (int n = 0; n < NV; ++n) acc[m][n] = fma(a, even[n], acc[m][n]);
      for (int n = 0; n < NV; ++n) acc[m][n] = fma(b, odd[n], acc[m][n]);
    }
  }
}

struct Scratch {  // a thread's memory for packed rows, and which rows it holds; lives as long as the thread
  char* data;
  size_t size;
  long call, pass;
  float* floats(size_t bytes) {
    if (bytes > size) {
      free(data);
      size = (bytes + 4095) & ~size_t(4095);
      data = static_cast<char*>(aligned_alloc(64, size));
    }
    return reinterpret_cast<float*>(data);
  }
};
inline __thread Scratch* scratch_of_thread;
inline Scratch& scratch() {
  if (!scratch_of_thread) {
    scratch_of_thread = static_cast<Scratch*>(aligned_alloc(64, 64));
    *scratch_of_thread = Scratch{nullptr, 0, 0, 0};
  }
  return *scratch_of_thread;
}

// Runs CALL with the compile-time constant R = M, for 1 <= M <= MR.
#define FOR_ROWS(M, CALL) \
  switch (M) {            \
    case 1: { constexpr int R = 1; CALL; } break;   \
    case 2: { constexpr int R = 2; CALL; } break;   \
    FOR_MORE_ROWS(CALL)   \
  }
#if defined(__AVX512F__)
#define FOR_MORE_ROWS(CALL)                         \
    case 3: { constexpr int R = 3; CALL; } break;   \
    case 4: { constexpr int R = 4; CALL; } break;   \
    case 5: { constexpr int R = 5; CALL; } break;   \
    case 6: { constexpr int R = 6; CALL; } break;   \
    case 7: { constexpr int R = 7; CALL; } break;   \
    case 8: { constexpr int R = 8; CALL; } break;   \
    case 9: { constexpr int R = 9; CALL; } break;   \
    case 10: { constexpr int R = 10; CALL; } break; \
    case 11: { constexpr int R = 11; CALL; } break; \
    case 12: { constexpr int R = 12; CALL; } break;
#else
#define FOR_MORE_ROWS(CALL)
#endif

// Runs CALL with W = the format of that number in `_FORMATS` of native.py.
#define FOR_FORMAT(format, CALL)                   \
  switch (format) {                                \
    case 0: { typedef F32 W; CALL; } break;        \
    case 1: { typedef BF16 W; CALL; } break;       \
    case 2: { typedef I8 W; CALL; } break;         \
    case 3: { typedef I4 W; CALL; } break;         \
  }

}  // namespace
