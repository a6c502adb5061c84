/* y[M, N] = x[M, K] times the transposed weights w[N, K] plus a bias, where w is kept in 16, 8 or 4 bits. For x86-64
 * with AVX2.
 *
 * torch's own kernels for such weights are fast on AVX-512 only (docs/decisions/0010). All sums of a row of x are made
 * in the same order whatever M is, so that a sequence computes the same alone and in a batch.
 *
 * In 16 bits all is bfloat16, and summed in floats: the halves of a 32-bit word become floats by a shift and a mask, so
 * x is laid out likewise, even columns of 16 before odd ones.
 *
 * In fewer bits weights stay integers until the end of a group: the activations of GROUP columns become 16-bit fixed
 * point numbers with one scale, so that one instruction multiplies and adds sixteen pairs. 16 bits are twice what
 * bfloat16 has.
 *
 * x, the bias and y are all bfloat16 or all floats; y is rounded once.
 *
 *   8 bits  w[n, k] = scale[n] * q[n, k]
 *   4 bits  w[n, k] = scale[n, g] * q[n, k] + zero[n, g]   for k in group g; a group's 64 numbers of 4 bits lie in 32
 *           bytes, number 16 i + j in bits 4 i to 4 i + 3 of 16-bit word j; scale and zero are bfloat16, side by side,
 *           their rows padded to a multiple of 8 groups.
 *
 * swarm/model/kernels.py calls this; swarm/model/weight_only.py has the same in torch, with which the tests compare.
 */
#include "lanes.h"

#if HAS_KERNELS
#define GROUP 64
#define BLOCK_ROWS 32            /* rows of w that stay in the L2 cache while all rows of x pass */
#define AHEAD 1024               /* bytes from here that are asked for from memory */

struct product {
  const uint8_t *w;
  const float *scale;         /* [N], 8 bits only */
  const uint16_t *scale_zero; /* [N, padded_groups, 2], 4 bits only */
  const void *bias;           /* [N], or NULL */
  void *y;                    /* [M, N] */
  int halves;                 /* whether x, bias and y are bfloat16 rather than floats */
  long M, N, K, padded_groups;
  const float *floats;  /* [M, K] x, 16 bits only */
  const int16_t *fixed; /* [M, K] x in fixed point, 8 and 4 bits only, as are these: */
  const float *unit;    /* [M, padded_groups] what 1 stands for in a group of x */
  const float *sum;     /* [M, padded_groups] sum of a group of x */
};

INLINE void put(const struct product *p, long m, long n, float y) {
  if (p->halves) {
    if (p->bias) y += to_float(((const uint16_t *)p->bias)[n]);
    ((uint16_t *)p->y)[m * p->N + n] = to_half(y);
  } else {
    if (p->bias) y += ((const float *)p->bias)[n];
    ((float *)p->y)[m * p->N + n] = y;
  }
}

/* The columns 16 i to 16 i + 15 of a group of w, as 16-bit integers; `packed` is the whole group, 4 bits only. */
INLINE __m256i unpack(const int bits, const uint8_t *group, __m256i packed, const int i) {
  if (bits == 8)
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(group + 16 * i)));
  return i == 3 ? _mm256_srli_epi16(packed, 12)
                : _mm256_and_si256(_mm256_srli_epi16(packed, 4 * i), _mm256_set1_epi16(15));
}

