// Packing rows of weights into panels, quantising them, and taking single rows out again.

#include "panels.h"
#include "threads.h"

namespace {

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
