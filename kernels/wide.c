/* What products.c computes, for x86-64 with AVX-512 and its instructions for bfloat16 and 16-bit integers. */
#define ISA "avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16"
#define MOST_ROWS 8
#include "shares.h"

#if HAS_KERNELS
#define ROWS 6 /* of w at a time: as many sums as an instruction takes turns, and no more lines than an L1 set holds */

/* Turn 16 rows of 16 numbers of 32 bits into columns: v[i] holds number i of each row, after which it held row i. */
INLINE void transpose(__m512i v[TILE]) {
  __m512i u[TILE];
  UNROLL for (int i = 0; i < TILE; i += 2) {
    u[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    u[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  UNROLL for (int i = 0; i < TILE; i += 4) UNROLL for (int j = 0; j < 2; j++) {
    v[i + 2 * j] = _mm512_unpacklo_epi64(u[i + j], u[i + j + 2]);
    v[i + 2 * j + 1] = _mm512_unpackhi_epi64(u[i + j], u[i + j + 2]);
  }
  /* Now v[4 g + c] has numbers c, c + 4, c + 8 and c + 12 of rows 4 g to 4 g + 3, one after the other. */
  UNROLL for (int c = 0; c < 4; c++) {
    const __m512i low = _mm512_shuffle_i32x4(v[c], v[c + 4], 0x44), high = _mm512_shuffle_i32x4(v[c], v[c + 4], 0xee);
    const __m512i low2 = _mm512_shuffle_i32x4(v[c + 8], v[c + 12], 0x44);
    const __m512i high2 = _mm512_shuffle_i32x4(v[c + 8], v[c + 12], 0xee);
    u[c] = _mm512_shuffle_i32x4(low, low2, 0x88), u[c + 4] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    u[c + 8] = _mm512_shuffle_i32x4(high, high2, 0x88), u[c + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
  UNROLL for (int i = 0; i < TILE; i++) v[i] = u[i];
}

/* 16 rows of w from n on, of which R are there, times C rows of x: as below, with a sum for each row of w in a lane. */
INLINE void dots_of_rows(const struct product *p, long n, const int R, const int C) {
  const long half = p->K / 2;
  const uint32_t *w = (const uint32_t *)p->w + n * half, *x = p->x;
  __m512 sums[SIDE_BY_SIDE - 1][2];
  UNROLL for (int c = 0; c < C; c++) sums[c][0] = sums[c][1] = _mm512_setzero_ps();
  for (long k = 0; k < half; k += TILE) {
    const __mmask16 mask = k + TILE <= half ? 0xffff : 0xff;
    __m512i v[TILE];
    for (int r = 0; r < R; r++) {
      _mm_prefetch((const char *)(w + R * half + R * k + r * TILE), _MM_HINT_T1);
      v[r] = _mm512_maskz_loadu_epi32(mask, w + r * half + k);
    }
    for (int r = R; r < TILE; r++) v[r] = _mm512_setzero_si512();
    transpose(v);
    UNROLL for (int i = 0; i < TILE; i++) {
      if (k + i >= half) break;
      UNROLL for (int c = 0; c < C; c++) {
        const __m512bh x_k = (__m512bh)_mm512_set1_epi32((int)x[c * half + k + i]);
        sums[c][i % 2] = _mm512_dpbf16_ps(sums[c][i % 2], x_k, (__m512bh)v[i]);
      }
    }
  }
  UNROLL for (int c = 0; c < C; c++) {
    float y[TILE];
    _mm512_storeu_ps(y, _mm512_add_ps(sums[c][0], sums[c][1]));
    for (int r = 0; r < R; r++) put(p, c, n + r, y[r]);
  }
}

INLINE void share_few(const struct product *p, const int C) {
  const long begin = p->N * thread_number() / thread_count(), end = p->N * (thread_number() + 1) / thread_count();
  long n = begin;
  for (; n + TILE <= end; n += TILE) dots_of_rows(p, n, TILE, C);
  if (n < end) dots_of_rows(p, n, (int)(end - n), C);
}

/* Columns [2 from, 2 to) of R rows of w times T tiles of x, a pair of columns after the other: a pair of w meets that of
 * every row of x in one instruction. Of two pairs each has sums of its own, for an instruction adds only when the one
 * before it has. */
INLINE void add_pairs(const uint32_t *w, const uint32_t *x, long half, long from, long to, __m512 sums[ROWS][2][2],
                      const int R, const int T) {
  for (long k = from; k < to; k += 2)
    UNROLL for (int i = 0; i < 2; i++) {
      __m512bh x_k[2];
      UNROLL for (int t = 0; t < T; t++) x_k[t] = (__m512bh)_mm512_loadu_si512(x + (t * half + k + i) * TILE);
      UNROLL for (int r = 0; r < R; r++) {
        const __m512bh w_k = (__m512bh)_mm512_set1_epi32((int)w[r * half + k + i]);
        UNROLL for (int t = 0; t < T; t++) sums[r][t][i] = _mm512_dpbf16_ps(sums[r][t][i], x_k[t], w_k);
      }
    }
}

/* R rows of w from n on times T tiles of x from row m on. As many that come next are asked for from memory, in the order
 * in which they lie there. */
INLINE void dots_of_tiles(const struct product *p, long n, long m, const int R, const int T) {
  const long half = p->K / 2;
  const uint32_t *w = (const uint32_t *)p->w + n * half, *x = p->pairs + m * half;
  __m512 sums[ROWS][2][2];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int t = 0; t < T; t++) sums[r][t][0] = sums[r][t][1] = _mm512_setzero_ps();
  for (long k = 0; k < half; k += TILE) {
    if (m == 0) UNROLL for (int r = 0; r < R; r++)
      _mm_prefetch((const char *)(w + R * half + R * k + r * TILE), _MM_HINT_T1);
    add_pairs(w, x, half, k, k + TILE < half ? k + TILE : half, sums, R, T);
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < T; t++) {
    float y[TILE];
    _mm512_storeu_ps(y, _mm512_add_ps(sums[r][t][0], sums[r][t][1]));
    for (long c = 0; c < TILE && m + t * TILE + c < p->M; c++) put(p, m + t * TILE + c, n + r, y[c]);
  }
}

/* Some rows of w times all of x, laid side by side. */
INLINE void all_tiles(const struct product *p, long n, const int R) {
  long m = 0;
  for (; m + TILE < p->M; m += 2 * TILE) dots_of_tiles(p, n, m, R, 2);
  if (m < p->M) dots_of_tiles(p, n, m, R, 1);
}

INLINE void share_laid_out(const struct product *p) {
  const long begin = p->N * thread_number() / thread_count(), end = p->N * (thread_number() + 1) / thread_count();
  long n = begin;
  for (; n + ROWS <= end; n += ROWS) all_tiles(p, n, ROWS);
  for (; n < end; n++) all_tiles(p, n, 1);
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
