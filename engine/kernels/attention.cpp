// Paged attention: norm and rotate heads, write keys and values into the cache, then online softmax over the cache.
//
// Shapes: T tokens of a step, B sequences, H query heads, K KV heads, G = H / K, E head size, S = E rounded up
// to 16, R rows: (token, head) pairs of the G query heads of one KV head, in the order of tokens.

#include "panels.h"
#include "threads.h"

namespace {

constexpr int TILE = 64;  // keys per iteration of the online softmax
constexpr int BLOCKS = TILE / V;
constexpr float LOG2_E = 1.44269504f;  // a factor of scores: softmax then uses 2^x, which is cheaper than e^x

struct AttentionCall {
  float* qkv;  // [T, (H + 2K) E]; queries and keys are rotated in place
  float* out;  // [T, H E]
  char* keys;  // of this layer: [blocks][K] panels of E x 16 tokens, allocated for S x 16
  char* values;  // of this layer: [blocks][K][S / 16] panels of 16 tokens x 16 elements
  const float *cosine, *sine;  // [P, E / 2]
  const float *q_norm, *k_norm;  // [E] or null
  const int32_t* positions;  // [T]
  const int32_t* sequences;  // [B][4]: slot, first row of qkv, number of queries, position of the first query
  const int32_t* tables;  // [slots, stride]
  long T, B, H, K, E, stride;
  long window;  // how many keys a query attends to, its own included; 0 for all
  float eps, scale;
};

inline long padded(long E) { return ceil_div(E, V) * V; }

// Rotary embedding of one head (Su et al. 2021): its halves are the real and the imaginary parts. Then multiply by
// `scale`.
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

// The sequence that row t belongs to. Binary search: sequences are in the order of their rows.
inline long sequence_of(const AttentionCall& c, long t) {
  long low = 0, high = c.B - 1;
  while (low < high) {
    const long middle = (low + high + 1) / 2;
    if (c.sequences[middle * 4 + 1] <= t) low = middle; else high = middle - 1;
  }
  return low;
}

// Norms and rotates a token's queries and keys, and writes its keys and values into the cache.
template <class W>
void write_cache(const AttentionCall& c, long t) {
  typedef typename W::T Number;
  const long E = c.E, half = E / 2, position = c.positions[t];
  const float *cosine = c.cosine + position * half, *sine = c.sine + position * half;
  float* q = c.qkv + t * (c.H + 2 * c.K) * E;
  for (long h = 0; h < c.H + c.K; ++h) {
    float* head = q + h * E;
    const float* norm = h < c.H ? c.q_norm : c.k_norm;
    if (norm) scale_by(head, head, norm, 1.0f / __builtin_sqrtf(mean_square(head, E) + c.eps), E);
    rotate(head, cosine, sine, half, h < c.H ? c.scale * LOG2_E : 1.0f);
  }
  const int32_t* sequence = c.sequences + sequence_of(c, t) * 4;
  const long block = c.tables[sequence[0] * c.stride + position / V];
  const int slot = int(position % V);
  // The first token of a block clears the places behind the last token that this step writes.
  const int first_to_clear = slot ? V : int(min(V, sequence[3] + sequence[2] - position));
  for (long k = 0; k < c.K; ++k) {
    const long place = (block * c.K + k) * padded(E) * V;
    const float *key = q + (c.H + k) * E, *value = key + c.K * E;
    char* key_panel = c.keys + place * sizeof(Number);
    for (long e = 0; e < E; ++e) W::set(key_panel, e, slot, key[e]);
    // A reused block may hold values of another sequence, even NaN. Masked keys have weight 0, and 0 * NaN is NaN.
    char* value_panels = c.values + place * sizeof(Number);
    for (int later = first_to_clear; later < V; ++later)
      for (long e = 0; e < E; ++e) W::set(value_panels + e / V * V * V * sizeof(Number), later, int(e % V), 0);
    for (long e = 0; e < E; ++e)
      W::set(value_panels + e / V * V * V * sizeof(Number), slot, int(e % V), value[e]);
  }
}

// Attention of R rows of one KV head over tiles of keys, with the online softmax (Milakov & Gimelshein 2018). Tiles
// begin at multiples of TILE, and a tile whose keys are all masked for a row leaves that row's bits alone: so a row
// does not depend on the rows that share its tiles.
template <class W, int R>
void attend_rows(const AttentionCall& c, const int32_t* sequence, long kv, long first_row) {
  const long E = c.E, S = padded(E), G = c.H / c.K, width = (c.H + 2 * c.K) * E;
  const int32_t* table = c.tables + sequence[0] * c.stride;
  const long bytes = S * V * long(sizeof(typename W::T));
  float* q = scratch().floats(size_t(E + S) * R * 4);  // [E / 2][R][2]
  scratch().call = 0;
  float* sums = q + E * R;  // [R][S]
  long seen[R];  // row r attends to keys [from[r], seen[r])
  long from[R];
  for (int r = 0; r < R; ++r) {
    const long token = (first_row + r) / G, head = kv * G + (first_row + r) % G;
    const float* x = c.qkv + (sequence[1] + token) * width + head * E;
    for (long e = 0; e < E; e += 2) memcpy(q + e * R + r * 2, x + e, 8);
    for (long e = 0; e < S; ++e) sums[r * S + e] = 0;
    seen[r] = sequence[3] + token + 1;
    from[r] = c.window && seen[r] > c.window ? seen[r] - c.window : 0;
  }
  float top[R];
  vf total[R];
  for (int r = 0; r < R; ++r) top[r] = -__builtin_inff(), total[r] = vf{};
  constexpr int NV = R <= 4 ? 4 : 2;  // panels at a time: enough independent chains to hide the latency of an FMA
  const char *keys[2][BLOCKS], *values[BLOCKS];
  long place[BLOCKS];
  // Sets keys[1] and place to the blocks of the tile at `start`. Behind the last block it repeats the first one.
  auto locate = [&](long start) {
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
    const int blocks = int(min(BLOCKS, ceil_div(seen[R - 1] - start, V)));
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
      const float tile_top = horizontal_max(best), new_top = tile_top > top[r] ? tile_top : top[r];
      const float shift = new_top == -__builtin_inff() ? 0 : new_top;  // if no key is visible yet: no -inf - -inf
      vf tile_total = {};
      for (int b = 0; b < BLOCKS; ++b) {
        const vf e = exp2_below_0(scores[b] - shift);
        tile_total += e;
        store(p[r] + b * V, e);
      }
      keep[r] = top[r] == new_top ? 1.0f : exp2_below_0(splat(top[r] - shift))[0];
      total[r] = total[r] * keep[r] + tile_total;
      top[r] = new_top;
    }
    for (long e = 0; e < S; e += NV * V) {
      vf acc[R][NV];
      const int chunks = int(min(NV, (S - e) / V));
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
    const float a = 1.0f / horizontal_sum(total[r]);
    for (long e = 0; e < E; e += V) put(out + e, load(sums + r * S + e) * a, E - e);
  }
}

template <class W>
void attend(const AttentionCall& c, int threads) {
  parallel_for(c.T > 1 ? threads : 1, c.T, [&](long t) { write_cache<W>(c, t); });
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
    // The last rows of a prompt attend to the most keys. Start with them, so that no long item comes last.
    const long rows = sequence[2] * G, tile = tiles - 1 - item / c.K, kv = item % c.K;
    const long first = rows * tile / tiles, M = rows * (tile + 1) / tiles - first;
    FOR_ROWS(M, (attend_rows<W, R>(c, sequence, kv, first)))
  });
}

}  // namespace

extern "C" {

void phalanx_attend(int format, const AttentionCall* c, int threads) {
  if (format == 0)
    attend<F32>(*c, threads);
  else
    attend<BF16>(*c, threads);
}

}
