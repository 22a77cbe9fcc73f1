// Samples the next token of each row: temperature, min-p, top-k, top-p, then the Gumbel-max trick.
//
// It samples the same token as `engine.kernels.sample` does in torch, without sorting the vocabulary. A histogram of
// the logits finds the bucket where top-k or top-p cuts, and only that bucket is sorted. The noise is computed in
// float32 for all tokens, and again in float64 for the tokens whose score is close to the best.

#include <math.h>

#include "threads.h"
#include "vectors.h"

namespace {

constexpr int BUCKETS = 1024;
constexpr float PER_UNIT = 16;  // buckets per factor of e; tokens less likely than the best by e^-64 share the last
constexpr float MARGIN = 1e-3f;  // above the error of a float32 score, for scores below 1e3 in size
constexpr int CANDIDATES = 1024;

typedef vu vu_u __attribute__((aligned(4)));

struct Spec {  // native.py declares the same
  float temperature;  // 0 is greedy
  float top_p, log_min_p;  // log_min_p: -inf keeps all
  int32_t top_k;  // 0 keeps all
  uint32_t low, high;  // the key of the noise
};

struct Token {
  float scaled;  // logit / temperature
  int32_t id;
};

// The most likely token first; equal ones by id.
int by_likelihood(const void* a, const void* b) {
  const Token *x = static_cast<const Token*>(a), *y = static_cast<const Token*>(b);
  if (x->scaled != y->scaled) return x->scaled > y->scaled ? -1 : 1;
  return x->id < y->id ? -1 : 1;
}

// The last token that stays, in the order of likelihood.
struct Cut {
  float scaled = -__builtin_inff();
  int32_t id = INT32_MAX;
  bool keeps(float s, int32_t i) const { return s > scaled || (s == scaled && i <= id); }
};

struct Histogram {
  long count[BUCKETS];
  double mass[BUCKETS];
};

inline int bucket_of(float top, float scaled) {
  const float place = (top - scaled) * PER_UNIT;
  return place < BUCKETS - 1 ? int(place) : BUCKETS - 1;
}

// The tokens of a bucket that `cut` keeps, the most likely first. The caller frees them.
Token* sorted_bucket(const float* logits, long V_, const Spec& spec, float top, const Cut& cut, int bucket, long& n) {
  n = 0;
  long room = 256;
  Token* tokens = static_cast<Token*>(malloc(size_t(room) * sizeof(Token)));
  for (long i = 0; i < V_; ++i) {
    const float s = logits[i] / spec.temperature;
    if (!(s > -__builtin_inff()) || bucket_of(top, s) != bucket || !cut.keeps(s, int32_t(i))) continue;
    if (n == room) tokens = static_cast<Token*>(realloc(tokens, size_t(room *= 2) * sizeof(Token)));
    tokens[n++] = {s, int32_t(i)};
  }
  qsort(tokens, size_t(n), sizeof(Token), by_likelihood);
  return tokens;
}

// Where min-p, then top-k, then top-p cut. Each one applies to the tokens that the one before leaves, and cuts the end
// of the order. So one Cut describes all three.
Cut find_cut(const float* logits, long V_, const Spec& spec, float top) {
  Cut cut;
  cut.scaled = top + spec.log_min_p;
  Histogram* h = static_cast<Histogram*>(calloc(1, sizeof(Histogram)));
  for (long i = 0; i < V_; i += V) {
    float s[V], e[V];
    const long n = min(V, V_ - i);
    for (long j = 0; j < V; ++j) s[j] = j < n ? logits[i + j] / spec.temperature : -__builtin_inff();
    store(e, exp(load(s) - top));
    for (long j = 0; j < n; ++j) {
      if (!(s[j] > -__builtin_inff()) || !cut.keeps(s[j], int32_t(i + j))) continue;
      const int b = bucket_of(top, s[j]);
      ++h->count[b];
      h->mass[b] += e[j];
    }
  }
  double total = 0;
  long n = 0, before = 0;
  int last = BUCKETS - 1;  // the last bucket with tokens that top-k keeps
  for (int b = 0; b < BUCKETS; ++b) {
    if (spec.top_k > 0 && before + h->count[b] >= spec.top_k) {
      Token* tokens = sorted_bucket(logits, V_, spec, top, cut, b, n);
      const Token& kept = tokens[spec.top_k - before - 1];
      cut.scaled = kept.scaled, cut.id = kept.id, last = b;
      h->mass[b] = 0;
      for (long i = 0; i < spec.top_k - before; ++i) h->mass[b] += ::exp(double(tokens[i].scaled) - double(top));
      free(tokens);
      total += h->mass[b];
      break;
    }
    before += h->count[b];
    total += h->mass[b];
  }
  if (spec.top_p < 1) {
    const double wanted = double(spec.top_p) * total;
    double mass = 0;
    for (int b = 0; b <= last; mass += h->mass[b++]) {
      if (mass + h->mass[b] < wanted && b < last) continue;
      Token* tokens = sorted_bucket(logits, V_, spec, top, cut, b, n);
      for (long i = 0; i < n && (i == 0 || mass < wanted); ++i) {
        cut.scaled = tokens[i].scaled, cut.id = tokens[i].id;
        mass += ::exp(double(tokens[i].scaled) - double(top));
      }
      free(tokens);
      if (n) break;
    }
  }
  free(h);
  return cut;
}

inline vu mix(vu x) {  // MurmurHash3's 32-bit finaliser
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  return x ^ x >> 16;
}

inline double gumbel(uint32_t bits) { return -::log(-::log((double(bits) + 0.5) / 4294967296.0)); }

// Standard Gumbel noise in float32. Near u = 1, log(u) is computed from 1 - u, which is exact there.
inline vf gumbel(vu bits) {
  const vf u = (__builtin_convertvector(bits, vf) + 0.5f) * 0x1p-32f;
  const vf v = (__builtin_convertvector(~bits, vf) + 0.5f) * 0x1p-32f;
  const vf series = v * (1.0f + v * (0.5f + v * (1.0f / 3)));
  const vf exponential = select(v < splat(0x1p-6f), series, -log(u));
  return -log(exponential);
}

struct Best {
  double score = -__builtin_inf();
  int32_t id = 0;
  void offer(float scaled, int32_t i, uint32_t bits) {
    const double s = double(scaled) + gumbel(bits);
    if (s > score) score = s, id = i;
  }
};

int64_t sample(const float* logits, long V_, const Spec& spec) {
  vf best = splat(-__builtin_inff());
  long i = 0;
  for (; i + V <= V_; i += V) best = max(best, load(logits + i));
  float top = horizontal_max(best);
  for (; i < V_; ++i) top = logits[i] > top ? logits[i] : top;
  if (spec.temperature == 0) {
    for (i = 0; i < V_ && !(logits[i] == top);) ++i;
    return i < V_ ? i : 0;  // no logit equals `top` if all are NaN
  }
  top /= spec.temperature;
  Cut cut;
  if (spec.top_k > 0 || spec.top_p < 1 || spec.log_min_p > -__builtin_inff()) cut = find_cut(logits, V_, spec, top);

  Best chosen;
  float leader = -__builtin_inff();  // the best score in float32 so far
  struct { float score, scaled; int32_t id; uint32_t bits; } close[CANDIDATES];
  int count = 0;
  for (i = 0; i < V_; i += V) {
    vu ids = vu{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + uint32_t(i);
    const vu bits = mix(mix(ids + spec.low) ^ spec.high);
    float s[V], score[V];
    if (i + V <= V_)
      store(s, load(logits + i) / spec.temperature);
    else
      for (long j = 0; j < V; ++j) s[j] = i + j < V_ ? logits[i + j] / spec.temperature : -__builtin_inff();
    const vf scores = load(s) + gumbel(bits);
    if (!(horizontal_max(scores) >= leader - MARGIN)) continue;
    store(score, scores);
    for (int j = 0; j < V; ++j) {
      if (!(score[j] >= leader - MARGIN) || !(s[j] > -__builtin_inff()) || !cut.keeps(s[j], int32_t(i + j))) continue;
      if (score[j] > leader) leader = score[j];
      if (count == CANDIDATES) {
        for (int n = 0; n < count; ++n) chosen.offer(close[n].scaled, close[n].id, close[n].bits);
        count = 0;
      }
      close[count++] = {score[j], s[j], int32_t(i + j), bits[j]};
    }
  }
  for (int n = 0; n < count; ++n)
    if (close[n].score >= leader - MARGIN) chosen.offer(close[n].scaled, close[n].id, close[n].bits);
  return chosen.id;
}

}  // namespace

extern "C" {

// logits [S, count] to ids [S].
void phalanx_sample(const float* logits, const Spec* specs, int64_t* ids, long S, long count, int threads) {
  parallel_for(threads, S, [=](long i) { ids[i] = sample(logits + i * count, count, specs[i]); });
}

}
