// The kernels of `native.py`: everything a decoder computes on a CPU, for any ISA that clang knows.
//
// Everything is one product: a block of M rows of x, times panels of 16 columns. A weight matrix is such
// panels; so is a block of 16 cached keys (its columns are tokens) and of 16 cached values (its columns are
// head elements). Each element of a result is one chain of fused multiply-adds over k in order, whatever
// the number of rows, columns and threads around it: a row's bits depend on that row alone.
//
// Shapes: M rows, N columns, K inner; T tokens, D hidden, E head size, V = 16 columns of a panel.
// Activations are float32. Panels are stored by pairs of k (see the formats below).

#include "threads.h"

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

constexpr int V = 16;  // columns of a panel, and tokens of a KV block
constexpr int GROUP = 64;  // k that share a scale in int4
constexpr int TILE = 64;  // keys that share a step of the online softmax
constexpr int BLOCKS = TILE / V;
#if defined(__AVX512F__)
constexpr int MR = 12;  // rows of a register tile: MR x 2 accumulators, 4 weights, 1 broadcast of 32
#else
constexpr int MR = 2;
#endif
constexpr size_t FETCH_AHEAD = 1024;  // bytes of a panel; best of 256 to 2048 where it was measured
constexpr size_t X_BYTES = 384 << 10;  // rows of x that are kept in the L2 cache while panels pass

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
inline long least(long a, long b) { return a < b ? a : b; }
inline long ceil_div(long a, long b) { return (a + b - 1) / b; }

// Both fold halves onto each other, so that a sum's order is fixed.
#define FOLD(OP, A, B, C, D, E, F, G, H) \
  v = OP(v, __builtin_shufflevector(v, v, A, B, C, D, E, F, G, H, A, B, C, D, E, F, G, H))
#define FOLD_ALL(OP)                      \
  FOLD(OP, 8, 9, 10, 11, 12, 13, 14, 15); \
  FOLD(OP, 4, 5, 6, 7, 4, 5, 6, 7);       \
  FOLD(OP, 2, 3, 2, 3, 2, 3, 2, 3);       \
  FOLD(OP, 1, 1, 1, 1, 1, 1, 1, 1)
inline vf add(vf a, vf b) { return a + b; }
inline float sum(vf v) {
  FOLD_ALL(add);
  return v[0];
}
inline float greatest(vf v) {
  FOLD_ALL(max);
  return v[0];
}

// e^x to about 2 ulp: 2^n times a polynomial of the rest (Cephes expf); 0 below -87.
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

// Formats of a panel. `pair(p, k, even, odd)` unpacks columns k and k + 1 of panel p; `at` is the place of
// element (k, column); `BYTES(K)` is a panel's size. Scales are one per column, in int4 one per column and
// GROUP of k, kept at the end of the panel.

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

