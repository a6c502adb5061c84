/* What products.c computes in 16 bits, for x86-64 with AMX: tiles of 16 rows of w and up to 16 rows of x at a time.
 *
 * A tile of w is 16 rows of 32 columns as they lie in memory. For x to meet it, `lay_out` has laid up to 16 rows of x
 * side by side. Each sum is made in the same order whatever M is. Numbers that are too small to be normal ones count as 0.
 */
#define ISA "avx2,fma,avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16"
#include "product.h"

#if HAS_KERNELS && defined(__linux__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>)
#define HAS_TILES 1
#endif
#endif

#if HAS_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define COLUMNS 32 /* of w in a tile */
#define AHEAD 8    /* tiles from here whose rows are asked for from memory */
#define REQUEST_PERMISSION 0x1023 /* of arch_prctl: may threads of this process use what the system saves for ... */
#define TILE_DATA 18              /* ... tiles? */

int has_tiles(void) {
  unsigned a, b, c, d, enabled, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return 0;
  __asm__("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
  return (enabled >> 17 & 3) == 3 && !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
}

/* What LDTILECFG takes. Tiles 0 and 1 hold sums, 2 and 3 rows of w, 4 rows of x; 5, 6 and 7 are as 2, 3 and 4 where no
 * more than 16 columns are left. */
struct layout {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

__attribute__((target(ISA))) static void use_tiles(long rows, long C) {
  struct layout layout __attribute__((aligned(64))) = {.palette = 1};
  for (int i = 0; i < 8; i++) {
    const int is_x = i == 4 || i == 7, columns = i > 4 ? COLUMNS / 2 : COLUMNS;
    layout.rows[i] = is_x ? columns / 2 : rows;
    layout.row_bytes[i] = i < 2 || is_x ? 4 * C : 2 * columns;
  }
  _tile_loadconfig(&layout);
}

/* The sums of some rows of w, from n on, and C rows of x, from m on, rounded once. */
INLINE void put_tile(const struct product *p, const float *sums, long rows, long n, long m, long C) {
  const __mmask16 mask = (1u << rows) - 1;
  const __m512i apart = _mm512_set_epi32(240, 224, 208, 192, 176, 160, 144, 128, 112, 96, 80, 64, 48, 32, 16, 0);
  __m512 bias = _mm512_setzero_ps();
  if (p->bias) {
    const __m256i words = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)p->bias + n);
    bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
  for (long c = 0; c < C; c++) {
    const __m512 sum = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, apart, sums + c, 4);
    const __m256i y = (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(sum, bias));
    _mm256_mask_storeu_epi16((uint16_t *)p->y + (m + c) * p->N + n, mask, y);
  }
}

/* W tiles of w, of some rows each, from row n on, times C rows of x from m on. */
INLINE void multiply_tiles(const struct product *p, long n, long rows, long m, long C, const int W) {
  const long K = p->K, whole = K / COLUMNS * COLUMNS;
  const uint16_t *w = (const uint16_t *)p->w + n * K;
  const uint32_t *x = p->pairs + m * K / 2;
  float sums[TILE * TILE] __attribute__((aligned(64)));
  _tile_zero(0);
  if (W > 1) _tile_zero(1);
  for (long k = 0; k < whole; k += COLUMNS) {
    for (long r = 0; m == 0 && r < (W > 1 ? 2 * TILE : rows); r++)
      _mm_prefetch((const char *)(w + r * K + k + AHEAD * COLUMNS), _MM_HINT_T0);
    _tile_loadd(4, x + k / 2 * C, 4 * C);
    _tile_loadd(2, w + k, 2 * K);
    _tile_dpbf16ps(0, 2, 4);
    if (W == 1) continue;
    _tile_loadd(3, w + TILE * K + k, 2 * K);
    _tile_dpbf16ps(1, 3, 4);
  }
  if (whole < K) {
    _tile_loadd(7, x + whole / 2 * C, 4 * C);
    _tile_loadd(5, w + whole, 2 * K);
    _tile_dpbf16ps(0, 5, 7);
    if (W > 1) {
      _tile_loadd(6, w + TILE * K + whole, 2 * K);
      _tile_dpbf16ps(1, 6, 7);
    }
  }
  _tile_stored(0, sums, 4 * TILE);
  put_tile(p, sums, rows, n, m, C);
  if (W == 1) return;
  _tile_stored(1, sums, 4 * TILE);
  put_tile(p, sums, rows, n + TILE, m, C);
}

/* A thread's share: whole tiles of w, two at a time while they last, each for all rows of x. */
__attribute__((target(ISA))) void share_tiles(const struct product *p) {
  const long tiles = (p->N + TILE - 1) / TILE;
  const long begin = tiles * thread_number() / thread_count() * TILE;
  const long last = tiles * (thread_number() + 1) / thread_count() * TILE, end = last < p->N ? last : p->N;
  for (long n = begin, rows; n < end; n += rows) {
    rows = n + 2 * TILE <= end ? 2 * TILE : n + TILE <= end ? TILE : end - n;
    for (long m = 0, C; m < p->M; m += C) {
      C = p->M - m < TILE ? p->M - m : TILE;
      use_tiles(rows < TILE ? rows : TILE, C);
      if (rows > TILE) multiply_tiles(p, n, TILE, m, C, 2);
      else multiply_tiles(p, n, rows, m, C, 1);
    }
  }
  _tile_release();
}
#elif HAS_KERNELS
int has_tiles(void) { return 0; }
void share_tiles(const struct product *p) { (void)p; }
#endif
