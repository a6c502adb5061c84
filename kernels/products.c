/* y[M, N] = x[M, K] times the transposed weights w[N, K] plus a bias, where w is kept in 16, 8 or 4 bits. For x86-64
 * with AVX2; wide.c has the same for AVX-512, tiles.c for AMX.
 *
 * All sums of a row of x are made in the same order whatever M is, so that a sequence computes the same alone and in a
 * batch.
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
#define MOST_ROWS 4
#include "shares.h"

#if HAS_KERNELS
/* The columns 16 i to 16 i + 15 of a group of w, as 16-bit integers; `packed` is the whole group, 4 bits only. */
INLINE __m256i unpack(const int bits, const uint8_t *group, __m256i packed, const int i) {
  if (bits == 8)
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(group + 16 * i)));
  return i == 3 ? _mm256_srli_epi16(packed, 12)
                : _mm256_and_si256(_mm256_srli_epi16(packed, 4 * i), _mm256_set1_epi16(15));
}

/* Row n of w times C rows of x from m on. */
INLINE void dot(const struct product *p, long n, long m, const int bits, const int C) {
  const long K = p->K, num_groups = K / GROUP, group_bytes = GROUP * bits / 8;
  const uint8_t *group = p->w + n * num_groups * group_bytes;
  __m256 total[4];
  UNROLL for (int c = 0; c < C; c++) total[c] = _mm256_setzero_ps();
  for (long first = 0; first < num_groups; first += 8) {
    float factors[4][8];
    UNROLL for (int c = 0; c < C; c++)
      _mm256_storeu_ps(factors[c], factors_of(p, n, m + c, first, bits, &total[c]));
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
  UNROLL for (int c = 0; c < C; c++) put_scaled(p, m + c, n, bits, sum_of_lanes(total[c]));
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

__attribute__((target(ISA))) static void share_half(const struct product *p) { share(p, 16); }
__attribute__((target(ISA))) static void share_int8(const struct product *p) { share(p, 8); }
__attribute__((target(ISA))) static void share_int4(const struct product *p) { share(p, 4); }

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

/* Whether rows of x are laid side by side for this product. */
static int is_laid_out(const struct product *p) {
  return p->bits == 16 && (p->level == AMX || (p->level == AVX512 && p->M >= SIDE_BY_SIDE));
}

/* How many rows of x there are with those that fill the last TILE, which AMX does not want. */
static long laid_rows(const struct product *p) {
  return p->level == AMX ? p->M : (p->M + TILE - 1) / TILE * TILE;
}

#define LINE 16 /* pairs of columns in a line of the caches */

/* A thread's share of laying up to TILE rows of x side by side: pair of columns after pair, of each pair that of every
 * row. */
static void lay_out(const struct product *p) {
  const long pairs = p->K / 2;
  const long begin = pairs * thread_number() / thread_count(), end = pairs * (thread_number() + 1) / thread_count();
  const uint32_t *x = p->x;
  for (long m = 0; m < p->M; m += TILE) {
    const long C = p->M - m < TILE ? p->M - m : TILE, width = laid_rows(p) - m < TILE ? C : TILE;
    uint32_t *out = p->pairs + m * pairs;
    for (long from = begin; from < end; from += LINE) { /* a whole line of each row, for they may share an L1 set */
      const long to = from + LINE < end ? from + LINE : end;
      for (long c = 0; c < width; c++)
        for (long k = from; k < to; k++) out[k * width + c] = c < C ? x[(m + c) * pairs + k] : 0;
    }
  }
}

long room_of(const struct product *p) {
  const long groups = (p->K / GROUP + 7) / 8 * 8;
  if (p->bits == 16 && !p->level) return p->M * p->K * sizeof *p->floats;
  if (p->bits == 16) return is_laid_out(p) ? laid_rows(p) * p->K * sizeof(uint16_t) : 0;
  return p->M * (p->K * sizeof *p->fixed + 2 * groups * sizeof *p->unit);
}

void take_room(struct product *p, void *room) {
  p->padded_groups = (p->K / GROUP + 7) / 8 * 8;
  if (p->bits == 16) {
    p->floats = room, p->pairs = room;
    return;
  }
  p->unit = room, p->sum = p->unit + p->M * p->padded_groups;
  p->fixed = (int16_t *)(p->sum + p->M * p->padded_groups);
}

/* Groups beyond the last are nothing. */
INLINE void prepare_fixed(const struct product *p, long begin, long end, const int halves) {
  const long stride = p->padded_groups, num_groups = p->K / GROUP;
  for (long at = begin; at < end; at++) {
    const long m = at / stride, g = at % stride, first = m * p->K + g * GROUP;
    if (g < num_groups) to_fixed_point(p->x, first, halves, p->fixed + first, p->unit + at, p->sum + at);
    else p->unit[at] = p->sum[at] = 0;
  }
}

__attribute__((target(ISA))) void prepare(const struct product *p) {
  if (is_laid_out(p)) lay_out(p);
  if (p->bits == 16 && p->level) return;
  const long num_units = p->bits == 16 ? p->M * p->K / 16 : p->M * p->padded_groups;
  const long begin = num_units * thread_number() / thread_count();
  const long end = num_units * (thread_number() + 1) / thread_count();
  if (p->bits != 16) {
    if (p->halves) prepare_fixed(p, begin, end, 1);
    else prepare_fixed(p, begin, end, 0);
    return;
  }
  for (long i = 16 * begin; i < 16 * end; i += 16) {
    const __m256i words = _mm256_loadu_si256((const __m256i *)((const uint16_t *)p->x + i));
    _mm256_storeu_ps(p->floats + i, even_halves(words));
    _mm256_storeu_ps(p->floats + i + 8, odd_halves(words));
  }
}

void multiply(const struct product *p) {
  if (p->bits == 16) (p->level == AMX ? share_tiles : p->level ? share_wide_half : share_half)(p);
  else if (p->bits == 8) (p->level ? share_wide_int8 : share_int8)(p);
  else (p->level ? share_wide_int4 : share_int4)(p);
}

static void multiply_share(void *p) { multiply(p); }

/* The best level of this processor. */
int best_level(void) {
  return !is_wide() ? AVX2 : has_tiles() ? AMX : AVX512;
}

/* Returns 0 when there was no memory. K is a multiple of 16 for weights of 16 bits, which want
 * halves, and of GROUP for fewer bits; scales are what the number of bits says above. */
int product(int level, int bits, int halves, const void *x, const void *w, const void *scales, const void *bias, void *y,
            long M, long N, long K) {
  struct product p = {.w = w, .scales = scales, .bias = bias, .y = y, .halves = halves, .x = x, .level = level,
                      .bits = bits, .M = M, .N = N, .K = K};
  const long num_bytes = room_of(&p);
  void *room = num_bytes ? aligned_alloc(64, (num_bytes + 63) / 64 * 64) : NULL;
  if (num_bytes && !room) return 0;
  take_room(&p, room);
  prepare(&p);
  run(multiply_share, &p, M * N * K);
  free(room);
  return 1;
}
#endif