struct I8 {  // one scale per column, after the panel's numbers
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

struct I4 {  // a byte has k in its low and k + 1 in its high half, both plus 8; scales per group at the end
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

// acc[m][n] += sum over pairs of x[m] times panel n. Row m of x begins at m * SM floats, pair i at i * SP.
// What lies at the same place behind `next[n]` is fetched meanwhile: so many streams at once are more than
// the hardware looks ahead for.
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

// --- Linear ----------------------------------------------------------------------------------------------------

struct Scratch {  // one thread's memory for packed rows, and what it holds; lives as long as the thread
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
__thread Scratch* scratch_of_thread;
Scratch& scratch() {
  if (!scratch_of_thread) {
    scratch_of_thread = static_cast<Scratch*>(aligned_alloc(64, 64));
    *scratch_of_thread = Scratch{nullptr, 0, 0, 0};
  }
  return *scratch_of_thread;
}

struct LinearCall {
  const float* x;  // [M, K]
  const char* w;  // panels
  const float* bias;  // [N] or null; gated: gate's F, then up's F
  float* out;  // [M, N]; gated: [M, N], N columns of silu(gate) * up
  long M, N, K;
  int gated;  // panels alternate: 16 columns of gate, 16 of up
};

inline void put(float* out, vf value, long columns) {
  if (columns >= V) return store(out, value);
  float s[V];
  memcpy(s, &value, sizeof s);
  memcpy(out, s, size_t(columns) * 4);
}

inline vf bias_of(const float* bias, long columns) {
  float s[V] = {};
  memcpy(s, bias, size_t(least(columns, V)) * 4);
  return load(s);
}

// Columns of the two panels at `p`: bias, scale, activation, store. `unit` counts pairs of panels.
template <class W, int M>
inline void finish(const LinearCall& c, vf (&acc)[M][2], const char* const* p, long row, long unit) {
  for (int n = 0; n < 2; ++n)
    for (int m = 0; m < M; ++m) acc[m][n] = W::scale(p[n], c.K, acc[m][n]);
  if (c.gated) {
    const long column = unit * V, left = c.N - column;
    for (int m = 0; m < M; ++m) {
      vf gate = acc[m][0], up = acc[m][1];
      if (c.bias) gate += bias_of(c.bias + column, left), up += bias_of(c.bias + c.N + column, left);
      put(c.out + (row + m) * c.N + column, silu(gate) * up, left);
    }
    return;
  }
  for (int n = 0; n < 2; ++n) {
    const long column = (unit * 2 + n) * V, left = c.N - column;
    if (left <= 0) return;
    const vf bias = c.bias ? bias_of(c.bias + column, left) : vf{};
    for (int m = 0; m < M; ++m) put(c.out + (row + m) * c.N + column, acc[m][n] + bias, left);
  }
}

// Lays rows [row, row + M) of x out by pairs of k: [K / 2][M][2].
inline void pack_rows(const LinearCall& c, float* to, long row, long M) {
  const float* x = c.x + row * c.K;
  for (long k = 0; k < c.K; k += 2)
    for (long m = 0; m < M; ++m, to += 2) memcpy(to, x + m * c.K + k, 8);
}

template <class W>
struct Product {
  template <int M>
  static void run(const LinearCall& c, const float* x, long row, long unit, const char* const* p) {
    vf acc[M][2] = {};
    const char* ahead[2] = {p[0] + FETCH_AHEAD, p[1] + FETCH_AHEAD};
    multiply<W, M, 2, 2, 2 * M>(acc, x, p, ahead, c.K / 2);
    finish<W, M>(c, acc, p, row, unit);
  }
};

template <>
struct Product<I4> {
  template <int M>
  static void run(const LinearCall& c, const float* x, long row, long unit, const char* const* p) {
    vf acc[M][2] = {};
    for (long k = 0; k < c.K; k += GROUP) {
      vf scale[2];
      for (int n = 0; n < 2; ++n) scale[n] = load(I4::scales(const_cast<char*>(p[n]), c.K) + k / GROUP * V);
      const float* y = x + k * M;
      for (long i = 0, pairs = least(GROUP, c.K - k) / 2; i < pairs; ++i, y += 2 * M) {
        vf even[2], odd[2];
        for (int n = 0; n < 2; ++n) {
          I4::nibbles(p[n], k + 2 * i, even[n], odd[n]);
          even[n] *= scale[n], odd[n] *= scale[n];
        }
#pragma clang loop unroll(full)
        for (int m = 0; m < M; ++m) {
          const vf a = splat(y[2 * m]), b = splat(y[2 * m + 1]);
          for (int n = 0; n < 2; ++n) acc[m][n] = fma(a, even[n], acc[m][n]);
          for (int n = 0; n < 2; ++n) acc[m][n] = fma(b, odd[n], acc[m][n]);
        }
      }
    }
    finish<I4, M>(c, acc, p, row, unit);
  }
};

#if defined(__AVX512BF16__)
// The ISA's own bf16 product: x is rounded to bf16 too, sums are float32.
template <>
struct Product<BF16> {
  template <int M>
  static void run(const LinearCall& c, const float* x, long row, long unit, const char* const* p) {
    __m512 sums[M][2];
    for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = _mm512_setzero_ps();
    const int32_t* y = reinterpret_cast<const int32_t*>(x);
    for (long k = 0; k < c.K; k += 2, y += M) {
      const __m512bh w0 = (__m512bh)_mm512_loadu_si512(p[0] + k * V * 2);
      const __m512bh w1 = (__m512bh)_mm512_loadu_si512(p[1] + k * V * 2);
#pragma clang loop unroll(full)
      for (int m = 0; m < M; ++m) {
        const __m512bh a = (__m512bh)_mm512_set1_epi32(y[m]);
        sums[m][0] = _mm512_dpbf16_ps(sums[m][0], w0, a);
        sums[m][1] = _mm512_dpbf16_ps(sums[m][1], w1, a);
      }
    }
    vf acc[M][2];
    memcpy(acc, sums, sizeof acc);
    finish<BF16, M>(c, acc, p, row, unit);
  }
};
template <class W>
constexpr bool ROUNDS_X = __is_same(W, BF16);
#else
template <class W>
constexpr bool ROUNDS_X = false;
#endif

// Rows by pairs of k as bf16: [K / 2][M] numbers of two.
inline void pack_rows_bf16(const LinearCall& c, float* to, long row, long M) {
  for (long m = 0; m < M; ++m) {
    const float* x = c.x + (row + m) * c.K;
    uint16_t* y = reinterpret_cast<uint16_t*>(to) + m * 2;
    for (long k = 0; k < c.K; k += 2, y += 2 * M) y[0] = to_bf16(x[k]), y[1] = to_bf16(x[k + 1]);
  }
}

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

long calls;  // one count for all formats: they share the threads' scratch memory

// Rows are taken in passes that fit the cache, each cut into equal register tiles; threads take columns.
template <class W>
void linear(const LinearCall& c, int threads) {
  const long call = __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
  const long units = c.gated ? ceil_div(c.N, V) : ceil_div(c.N, 2 * V);
  const long grain = units >= 64 * threads ? 4 : units >= 16 * threads ? 2 : 1, items = ceil_div(units, grain);
  long per_pass = long(X_BYTES / (size_t(c.K) * 4)) / MR * MR;
  if (per_pass < 4 * MR) per_pass = 4 * MR;
  const long passes = ceil_div(c.M, per_pass);
  const size_t panel = W::bytes(c.K);
  parallel_for(threads, passes * items, [&](long item) {
    const long pass = item / items, first = item % items * grain;
    const long row = c.M * pass / passes, rows = c.M * (pass + 1) / passes - row, tiles = ceil_div(rows, MR);
    const float* x = c.x;
    if (c.M > 1 || ROUNDS_X<W>) {
      Scratch& own = scratch();
      float* packed = own.floats(size_t(rows) * c.K * 4 + 64);
      x = packed;
      if (own.call != call || own.pass != pass) {
        own.call = call, own.pass = pass;
        for (long t = 0; t < tiles; ++t) {
          const long a = rows * t / tiles, M = rows * (t + 1) / tiles - a;
          if (ROUNDS_X<W>)
            pack_rows_bf16(c, packed + a * c.K, row + a, M);
          else
            pack_rows(c, packed + a * c.K, row + a, M);
        }
      }
    }
    for (long unit = first; unit < least(first + grain, units); ++unit) {
      const char* p[2] = {c.w + unit * 2 * panel, c.w + (unit * 2 + 1) * panel};
      for (long t = 0; t < tiles; ++t) {
        const long a = rows * t / tiles, M = rows * (t + 1) / tiles - a;
        FOR_ROWS(M, Product<W>::template run<R>(c, x + a * c.K, row + a, unit, p))
      }
    }
  });
}

// --- Norm -----------------------------------------------------------------------------------------------------

inline float mean_square(const float* x, long n) {
  vf s[2] = {};
  long i = 0;
  for (; i + 2 * V <= n; i += 2 * V)
    for (int j = 0; j < 2; ++j) s[j] = fma(load(x + i + j * V), load(x + i + j * V), s[j]);
  float rest = 0;
  for (; i < n; ++i) rest += x[i] * x[i];
  return (sum(s[0] + s[1]) + rest) / float(n);
}

void scale_by(float* out, const float* x, const float* weight, float a, long n) {
  long i = 0;
  for (; i + V <= n; i += V) store(out + i, load(x + i) * a * load(weight + i));
  for (; i < n; ++i) out[i] = x[i] * a * weight[i];
}

// --- Cache and attention ----------------------------------------------------------------------------------------

struct AttentionCall {
  float* qkv;  // [T, (H + 2K) E]; queries and keys are rotated in place
  float* out;  // [T, H E]
  char* keys;  // this layer's [blocks][K] panels of E x 16 tokens, with room for E rounded up to 16
  char* values;  // [blocks][K][E / 16, rounded up] panels of 16 tokens x 16
  const float *cosine, *sine;  // [P, E / 2]
  const float *q_norm, *k_norm;  // [E] or null
  const int32_t* positions;  // [T]
  const int32_t* sequences;  // [B][4]: row of its table, first row of qkv, queries, position of the first
  const int32_t* tables;  // [handles, stride]
  long T, B, H, K, E, stride;
  long window;  // keys that a query sees, itself included; 0 sees all
  float eps, scale;
};

inline long padded(long E) { return ceil_div(E, V) * V; }

// Rotary embedding of one head (Su et al. 2021), halves as real and imaginary parts; then times `scale`.
inline void rotate(float* x, const float* c, const float* s, long half, float scale) {
  long i = 0;
  for (; i + V <= half; i += V) {
    const vf a = load(x + i), b = load(x + half + i), cosine = load(c + i), sine = load(s + i);
    store(x + i, (a * cosine - b * sine) * scale);
    store(x + half + i, (b * cosine + a * sine) * scale);
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = (a * c[i] - b * s[i]) * scale;
    x[half + i] = (b * c[i] + a * s[i]) * scale;
  }
}

// Where sequence b's row t is, given rows in order.
inline long sequence_of(const AttentionCall& c, long t) {
  long low = 0, high = c.B - 1;
  while (low < high) {
    const long middle = (low + high + 1) / 2;
    if (c.sequences[middle * 4 + 1] <= t) low = middle; else high = middle - 1;
  }
  return low;
}

// Rotates a token's queries and keys, and writes its keys and values into the cache.
template <class W>
void remember(const AttentionCall& c, long t) {
  typedef typename W::T Number;
  const long E = c.E, half = E / 2, position = c.positions[t];
  const float *cosine = c.cosine + position * half, *sine = c.sine + position * half;
  float* q = c.qkv + t * (c.H + 2 * c.K) * E;
  for (long h = 0; h < c.H + c.K; ++h) {
    float* head = q + h * E;
    const float* norm = h < c.H ? c.q_norm : c.k_norm;
    if (norm) scale_by(head, head, norm, 1.0f / __builtin_sqrtf(mean_square(head, E) + c.eps), E);
    rotate(head, cosine, sine, half, h < c.H ? c.scale : 1.0f);
  }
  const int32_t* sequence = c.sequences + sequence_of(c, t) * 4;
  const long block = c.tables[sequence[0] * c.stride + position / V];
  const int slot = int(position % V);
  const int rest = slot ? V : int(least(V, sequence[3] + sequence[2] - position));  // first slot to clear
  for (long k = 0; k < c.K; ++k) {
    const long place = (block * c.K + k) * padded(E) * V;
    const float *key = q + (c.H + k) * E, *value = key + c.K * E;
    char* key_panel = c.keys + place * sizeof(Number);
    for (long e = 0; e < E; ++e) W::set(key_panel, e, slot, key[e]);
    // A block taken anew may hold numbers of another sequence, even NaN: 0 times they must be 0.
    char* value_panels = c.values + place * sizeof(Number);
    for (int later = rest; later < V; ++later)
      for (long e = 0; e < E; ++e) W::set(value_panels + e / V * V * V * sizeof(Number), later, int(e % V), 0);
    for (long e = 0; e < E; ++e)
      W::set(value_panels + e / V * V * V * sizeof(Number), slot, int(e % V), value[e]);
  }
}

// Attention of R rows (queries of one KV head) over tiles of keys, with an online softmax (Milakov &
// Gimelshein 2018). Tiles begin at multiples of TILE, and a tile that a row does not see changes nothing.
template <class W, int R>
void attend_rows(const AttentionCall& c, const int32_t* sequence, long kv, long first_row) {
  const long E = c.E, S = padded(E), G = c.H / c.K, width = (c.H + 2 * c.K) * E;
  const int32_t* table = c.tables + sequence[0] * c.stride;
  const long bytes = S * V * long(sizeof(typename W::T));
  float* q = scratch().floats(size_t(E + S) * R * 4);  // [E / 2][R][2]
  scratch().call = 0;
  float* sums = q + E * R;  // [R][S]
  long seen[R];  // keys [0, seen) are visible, from `from` on
  long from[R];
  for (int r = 0; r < R; ++r) {
    const long token = (first_row + r) / G, head = kv * G + (first_row + r) % G;
    const float* x = c.qkv + (sequence[1] + token) * width + head * E;
    for (long e = 0; e < E; e += 2) memcpy(q + e * R + r * 2, x + e, 8);
    for (long e = 0; e < S; ++e) sums[r * S + e] = 0;
    seen[r] = sequence[3] + token + 1;
    from[r] = c.window && seen[r] > c.window ? seen[r] - c.window : 0;
  }
  float top[R], total[R];
  for (int r = 0; r < R; ++r) top[r] = -__builtin_inff(), total[r] = 0;
  constexpr int NV = R <= 4 ? 4 : 2;  // panels at a time: enough independent sums to hide their latency
  const char *keys[2][BLOCKS], *values[BLOCKS];
  long place[BLOCKS];
  auto locate = [&](long start) {  // keys[1] and place: blocks of the tile at `start`, the first for none
    const long blocks = ceil_div(seen[R - 1] - start, V);
    for (int b = 0; b < BLOCKS; ++b) {
      place[b] = (table[start / V + (b < blocks ? b : 0)] * c.K + kv) * bytes;
      keys[1][b] = c.keys + place[b];
    }
  };
  const long begin = from[0] / TILE * TILE;
  locate(begin);
  for (long start = begin; start < seen[R - 1]; start += TILE) {
    for (int b = 0; b < BLOCKS; ++b) keys[0][b] = keys[1][b], values[b] = c.values + place[b];
    if (start + TILE < seen[R - 1]) locate(start + TILE);
    const int blocks = int(least(BLOCKS, ceil_div(seen[R - 1] - start, V)));
    alignas(64) float p[R][TILE];
    for (int b = 0; b < BLOCKS; b += NV) {
      if (b >= blocks) break;
      vf acc[R][NV] = {};
      multiply<W, R, NV, 2, 2 * R>(acc, q, keys[0] + b, values + b, E / 2);
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < NV; ++n) store(p[r] + (b + n) * V, acc[r][n]);
    }
    const bool all_visible = start + TILE <= seen[0] && start >= from[R - 1];
    float keep[R];
    for (int r = 0; r < R; ++r) {
      vf scores[BLOCKS];
      for (int b = 0; b < BLOCKS; ++b) scores[b] = load(p[r] + b * V);
      if (!all_visible)
        for (int b = 0; b < BLOCKS; ++b) {
          const vi at = vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + int(start) + b * V;
          const vi visible = (at < int(seen[r])) & (at >= int(from[r]));
          scores[b] = select(visible, scores[b], splat(-__builtin_inff()));
        }
      vf best = scores[0];
      for (int b = 1; b < BLOCKS; ++b) best = max(best, scores[b]);
      const float tile_top = greatest(best), new_top = tile_top > top[r] ? tile_top : top[r];
      const float shift = new_top == -__builtin_inff() ? 0 : new_top;  // a row that has seen no key yet
      vf tile_total = {};
      for (int b = 0; b < BLOCKS; ++b) {
        const vf e = exp(scores[b] - shift);
        tile_total += e;
        store(p[r] + b * V, e);
      }
      keep[r] = exp(splat(top[r] - shift))[0];
      total[r] = total[r] * keep[r] + sum(tile_total);
      top[r] = new_top;
    }
    for (long e = 0; e < S; e += NV * V) {
      vf acc[R][NV];
      const int chunks = int(least(NV, (S - e) / V));
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < NV; ++n) acc[r][n] = n < chunks ? load(sums + r * S + e + n * V) * keep[r] : vf{};
      for (int b = 0; b < blocks; ++b) {
        const char *panels[NV], *next[NV];
        for (int n = 0; n < NV; ++n) {
          const long chunk = (e + (n < chunks ? n : 0) * V) * V * long(sizeof(typename W::T));
          panels[n] = values[b] + chunk, next[n] = keys[1][b] + chunk;
        }
        multiply<W, R, NV, TILE, 2>(acc, &p[0][b * V], panels, next, V / 2);
      }
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < chunks; ++n) store(sums + r * S + e + n * V, acc[r][n]);
    }
  }
  for (int r = 0; r < R; ++r) {
    const long token = (first_row + r) / G, head = kv * G + (first_row + r) % G;
    float* out = c.out + (sequence[1] + token) * c.H * E + head * E;
    const float a = 1.0f / total[r];
    for (long e = 0; e < E; e += V) put(out + e, load(sums + r * S + e) * a, E - e);
  }
}

