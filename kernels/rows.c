/* What a block does with rows of activations beside multiplying them with weights: RMS norm, and the attention of
 * single tokens over keys and values as they lie in the cache. All in bfloat16, computed in floats. For x86-64 with AVX2.
 *
 * A row is computed in the same way whatever else is in the batch, and by however many threads.
 *
 * swarm/model/kernels.py calls this.
 */
#include <math.h>

#include "rows.h"

#if HAS_KERNELS
__attribute__((target("avx2,fma"))) void rms_norm(const uint16_t *x, const uint16_t *weight, uint16_t *y, long M,
                                                  long D, float epsilon) {
  for (long m = 0; m < M; m++, x += D, y += D) {
    __m256 squares = _mm256_setzero_ps();
    for (long i = 0; i < D; i += 8) {
      const __m256 part = load8(x, i, 1);
      squares = _mm256_fmadd_ps(part, part, squares);
    }
    const __m256 mean = _mm256_set1_ps(sum_of_lanes(squares) / D + epsilon);
    const __m256 factor = _mm256_div_ps(_mm256_set1_ps(1), _mm256_sqrt_ps(mean));
    for (long i = 0; i < D; i += 8)
      store8(y + i, _mm256_mul_ps(rounded(_mm256_mul_ps(load8(x, i, 1), factor)), load8(weight, i, 1)));
  }
}

#define KEYS 64 /* so many keys and their values are looked at in one go: they stay in the L1 cache */

INLINE float largest_of_lanes(__m256 v) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
}

/* Products of C query heads with some keys, scaled. Columns of x are laid out as even and odd ones of 16. */
INLINE void score(const struct attention *a, const float *x, const uint16_t *keys, long count, float *scores,
                  const int C) {
  for (long k = 0; k < count; k++, keys += a->key_slot) {
    __m256 even[4], odd[4];
    UNROLL for (int c = 0; c < C; c++) even[c] = odd[c] = _mm256_setzero_ps();
    for (long h = 0; h < a->H; h += 16) {
      const __m256i words = _mm256_loadu_si256((const __m256i *)(keys + h));
      const __m256 key_even = even_halves(words), key_odd = odd_halves(words);
      UNROLL for (int c = 0; c < C; c++) {
        even[c] = _mm256_fmadd_ps(key_even, _mm256_loadu_ps(x + c * a->H + h), even[c]);
        odd[c] = _mm256_fmadd_ps(key_odd, _mm256_loadu_ps(x + c * a->H + h + 8), odd[c]);
      }
    }
    UNROLL for (int c = 0; c < C; c++)
      scores[c * KEYS + k] = a->scaling * sum_of_lanes(_mm256_add_ps(even[c], odd[c]));
  }
}

/* Turn the scores of a query head into weights relative to the largest one so far, and `sum` into their sum so far.
 * Returns: what earlier weights have to be multiplied with. */
INLINE float weigh(float *scores, long count, float *largest, float *sum) {
  for (long k = count; k % 8; k++) scores[k] = -INFINITY;
  __m256 most = _mm256_loadu_ps(scores), total = _mm256_setzero_ps();
  for (long k = 8; k < count; k += 8) most = _mm256_max_ps(most, _mm256_loadu_ps(scores + k));
  const float before = *largest;
  *largest = largest_of_lanes(most) > before ? largest_of_lanes(most) : before;
  for (long k = 0; k < count; k += 8) {
    const __m256 weights = exponential(_mm256_sub_ps(_mm256_loadu_ps(scores + k), _mm256_set1_ps(*largest)));
    _mm256_storeu_ps(scores + k, weights);
    total = _mm256_add_ps(total, weights);
  }
  const float factor = before == -INFINITY ? 0 : _mm256_cvtss_f32(exponential(_mm256_set1_ps(before - *largest)));
  *sum = *sum * factor + sum_of_lanes(total);
  return factor;
}

/* Add weighted values to what C query heads have summed up, laid out as x is. */
INLINE void add_values(const struct attention *a, const uint16_t *values, long count, const float *weights,
                       const float *factors, float *out, const int C) {
  for (long v = 0; v < a->V; v += 16) {
    __m256 even[4], odd[4];
    UNROLL for (int c = 0; c < C; c++) {
      const __m256 factor = _mm256_set1_ps(factors[c]);
      even[c] = _mm256_mul_ps(factor, _mm256_loadu_ps(out + c * a->V + v));
      odd[c] = _mm256_mul_ps(factor, _mm256_loadu_ps(out + c * a->V + v + 8));
    }
    for (long k = 0; k < count; k++) {
      const __m256i words = _mm256_loadu_si256((const __m256i *)(values + k * a->value_slot + v));
      const __m256 value_even = even_halves(words), value_odd = odd_halves(words);
      UNROLL for (int c = 0; c < C; c++) {
        const __m256 weight = _mm256_broadcast_ss(weights + c * KEYS + k);
        even[c] = _mm256_fmadd_ps(weight, value_even, even[c]);
        odd[c] = _mm256_fmadd_ps(weight, value_odd, odd[c]);
      }
    }
    UNROLL for (int c = 0; c < C; c++) {
      _mm256_storeu_ps(out + c * a->V + v, even[c]);
      _mm256_storeu_ps(out + c * a->V + v + 8, odd[c]);
    }
  }
}

