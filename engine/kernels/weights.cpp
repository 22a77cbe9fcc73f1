// Packs rows of weights into panels, quantising them where the format asks for it, and unpacks single rows.

#include "panels.h"
#include "threads.h"

namespace {

struct PackCall {
  char* w;  // panels; all zero before the first call
  const float* rows;  // [count, K]
  long first, count;  // these are rows [first, first + count) of the matrix
  long K;
  long gate;  // of a gated matrix: F; rows below F are the gate, the others up. Otherwise 0
};

// The panel and the column of a matrix row. A gated matrix alternates panels of gate and up.
inline void place_of(long row, long gate, long& panel, int& column) {
  const long local = row < gate || !gate ? row : row - gate;
  panel = gate ? local / V * 2 + (row >= gate) : local / V;
  column = int(local % V);
}

template <class W>
void pack_row(char* p, const float* x, long K, int column) {
  for (long k = 0; k < K; ++k) W::set(p, k, column, x[k]);
}

inline float max_abs(const float* x, long n) {
  float largest = 0;
  for (long i = 0; i < n; ++i) {
    const float a = x[i] < 0 ? -x[i] : x[i];
    if (a > largest) largest = a;
  }
  return largest;
}

inline int round_to(float f, int low, int high) {
  const int i = int(__builtin_roundevenf(f));
  return i < low ? low : i > high ? high : i;
}

template <>
void pack_row<I8>(char* p, const float* x, long K, int column) {
  const float scale = max_abs(x, K) / 127;
  for (long k = 0; k < K; ++k)
    reinterpret_cast<int8_t*>(p)[k * V + column] = int8_t(scale ? round_to(x[k] / scale, -127, 127) : 0);
  I8::scales(p, K)[column] = scale;
}

template <>
void pack_row<I4>(char* p, const float* x, long K, int column) {
  for (long g = 0; g * GROUP < K; ++g) {
    const long from = g * GROUP, to = min(from + GROUP, K);
    const float scale = max_abs(x + from, to - from) / 7;
    I4::scales(p, K)[g * V + column] = scale;
    for (long k = from; k < to; ++k) {
      const int q = (scale ? round_to(x[k] / scale, -8, 7) : 0) + 8;
      uint8_t& byte = reinterpret_cast<uint8_t*>(p)[k / 2 * V + column];
      byte = uint8_t(k & 1 ? (byte & 15) | q << 4 : (byte & 240) | q);
    }
  }
}

template <class W>
void pack(const PackCall& c, int threads) {
  const size_t panel_bytes = W::bytes(c.K);
  parallel_for(threads, ceil_div(c.count, V), [&](long item) {
    for (long i = item * V; i < min(item * V + V, c.count); ++i) {
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

extern "C" {

long phalanx_panel_bytes(int format, long K) {
  FOR_FORMAT(format, return long(W::bytes(K)))
  return 0;
}

void phalanx_pack(int format, const PackCall* c, int threads) { FOR_FORMAT(format, pack<W>(*c, threads)) }

void phalanx_unpack(int format, const char* w, const int64_t* rows, float* out, long count, long K, int threads) {
  FOR_FORMAT(format, unpack<W>(w, rows, out, count, K, threads))
}

}