template <class W>
void attend(const AttentionCall& c, int threads) {
  parallel_for(c.T > 1 ? threads : 1, c.T, [&](long t) { remember<W>(c, t); });
  const long G = c.H / c.K;
  long items = 0;
  for (long b = 0; b < c.B; ++b) items += ceil_div(c.sequences[b * 4 + 2] * G, MR) * c.K;
  parallel_for(threads, items, [&](long item) {
    const int32_t* sequence = c.sequences;
    long tiles;
    for (;; sequence += 4) {
      tiles = ceil_div(sequence[2] * G, MR);
      if (item < tiles * c.K) break;
      item -= tiles * c.K;
    }
    // The last rows of a prompt see the most keys: they come first.
    const long rows = sequence[2] * G, tile = tiles - 1 - item / c.K, kv = item % c.K;
    const long first = rows * tile / tiles, M = rows * (tile + 1) / tiles - first;
    FOR_ROWS(M, (attend_rows<W, R>(c, sequence, kv, first)))
  });
}

// --- Weights ----------------------------------------------------------------------------------------------------

struct PackCall {
  char* w;  // panels, zero at first
  const float* rows;  // [count, K]
  long first, count;  // rows [first, first + count) of the matrix
  long K;
  long gate;  // gated: F, rows below it are gate's, the others up's; else 0
};

