/* What products.c computes, for x86-64 with AVX-512 and its instructions for bfloat16 and 16-bit integers. */
#define ISA "avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16"
#define MOST_ROWS 8
#include "shares.h"

#if HAS_KERNELS
#define PART 2048 /* columns after which another row of w has its turn, where eight rows of x exceed the L1 cache */

/* Columns [from, to) of R rows of w from n on times C rows of x from m on, in 16 bits. Several rows of w, for an
 * instruction adds to a sum only when the one before it has; of each, those are asked for from memory that come next.
 * Sums that go on are in `sums`, those that do not are left there. */
INLINE void dot_halves(const struct product *p, long n, long m, long from, long to, __m512 *sums, const int R,
                       const int C) {
  const long K = p->K, whole = K / 32 * 32;
  const uint16_t *w = (const uint16_t *)p->w + n * K, *x = (const uint16_t *)p->x + m * K;
  __m512 total[2][8];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int c = 0; c < C; c++) total[r][c] = from ? sums[r * C + c] : _mm512_setzero_ps();
  for (long k = from; k < to; k += 32) {
    const __mmask32 mask = k < whole ? 0xffffffff : 0xffff;
    __m512bh x_k[8];
    UNROLL for (int c = 0; c < C; c++) x_k[c] = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + c * K + k);
    UNROLL for (int r = 0; r < R; r++) {
      const __m512bh w_k = (__m512bh)_mm512_maskz_loadu_epi16(mask, w + r * K + k);
      _mm_prefetch((const char *)(w + r * K + k) + (R > 1 ? R * K * 2 : AHEAD), _MM_HINT_T0);
      UNROLL for (int c = 0; c < C; c++) total[r][c] = _mm512_dpbf16_ps(total[r][c], w_k, x_k[c]);
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++)
    if (to < K) sums[r * C + c] = total[r][c];
    else put(p, m + c, n + r, _mm512_reduce_add_ps(total[r][c]));
}

/* Rows [begin, end) of w times C rows of x from m on, in 16 bits. */
INLINE void dots_halves(const struct product *p, long begin, long end, long m, const int C) {
  const int R = C > 4 ? 2 : 1;
  const long K = p->K, part = C > 4 ? PART : K;
  __m512 sums[BLOCK_ROWS * 8];
  for (long from = 0; from < K; from += part) {
    const long to = from + part < K ? from + part : K;
    long n = begin;
    for (; n + R <= end; n += R) dot_halves(p, n, m, from, to, sums + (n - begin) * C, R, C);
    for (; n < end; n++) dot_halves(p, n, m, from, to, sums + (n - begin) * C, 1, C);
  }
}

/* The columns 32 i to 32 i + 31 of a group of w, as 16-bit integers. */
INLINE __m512i unpack(const int bits, const uint8_t *group, const int i) {
  if (bits == 8) return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(group + 32 * i)));
  const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)group));
  const __m512i shifts = _mm512_inserti64x4(_mm512_set1_epi16(8 * i), _mm256_set1_epi16(8 * i + 4), 1);
  return _mm512_and_si512(_mm512_srlv_epi16(twice, shifts), _mm512_set1_epi16(15));
}

/* Row n of w times C rows of x from m on. */
INLINE void dot(const struct product *p, long n, long m, const int bits, const int C) {
  const long K = p->K, num_groups = K / GROUP, group_bytes = GROUP * bits / 8;
  const uint8_t *group = p->w + n * num_groups * group_bytes;
  __m512 total[8];
  __m256 rest[8];
  UNROLL for (int c = 0; c < C; c++) total[c] = _mm512_setzero_ps(), rest[c] = _mm256_setzero_ps();
  for (long first = 0; first < num_groups; first += 8) {
    float factors[8][8];
    UNROLL for (int c = 0; c < C; c++)
      _mm256_storeu_ps(factors[c], factors_of(p, n, m + c, first, bits, &rest[c]));
    const long end = first + 8 < num_groups ? first + 8 : num_groups;
    for (long g = first; g < end; g++, group += group_bytes) {
      const __m512i low = unpack(bits, group, 0), high = unpack(bits, group, 1);
      _mm_prefetch((const char *)group + AHEAD, _MM_HINT_T0);
      UNROLL for (int c = 0; c < C; c++) {
        const int16_t *x = p->fixed + (m + c) * K + g * GROUP;
        __m512i sums = _mm512_dpwssd_epi32(_mm512_setzero_si512(), low, _mm512_loadu_si512(x));
        sums = _mm512_dpwssd_epi32(sums, high, _mm512_loadu_si512(x + 32));
        total[c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(factors[c][g - first]), total[c]);
      }
    }
  }
  UNROLL for (int c = 0; c < C; c++)
    put_scaled(p, m + c, n, bits, _mm512_reduce_add_ps(total[c]) + sum_of_lanes(rest[c]));
}

INLINE void dots(const struct product *p, long begin, long end, long m, const int bits, const int C) {
  if (bits == 16) dots_halves(p, begin, end, m, C);
  else for (long n = begin; n < end; n++) dot(p, n, m, bits, C);
}

__attribute__((target(ISA))) void share_wide_half(const struct product *p) { share(p, 16); }
__attribute__((target(ISA))) void share_wide_int8(const struct product *p) { share(p, 8); }
__attribute__((target(ISA))) void share_wide_int4(const struct product *p) { share(p, 4); }

int is_wide(void) {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

#else
int is_wide(void) { return 0; }
#endif
