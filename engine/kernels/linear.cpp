// Products of activations and weights, with bias and SwiGLU, and the RMS norm.

#include "panels.h"
#include "threads.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

constexpr size_t PREFETCH_BYTES = 1024;  // distance in a panel; the best of 256 to 2048, as measured
constexpr size_t X_BYTES = 384 << 10;  // of x per pass: stays in the L2 cache while all panels stream through

struct LinearCall {
  const float* x;  // [M, K]
  const char* w;  // panels
  const float* bias;  // [N] or null; gated: gate's F, then up's F
  float* out;  // [M, N]; gated: [M, N], N columns of silu(gate) * up
  long M, N, K;
  int gated;  // panels alternate: 16 columns of gate, 16 of up
};

inline vf bias_of(const float* bias, long columns) {
  float s[V] = {};
  memcpy(s, bias, size_t(min(columns, V)) * 4);
  return load(s);
}

// Finishes the columns of the two panels at `p`: scale, bias, activation, store. `unit` is the number of the pair.
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

// Packs rows [row, row + M) of x by pairs of k: [K / 2][M][2].
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
    const char* ahead[2] = {p[0] + PREFETCH_BYTES, p[1] + PREFETCH_BYTES};
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
      for (long i = 0, pairs = min(GROUP, c.K - k) / 2; i < pairs; ++i, y += 2 * M) {
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
// AVX512-BF16 has an instruction for bf16 products with float32 sums. It needs x in bf16 too.
template <>
struct Product<BF16> {
  template <int M>
  static void run(const LinearCall& c, const float* x, long row, long unit, const char* const* p) {
    __m512 sums[M][2];
    for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = _mm512_setzero_ps();
    const int32_t* y = reinterpret_cast<const int32_t*>(x);
    for (long k = 0; k < c.K; k += 2, y += M) {
      for (int n = 0; n < 2; ++n) __builtin_prefetch(p[n] + k * V * 2 + PREFETCH_BYTES);
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

// Packs rows of x by pairs of k, rounded to bf16: [K / 2][M][2].
inline void pack_rows_bf16(const LinearCall& c, float* to, long row, long M) {
  for (long m = 0; m < M; ++m) {
    const float* x = c.x + (row + m) * c.K;
    uint16_t* y = reinterpret_cast<uint16_t*>(to) + m * 2;
    for (long k = 0; k < c.K; k += 2, y += 2 * M) y[0] = to_bf16(x[k]), y[1] = to_bf16(x[k + 1]);
  }
}

long calls;  // counts the products of all formats, since they share each thread's scratch memory

// Rows are processed in passes whose x fits the cache, and each pass is cut into register tiles of equal size.
// Threads share the columns.
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
    for (long unit = first; unit < min(first + grain, units); ++unit) {
      const char* p[2] = {c.w + unit * 2 * panel, c.w + (unit * 2 + 1) * panel};
      for (long t = 0; t < tiles; ++t) {
        const long a = rows * t / tiles, M = rows * (t + 1) / tiles - a;
        FOR_ROWS(M, Product<W>::template run<R>(c, x + a * c.K, row + a, unit, p))
      }
    }
  });
}

}  // namespace

extern "C" {

void phalanx_linear(int format, const LinearCall* c, int threads) { FOR_FORMAT(format, linear<W>(*c, threads)) }

// x += delta, if there is a delta; out = x / rms(x) * weight (Zhang & Sennrich 2019).
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

}