INLINE void attend_slots(const struct attention *a, const uint16_t *keys, const uint16_t *values, long count,
                         const float *x, float *scores, float *largest, float *sums, float *out, const int C) {
  float factors[4];
  score(a, x, keys, count, scores, C);
  UNROLL for (int c = 0; c < C; c++) factors[c] = weigh(scores + c * KEYS, count, largest + c, sums + c);
  add_values(a, values, count, scores, factors, out, C);
}

/* The query heads of one key/value head of one sequence; `room` is for (H + V + 2) G + 4 KEYS floats. */
INLINE void attend_head(const struct attention *a, long t, long n, float *room) {
  const long G = a->G, H = a->H, V = a->V;
  const uint16_t *q = a->q + (t * a->N + n) * G * H;
  float *x = room, *out = x + G * H, *largest = out + G * V, *sums = largest + G, *scores = sums + G;
  for (long i = 0; i < G * H; i += 16) {
    const __m256i words = _mm256_loadu_si256((const __m256i *)(q + i));
    _mm256_storeu_ps(x + i, even_halves(words));
    _mm256_storeu_ps(x + i + 8, odd_halves(words));
  }
  for (long i = 0; i < G * V; i++) out[i] = 0;
  for (long g = 0; g < G; g++) largest[g] = -INFINITY, sums[g] = 0;
  for (long r = t ? a->ends[t - 1] : 0; r < a->ends[t]; r++)
    for (long slot = a->runs[2 * r], end = a->runs[2 * r + 1]; slot < end; slot += KEYS) {
      const long count = end - slot < KEYS ? end - slot : KEYS;
      const uint16_t *keys = a->keys + n * a->key_head + slot * a->key_slot;
      const uint16_t *values = a->values + n * a->value_head + slot * a->value_slot;
      long g = 0;
      for (; g + 4 <= G; g += 4)
        attend_slots(a, keys, values, count, x + g * H, scores, largest + g, sums + g, out + g * V, 4);
      for (; g < G; g++)
        attend_slots(a, keys, values, count, x + g * H, scores, largest + g, sums + g, out + g * V, 1);
    }
  uint16_t *y = a->y + (t * a->N + n) * G * V;
  for (long i = 0; i < G * V; i += 16) {
    const __m256 sum = _mm256_set1_ps(sums[i / V]);
    const __m256i even = _mm256_castps_si256(rounded(_mm256_div_ps(_mm256_loadu_ps(out + i), sum)));
    const __m256i odd = _mm256_castps_si256(rounded(_mm256_div_ps(_mm256_loadu_ps(out + i + 8), sum)));
    _mm256_storeu_si256((__m256i *)(y + i), _mm256_or_si256(_mm256_srli_epi32(even, 16), odd));
  }
}

__attribute__((target("avx2,fma"))) void share_attention(void *data) {
  struct attention *a = data;
  float *room = malloc(((a->H + a->V + 2) * a->G + 4 * KEYS) * sizeof *room);
  if (!room) a->failed = 1;
  for (long unit = thread_number(); room && unit < a->T * a->N; unit += thread_count())
    attend_head(a, unit / a->N, unit % a->N, room);
  free(room);
}

/* Softmax attention of the newest token of T sequences over all their tokens. H and V are multiples of 16; strides are
 * counted in numbers. Returns 0 when there was no memory. */
int attention(const void *q, const void *keys, const void *values, void *y, const int64_t *runs, const int64_t *ends,
              const long *sizes, const long *strides, float scaling) {
  struct attention a = {.q = q, .keys = keys, .values = values, .y = y, .runs = runs, .ends = ends, .scaling = scaling,
                        .T = sizes[0], .N = sizes[1], .G = sizes[2], .H = sizes[3], .V = sizes[4],
                        .key_head = strides[0], .key_slot = strides[1], .value_head = strides[2],
                        .value_slot = strides[3]};
  long num_keys = 0;
  for (long r = 0; r < a.ends[a.T - 1]; r++) num_keys += runs[2 * r + 1] - runs[2 * r];
  run(share_attention, &a, num_keys * a.N * a.G * (a.H + a.V));
  return !a.failed;
}

int is_supported(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

#else
int is_supported(void) { return 0; }
#endif