/* Row n of w times C rows of x from m on. */
INLINE void dot(const struct product *p, long n, long m, const int bits, const int C) {
  const long K = p->K, num_groups = K / GROUP, stride = p->padded_groups, group_bytes = GROUP * bits / 8;
  const uint8_t *group = p->w + n * num_groups * group_bytes;
  __m256 total[4];
  UNROLL for (int c = 0; c < C; c++) total[c] = _mm256_setzero_ps();
  for (long first = 0; first < num_groups; first += 8) {
    float factors[4][8]; /* what the integer sums of eight groups are multiplied with */
    UNROLL for (int c = 0; c < C; c++) {
      __m256 factor = _mm256_loadu_ps(p->unit + (m + c) * stride + first);
      if (bits == 4) {
        __m256i pairs = _mm256_loadu_si256((const __m256i *)(p->scale_zero + (n * stride + first) * 2));
        __m256 scale = even_halves(pairs), zero = odd_halves(pairs);
        total[c] = _mm256_fmadd_ps(zero, _mm256_loadu_ps(p->sum + (m + c) * stride + first), total[c]);
        factor = _mm256_mul_ps(factor, scale);
      }
      _mm256_storeu_ps(factors[c], factor);
    }
    const long end = first + 8 < num_groups ? first + 8 : num_groups;
    for (long g = first; g < end; g++, group += group_bytes) {
      const __m256i packed = _mm256_loadu_si256((const __m256i *)group);
      __m256i products[4];
      _mm_prefetch((const char *)group + AHEAD, _MM_HINT_T0);
      UNROLL for (int i = 0; i < 4; i++) {
        const __m256i q = unpack(bits, group, packed, i);
        UNROLL for (int c = 0; c < C; c++) {
          __m256i x = _mm256_loadu_si256((const __m256i *)(p->fixed + (m + c) * K + g * GROUP + 16 * i));
          __m256i product = _mm256_madd_epi16(q, x);
          products[c] = i ? _mm256_add_epi32(products[c], product) : product;
        }
      }
      UNROLL for (int c = 0; c < C; c++)
        total[c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[c]), _mm256_broadcast_ss(&factors[c][g - first]),
                                   total[c]);
    }
  }
  UNROLL for (int c = 0; c < C; c++) {
    const float y = sum_of_lanes(total[c]);
    put(p, m + c, n, bits == 8 ? p->scale[n] * y : y);
  }
}

/* As dot, with weights in 16 bits. */
INLINE void dot_halves(const struct product *p, long n, long m, const int C) {
  const long K = p->K;
  const uint16_t *w = (const uint16_t *)p->w + n * K;
  const float *x = p->floats + m * K;
  __m256 even[4], odd[4];
  UNROLL for (int c = 0; c < C; c++) even[c] = odd[c] = _mm256_setzero_ps();
  for (long k = 0; k < K; k += 16) {
    const __m256i words = _mm256_loadu_si256((const __m256i *)(w + k));
    const __m256 w_even = even_halves(words), w_odd = odd_halves(words);
    _mm_prefetch((const char *)(w + k) + AHEAD, _MM_HINT_T0);
    UNROLL for (int c = 0; c < C; c++) {
      even[c] = _mm256_fmadd_ps(w_even, _mm256_loadu_ps(x + c * K + k), even[c]);
      odd[c] = _mm256_fmadd_ps(w_odd, _mm256_loadu_ps(x + c * K + k + 8), odd[c]);
    }
  }
  UNROLL for (int c = 0; c < C; c++) put(p, m + c, n, sum_of_lanes(_mm256_add_ps(even[c], odd[c])));
}

INLINE void dots(const struct product *p, long begin, long end, long m, const int bits, const int C) {
  for (long n = begin; n < end; n++)
    if (bits == 16) dot_halves(p, n, m, C);
    else dot(p, n, m, bits, C);
}

/* Some rows of w times all of x: the weights are unpacked once for four rows of x. */
INLINE void block(const struct product *p, long begin, long end, const int bits) {
  long m = 0;
  for (; m + 4 <= p->M; m += 4) dots(p, begin, end, m, bits, 4);
  for (; m + 2 <= p->M; m += 2) dots(p, begin, end, m, bits, 2);
  for (; m < p->M; m++) dots(p, begin, end, m, bits, 1);
}

INLINE void share(const struct product *p, const int bits) {
  const long num_threads = thread_count(), thread = thread_number();
  const long begin = p->N * thread / num_threads, end = p->N * (thread + 1) / num_threads;
  for (long n = begin; n < end; n += BLOCK_ROWS) block(p, n, n + BLOCK_ROWS < end ? n + BLOCK_ROWS : end, bits);
}