inline void place_of(long row, long gate, long& panel, int& column) {
  const long local = row < gate || !gate ? row : row - gate;
  panel = gate ? local / V * 2 + (row >= gate) : local / V;
  column = int(local % V);
}

template <class W>
void pack_row(char* p, const float* x, long K, int column) {
  for (long k = 0; k < K; ++k) W::set(p, k, column, x[k]);
}

inline float absolute_top(const float* x, long n) {
  float top = 0;
  for (long i = 0; i < n; ++i) {
    const float a = x[i] < 0 ? -x[i] : x[i];
    if (a > top) top = a;
  }
  return top;
}

inline int rounded(float f, int least, int most) {
  const int i = int(__builtin_roundevenf(f));
  return i < least ? least : i > most ? most : i;
}

template <>
void pack_row<I8>(char* p, const float* x, long K, int column) {
  const float scale = absolute_top(x, K) / 127;
  for (long k = 0; k < K; ++k)
    reinterpret_cast<int8_t*>(p)[k * V + column] = int8_t(scale ? rounded(x[k] / scale, -127, 127) : 0);
  I8::scales(p, K)[column] = scale;
}

template <>
void pack_row<I4>(char* p, const float* x, long K, int column) {
  for (long g = 0; g * GROUP < K; ++g) {
    const long from = g * GROUP, to = least(from + GROUP, K);
    const float scale = absolute_top(x + from, to - from) / 7;
    I4::scales(p, K)[g * V + column] = scale;
    for (long k = from; k < to; ++k) {
      const int q = (scale ? rounded(x[k] / scale, -8, 7) : 0) + 8;
      uint8_t& byte = reinterpret_cast<uint8_t*>(p)[k / 2 * V + column];
      byte = uint8_t(k & 1 ? (byte & 15) | q << 4 : (byte & 240) | q);
    }
  }
}

