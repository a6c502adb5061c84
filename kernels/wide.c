/* What products.c computes, for x86-64 with AVX-512 and its instructions for bfloat16 and 16-bit integers. */
#define ISA "avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16"
#define MOST_ROWS 8
#include "shares.h"

#if HAS_KERNELS
/* In 16 bits, the sum of a row of w and a row of x is made of CHAINS sums, each of every CHAINS-th pair of columns, in
 * their order: the same whatever else is computed with them. An instruction adds a pair to each of 16 sums. */
#define CHAINS 4
#define ROWS 6 /* of w at a time: with their sums they fit into registers, with their lines into a set of the L1 cache */

/* Up to four rows of w in turn, the pairs of columns k to k + 15 of each: out[i] gets pairs 4 i to 4 i + 3 of all four. */
INLINE void turn(const uint32_t *const rows[4], long k, __mmask16 mask, __m512i out[4]) {
  __m512i v[4], u[4];
  UNROLL for (int r = 0; r < 4; r++) v[r] = _mm512_maskz_loadu_epi32(mask, rows[r] + k);
  UNROLL for (int i = 0; i < 2; i++) {
    u[2 * i] = _mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0x44);
    u[2 * i + 1] = _mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0xee);
  }
  UNROLL for (int i = 0; i < 2; i++) {
    out[2 * i] = _mm512_shuffle_i32x4(u[i], u[i + 2], 0x88);
    out[2 * i + 1] = _mm512_shuffle_i32x4(u[i], u[i + 2], 0xdd);
  }
}

/* R <= 8 rows of w from n on times C rows of x: lanes hold the chains of four rows of w. */
INLINE void dots_of_rows(const struct product *p, long n, const int R, const int C) {
  const long half = p->K / 2;
  const uint32_t *w = (const uint32_t *)p->w + n * half, *x = p->x, *rows[2][4];
  UNROLL for (int r = 0; r < 8; r++) rows[r / 4][r % 4] = w + (r < R ? r : R - 1) * half;
  __m512 sums[2][SIDE_BY_SIDE - 1];
  UNROLL for (int c = 0; c < C; c++) sums[0][c] = sums[1][c] = _mm512_setzero_ps();
  for (long k = 0; k < half; k += TILE) {
    const __mmask16 mask = k + TILE <= half ? 0xffff : 0xff;
    UNROLL for (int r = 0; r < 8; r++) _mm_prefetch((const char *)(w + 8 * half + 8 * k + r * TILE), _MM_HINT_T1);
    __m512i w_k[2][4];
    UNROLL for (int g = 0; g < 2; g++) turn(rows[g], k, mask, w_k[g]);
    UNROLL for (int i = 0; i < 4; i++) {
      if (k + CHAINS * i >= half) break;
      UNROLL for (int c = 0; c < C; c++) {
        const __m128i pairs = _mm_loadu_si128((const __m128i *)(x + c * half + k + CHAINS * i));
        const __m512bh x_k = (__m512bh)_mm512_broadcast_i32x4(pairs);
        UNROLL for (int g = 0; g < 2; g++) sums[g][c] = _mm512_dpbf16_ps(sums[g][c], x_k, (__m512bh)w_k[g][i]);
      }
    }
  }
  float y[16 * 2];
  UNROLL for (int c = 0; c < C; c++) {
    UNROLL for (int g = 0; g < 2; g++) _mm512_storeu_ps(y + 16 * g, sums[g][c]);
    for (int r = 0; r < R; r++) put(p, c, n + r, (y[4 * r] + y[4 * r + 1]) + (y[4 * r + 2] + y[4 * r + 3]));
  }
}

INLINE void share_few(const struct product *p, const int C) {
  const long begin = p->N * thread_number() / thread_count(), end = p->N * (thread_number() + 1) / thread_count();
  long n = begin;
  for (; n + 8 <= end; n += 8) dots_of_rows(p, n, 8, C);
  if (n < end) dots_of_rows(p, n, (int)(end - n), C);
}

/* R rows of w from n on times a tile of x, laid side by side, from row m on: lanes hold the rows of the tile. As many rows
 * of w that come next are asked for from memory, in the order in which they lie there. */
INLINE void dots_of_tile(const struct product *p, long n, long m, const int R) {
  const long half = p->K / 2;
  const uint32_t *w = (const uint32_t *)p->w + n * half, *x = p->pairs + m * half;
  __m512 sums[ROWS][CHAINS];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int i = 0; i < CHAINS; i++) sums[r][i] = _mm512_setzero_ps();
  for (long from = 0; from < half; from += TILE) {
    const long to = from + TILE < half ? from + TILE : half;
    if (m == 0) UNROLL for (int r = 0; r < R; r++)
      _mm_prefetch((const char *)(w + R * half + R * from + r * TILE), _MM_HINT_T1);
    for (long k = from; k < to; k += CHAINS)
      UNROLL for (int i = 0; i < CHAINS; i++) {
        const __m512bh x_k = (__m512bh)_mm512_load_si512(x + (k + i) * TILE);
        UNROLL for (int r = 0; r < R; r++)
          sums[r][i] = _mm512_dpbf16_ps(sums[r][i], x_k, (__m512bh)_mm512_set1_epi32((int)w[r * half + k + i]));
      }
  }
  UNROLL for (int r = 0; r < R; r++) {
    const __m512 *s = sums[r];
    float y[TILE];
    _mm512_storeu_ps(y, _mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])));
    for (long c = 0; c < TILE && m + c < p->M; c++) put(p, m + c, n + r, y[c]);
  }
}

INLINE void share_laid_out(const struct product *p) {
  const long begin = p->N * thread_number() / thread_count(), end = p->N * (thread_number() + 1) / thread_count();
  long n = begin;
  for (; n + ROWS <= end; n += ROWS)
    for (long m = 0; m < p->M; m += TILE) dots_of_tile(p, n, m, ROWS);
  for (; n < end; n++)
    for (long m = 0; m < p->M; m += TILE) dots_of_tile(p, n, m, 1);
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
  for (long n = begin; n < end; n++) dot(p, n, m, bits, C);
}

__attribute__((target(ISA))) void share_wide_half(const struct product *p) {
  switch (p->M) {
    case 1: return share_few(p, 1);
    case 2: return share_few(p, 2);
    case 3: return share_few(p, 3);
    default: share_laid_out(p);
  }
}
__attribute__((target(ISA))) void share_wide_int8(const struct product *p) { share(p, 8); }
__attribute__((target(ISA))) void share_wide_int4(const struct product *p) { share(p, 4); }

int is_wide(void) {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

#else
int is_wide(void) { return 0; }
#endif