__attribute__((target("avx2,fma"))) static void share_half(void *p) { share(p, 16); }
__attribute__((target("avx2,fma"))) static void share_int8(void *p) { share(p, 8); }
__attribute__((target("avx2,fma"))) static void share_int4(void *p) { share(p, 4); }

/* A group of x as fixed point numbers. What is not finite makes the unit, and with it the result, a NaN. */
INLINE void to_fixed_point(const void *x, long at, const int halves, int16_t *out, float *unit, float *sum) {
  const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 largest = _mm256_setzero_ps(), nothing = _mm256_setzero_ps();
  for (int i = 0; i < GROUP; i += 8) {
    __m256 part = load8(x, at + i, halves);
    largest = _mm256_max_ps(largest, _mm256_and_ps(part, no_sign));
    nothing = _mm256_fmadd_ps(part, _mm256_setzero_ps(), nothing);
  }
  float lanes[8], most = 0;
  _mm256_storeu_ps(lanes, largest);
  for (int i = 0; i < 8; i++) most = lanes[i] > most ? lanes[i] : most;
  const __m256 factor = _mm256_set1_ps(most > 1e-30f ? 32767.0f / most : 0);
  __m256i integer_sum = _mm256_setzero_si256();
  for (int i = 0; i < GROUP; i += 16) {
    __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(load8(x, at + i, halves), factor));
    __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(load8(x, at + i + 8, halves), factor));
    integer_sum = _mm256_add_epi32(integer_sum, _mm256_add_epi32(low, high));
    _mm256_storeu_si256((__m256i *)(out + i), _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8));
  }
  *unit = most / 32767.0f + sum_of_lanes(nothing);
  *sum = *unit * sum_of_lanes(_mm256_cvtepi32_ps(integer_sum));
}

INLINE int multiply(struct product p, const void *x, const int halves, void (*work)(void *)) {
  const long num_groups = p.K / GROUP, stride = p.padded_groups = (num_groups + 7) / 8 * 8;
  int16_t *fixed = malloc(p.M * p.K * sizeof *fixed);
  float *unit = calloc(2 * p.M * stride, sizeof *unit);
  if (fixed && unit) {
    for (long m = 0; m < p.M; m++)
      for (long g = 0; g < num_groups; g++) {
        const long at = m * p.K + g * GROUP;
        to_fixed_point(x, at, halves, fixed + at, unit + m * stride + g, unit + (p.M + m) * stride + g);
      }
    p.fixed = fixed, p.unit = unit, p.sum = unit + p.M * stride;
    run(work, &p, p.M * p.N * p.K);
  }
  free(fixed), free(unit);
  return fixed && unit;
}

INLINE int multiply_halves(struct product p, const uint16_t *x) {
  float *floats = malloc(p.M * p.K * sizeof *floats);
  if (floats) {
    for (long i = 0; i < p.M * p.K; i += 16) {
      const __m256i words = _mm256_loadu_si256((const __m256i *)(x + i));
      _mm256_storeu_ps(floats + i, even_halves(words));
      _mm256_storeu_ps(floats + i + 8, odd_halves(words));
    }
    p.floats = floats;
    run(share_half, &p, p.M * p.N * p.K);
  }
  free(floats);
  return floats != NULL;
}

/* Returns 0 when there was no memory. K is a multiple of 16 for weights of 16 bits, which want halves, and of GROUP for
 * fewer bits; scales are what the number of bits says above. */
__attribute__((target("avx2,fma"))) int product(int bits, int halves, const void *x, const void *w, const void *scales,
                                                const void *bias, void *y, long M, long N, long K) {
  const struct product p = {.w = w, .scale = scales, .scale_zero = scales, .bias = bias, .y = y, .halves = halves,
                            .M = M, .N = N, .K = K};
  if (bits == 16) return multiply_halves(p, x);
  void (*work)(void *) = bits == 8 ? share_int8 : share_int4;
  return halves ? multiply(p, x, 1, work) : multiply(p, x, 0, work);
}
#endif