template <class W>
void pack(const PackCall& c, int threads) {
  const size_t panel_bytes = W::bytes(c.K);
  parallel_for(threads, ceil_div(c.count, V), [&](long item) {
    for (long i = item * V; i < least(item * V + V, c.count); ++i) {
      long panel;
      int column;
      place_of(c.first + i, c.gate, panel, column);
      pack_row<W>(c.w + panel * panel_bytes, c.rows + i * c.K, c.K, column);
    }
  });
}

template <class W>
void unpack(const char* w, const int64_t* rows, float* out, long count, long K, int threads) {
  const size_t panel_bytes = W::bytes(K);
  parallel_for(count > 8 ? threads : 1, count, [&](long i) {
    const char* p = w + rows[i] / V * panel_bytes;
    for (long k = 0; k < K; ++k) out[i * K + k] = W::get(p, K, k, int(rows[i] % V));
  });
}

}  // namespace

// --- What native.py calls -----------------------------------------------------------------------------------------

#define FOR_FORMAT(format, CALL)                   \
  switch (format) {                                \
    case 0: { typedef F32 W; CALL; } break;        \
    case 1: { typedef BF16 W; CALL; } break;       \
    case 2: { typedef I8 W; CALL; } break;         \
    case 3: { typedef I4 W; CALL; } break;         \
  }

