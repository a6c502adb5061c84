/* Vectors of 8 floats and halves (bfloat16), and torch's threads, for x86-64 with AVX2. */
#pragma once
#include <stdint.h>
#include <stdlib.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_KERNELS 1
#include <immintrin.h>

#define SERIAL_PRODUCTS (1 << 17) /* below, waking the other threads takes longer than they save */

#ifndef ISA /* what the functions of a file may use */
#define ISA "avx2,fma"
#endif
#define INLINE static inline __attribute__((always_inline, target(ISA)))
#define UNROLL _Pragma("GCC unroll 8")

/* The threads of torch. They are found when this is loaded, as torch has loaded its OpenMP library for everybody;
 * with a library of our own, two pools of threads would wait for each other on the same cores. */
extern void GOMP_parallel(void (*work)(void *), void *data, unsigned num_threads, unsigned flags) __attribute__((weak));
extern int omp_get_thread_num(void) __attribute__((weak));
extern int omp_get_num_threads(void) __attribute__((weak));

static inline long thread_number(void) { return omp_get_thread_num ? omp_get_thread_num() : 0; }
static inline long thread_count(void) { return omp_get_num_threads ? omp_get_num_threads() : 1; }

/* Call `work` in every thread, or here alone if it is little. */
static inline void run(void (*work)(void *), void *data, long num_products) {
  if (GOMP_parallel && num_products >= SERIAL_PRODUCTS)
    GOMP_parallel(work, data, 0, 0);
  else
    work(data);
}

INLINE float sum_of_lanes(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

/* The nearest bfloat16, of two equally near ones the even one. */
INLINE uint16_t to_half(float value) {
  union { float value; uint32_t bits; } word = {value};
  if (value != value) return 0x7fc0;
  return (word.bits + 0x7fff + (word.bits >> 16 & 1)) >> 16;
}

INLINE float to_float(uint16_t half) {
  union { uint32_t bits; float value; } word = {(uint32_t)half << 16};
  return word.value;
}

INLINE __m256 load8(const void *x, long i, const int halves) {
  if (!halves) return _mm256_loadu_ps((const float *)x + i);
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)((const uint16_t *)x + i)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}

INLINE __m256 even_halves(__m256i words) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }

INLINE __m256 odd_halves(__m256i words) {
  return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32((int)0xffff0000)));
}

/* Floats rounded to bfloat16. */
INLINE __m256 rounded(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
  const __m256i up = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(_mm256_srli_epi32(bits, 16), one));
  return _mm256_blendv_ps(odd_halves(_mm256_add_epi32(bits, up)), v, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}

/* e to the power of x, for x <= 0: 2^n times a polynomial in what remains, as in Cephes' expf; relative error 2e-7. */
INLINE __m256 exponential(__m256 x) {
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 y = _mm256_set1_ps(1.9875691500e-4f);
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.3981999507e-3f));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(8.3334519073e-3f));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(4.1665795894e-2f));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.6666665459e-1f));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(5.0000001201e-1f));
  y = _mm256_fmadd_ps(y, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1)));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  y = _mm256_mul_ps(y, _mm256_castsi256_ps(power));
  return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(-87), _CMP_LT_OQ), y);
}

INLINE void store8(uint16_t *y, __m256 v) {
  const __m256i words = _mm256_srli_epi32(_mm256_castps_si256(rounded(v)), 16);
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0xd8);
  _mm_storeu_si128((__m128i *)y, _mm256_castsi256_si128(halves));
}
#endif
