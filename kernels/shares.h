/* What the products of all instruction sets share; a file that includes it defines MOST_ROWS first, and `dots` after. */
#pragma once
#include "product.h"

#if HAS_KERNELS
#define BLOCK_ROWS 32 /* rows of w that stay in the L2 cache while all rows of x pass */
#define AHEAD 4096    /* bytes from here that are asked for from memory */

/* Whether this processor has what wide.c needs. */
int is_wide(void);

/* A thread's share of a product with AVX-512: for 16, 8 and 4 bits. */
void share_wide_half(const struct product *p);
void share_wide_int8(const struct product *p);
void share_wide_int4(const struct product *p);

INLINE void put(const struct product *p, long m, long n, float y) {
  if (p->halves) {
    if (p->bias) y += to_float(((const uint16_t *)p->bias)[n]);
    ((uint16_t *)p->y)[m * p->N + n] = to_half(y);
  } else {
    if (p->bias) y += ((const float *)p->bias)[n];
    ((float *)p->y)[m * p->N + n] = y;
  }
}

/* What the integer sums of eight groups of row n of w and row m of x are multiplied with; what the zeros of 4 bits add
 * is summed up in `rest`. */
INLINE __m256 factors_of(const struct product *p, long n, long m, long first, const int bits, __m256 *rest) {
  const long stride = p->padded_groups;
  const __m256 unit = _mm256_loadu_ps(p->unit + m * stride + first);
  if (bits == 8) return unit;
  const __m256i pairs = _mm256_loadu_si256((const __m256i *)((const uint16_t *)p->scales + (n * stride + first) * 2));
  *rest = _mm256_fmadd_ps(odd_halves(pairs), _mm256_loadu_ps(p->sum + m * stride + first), *rest);
  return _mm256_mul_ps(unit, even_halves(pairs));
}

INLINE void put_scaled(const struct product *p, long m, long n, const int bits, float y) {
  put(p, m, n, bits == 8 ? ((const float *)p->scales)[n] * y : y);
}

/* Rows [begin, end) of w times C rows of x from m on. */
INLINE void dots(const struct product *p, long begin, long end, long m, const int bits, const int C);

/* Some rows of w times all of x: the weights are unpacked once for several rows of x. */
INLINE void block(const struct product *p, long begin, long end, const int bits) {
  long m = 0;
  for (; MOST_ROWS >= 8 && m + 8 <= p->M; m += 8) dots(p, begin, end, m, bits, MOST_ROWS >= 8 ? 8 : 1);
  for (; m + 4 <= p->M; m += 4) dots(p, begin, end, m, bits, 4);
  for (; m + 2 <= p->M; m += 2) dots(p, begin, end, m, bits, 2);
  for (; m < p->M; m++) dots(p, begin, end, m, bits, 1);
}

INLINE void share(const struct product *p, const int bits) {
  const long num_threads = thread_count(), thread = thread_number();
  const long begin = p->N * thread / num_threads, end = p->N * (thread + 1) / num_threads;
  for (long n = begin; n < end; n += BLOCK_ROWS) block(p, n, n + BLOCK_ROWS < end ? n + BLOCK_ROWS : end, bits);
}
#endif
