/* What products.c offers to other files; it says what is computed. */
#pragma once
#include "lanes.h"

#if HAS_KERNELS
#define GROUP 64
#define TILE 16      /* rows of x that are laid side by side, and with AMX rows of w that meet them */
#define SIDE_BY_SIDE 4 /* with AVX-512, so many rows of x or more are laid side by side */

/* What products are computed with. swarm/model/kernels.py knows the same numbers. */
enum level { AVX2, AVX512, AMX };

struct product {
  const uint8_t *w;
  const void *scales; /* floats [N] for 8 bits, halves [N, padded_groups, 2] for 4 */
  const void *bias;           /* [N], or NULL */
  void *y;                    /* [M, N] */
  int halves;                 /* whether x, bias and y are bfloat16 rather than floats */
  const void *x; /* [M, K] */
  int level;     /* which instructions: AVX2, AVX-512 or AMX, see below */
  int bits;      /* 16, 8 or 4 */
  long M, N, K, padded_groups;
  /* What `prepare` makes of x: */
  float *floats;  /* [M, K] x, 16 bits only, without instructions for bfloat16 */
  uint32_t *pairs; /* x as `lay_out` lays it, 16 bits only, with AMX, or with AVX-512 and rows enough */
  int16_t *fixed; /* [M, K] x in fixed point, 8 and 4 bits only, as are these: */
  float *unit;    /* [M, padded_groups] what 1 stands for in a group of x */
  float *sum;     /* [M, padded_groups] sum of a group of x */
};

/* How many bytes of room `prepare` needs; 0: the product takes x as it is. */
long room_of(const struct product *p);

/* Say where that room is, at a multiple of 64 bytes. */
void take_room(struct product *p, void *room);

/* A thread's share of preparing x; all of it must be done before any thread begins with the product. */
void prepare(const struct product *p);

/* A thread's share of the product itself. */
void multiply(const struct product *p);

/* Whether this processor has what tiles.c needs; the same as above for AMX and 16 bits. */
int has_tiles(void);
void share_tiles(const struct product *p);
#endif