extern "C" {

long phalanx_panel_bytes(int format, long K) {
  FOR_FORMAT(format, return long(W::bytes(K)))
  return 0;
}

void phalanx_pack(int format, const PackCall* c, int threads) { FOR_FORMAT(format, pack<W>(*c, threads)) }

void phalanx_unpack(int format, const char* w, const int64_t* rows, float* out, long count, long K, int threads) {
  FOR_FORMAT(format, unpack<W>(w, rows, out, count, K, threads))
}

void phalanx_linear(int format, const LinearCall* c, int threads) { FOR_FORMAT(format, linear<W>(*c, threads)) }

// x += delta (when given); out = x / rms(x) * weight (Zhang & Sennrich 2019).
void phalanx_add_rms_norm(float* x, const float* delta, const float* weight, float* out, long T, long D, float eps,
                          int threads) {
  parallel_for(T * D > 32768 ? threads : 1, T, [=](long t) {
    float* row = x + t * D;
    if (delta) {
      const float* more = delta + t * D;
      for (long i = 0; i < D; ++i) row[i] += more[i];
    }
    scale_by(out + t * D, row, weight, 1.0f / __builtin_sqrtf(mean_square(row, D) + eps), D);
  });
}

void phalanx_attend(int format, const AttentionCall* c, int threads) {
  if (format == 0)
    attend<F32>(*c, threads);
  else
    attend<BF16>(*c, threads);
}
}
