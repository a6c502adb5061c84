/* T tokens through whole blocks: norm, attention with rotary positions, norm, gated MLP with SiLU,
 * as Llama has them. Each sees what its runs name, which may be what others of them have just written. All in bfloat16;
 * every step is computed, and rounded, as it is when the library's modules run it.
 *
 * The threads meet after each step, instead of being called for each: a step of a small model takes less time than
 * waking a thread.
 */
#include <math.h>
#include <string.h>

#include "blocks.h"
#include "product.h"
#include "rows.h"

#if HAS_KERNELS
extern void GOMP_barrier(void) __attribute__((weak));

static void meet(void) {
  if (GOMP_barrier) GOMP_barrier();
}

/* The share [begin, end) of this thread in a number of units. */
struct range { long begin, end; };
static struct range share_of(long num_units) {
  return (struct range){num_units * thread_number() / thread_count(), num_units * (thread_number() + 1) / thread_count()};
}

struct room {
  uint16_t *normed;         /* [T, D] */
  uint16_t *q, *k, *v;      /* [T, N G H], [T, N H], [T, N H] */
  uint16_t *attended;       /* [T, N G H] */
  uint16_t *gate, *up;      /* [T, F] */
  uint16_t *out;            /* [T, D] of attention or MLP, not yet added */
  void *prepared;
};

struct call {
  const struct pass *pass;
  struct room room;
  struct attention attention; /* but for the keys and values, which are those of a block */
};

static struct product product_of(const struct call *c, const struct linear *l, const uint16_t *x, uint16_t *y) {
  struct product p = {.w = l->w, .scales = l->scales, .bias = l->bias, .y = y, .halves = 1, .x = x,
                      .level = c->pass->level, .bits = l->bits, .M = c->pass->T, .N = l->N, .K = l->K};
  take_room(&p, c->room.prepared);
  return p;
}

/* Some layers of the same number of bits on the same rows. */
static void multiply_all(const struct call *c, const struct linear *const *layers, const uint16_t *x, uint16_t *const *y,
                         int count) {
  const struct product first = product_of(c, layers[0], x, y[0]);
  if (room_of(&first)) {
    prepare(&first);
    meet();
  }
  for (int i = 0; i < count; i++) {
    const struct product p = product_of(c, layers[i], x, y[i]);
    multiply(&p);
  }
  meet();
}

/* x += out, where there is one; then normed = norm of x. */
__attribute__((target(ISA))) static void add_and_norm(const struct call *c, const uint16_t *out,
                                                      const struct norm *norm) {
  const long D = c->pass->D;
  const struct range rows = share_of(c->pass->T);
  for (long t = rows.begin; t < rows.end; t++) {
    uint16_t *x = c->pass->x + t * D;
    if (out)
      for (long i = 0; i < D; i += 8)
        store8(x + i, _mm256_add_ps(load8(x, i, 1), load8(out + t * D, i, 1)));
    if (norm) rms_norm(x, norm->weight, c->room.normed + t * D, 1, D, norm->epsilon);
  }
  meet();
}

/* Half i of a head, of two that turn together: what is at `own` times cos, and `sign` times what is at `other` times sin. */
INLINE __m256 turned(const uint16_t *head, const uint16_t *cos, const uint16_t *sin, long own, long other, float sign) {
  const __m256 opposite = _mm256_mul_ps(_mm256_set1_ps(sign), load8(head, other, 1));
  return _mm256_add_ps(rounded(_mm256_mul_ps(load8(head, own, 1), load8(cos, own, 1))),
                       rounded(_mm256_mul_ps(opposite, load8(sin, own, 1))));
}

/* Norm a head, where there is one, and turn it by its position. */
__attribute__((target(ISA))) static void place(const struct pass *p, long t, uint16_t *head, const struct norm *norm) {
  const uint16_t *cos = p->cos + t * p->H, *sin = p->sin + t * p->H;
  if (norm->weight) rms_norm(head, norm->weight, head, 1, p->H, norm->epsilon);
  for (long low = 0, high = p->H / 2; low < p->H / 2; low += 8, high += 8) {
    const __m256 new_low = turned(head, cos, sin, low, high, -1), new_high = turned(head, cos, sin, high, low, 1);
    store8(head + low, new_low);
    store8(head + high, new_high);
  }
}

static void place_heads(const struct call *c, const struct block *b) {
  const struct pass *p = c->pass;
  const long N = p->N, G = p->G, H = p->H, num_heads = N * G + N;
  const struct range units = share_of(p->T * num_heads);
  for (long unit = units.begin; unit < units.end; unit++) {
    const long t = unit / num_heads, n = unit % num_heads - N * G;
    if (n < 0) {
      place(p, t, c->room.q + (t * N * G + n + N * G) * H, &b->q_norm);
      continue;
    }
    uint16_t *key = c->room.k + (t * N + n) * H;
    place(p, t, key, &b->k_norm);
    const long at = n * p->head + p->slots[t] * p->slot;
    memcpy(b->keys + at, key, H * sizeof *key);
    memcpy(b->values + at, c->room.v + (t * N + n) * H, H * sizeof *key);
  }
  meet();
}

/* gate = silu(gate) * up */
__attribute__((target(ISA))) static void gate_up(const struct call *c, long num_features) {
  const struct range units = share_of(c->pass->T * num_features / 8);
  for (long i = 8 * units.begin; i < 8 * units.end; i += 8) {
    const __m256 x = load8(c->room.gate, i, 1), one = _mm256_set1_ps(1), sign = _mm256_set1_ps(-0.0f);
    const __m256 power = exponential(_mm256_or_ps(x, sign)); /* of -|x| */
    const __m256 factor = _mm256_blendv_ps(one, power, x);   /* for x < 0 */
    const __m256 silu = _mm256_div_ps(_mm256_mul_ps(x, factor), _mm256_add_ps(one, power));
    store8(c->room.gate + i, _mm256_mul_ps(rounded(silu), load8(c->room.up, i, 1)));
  }
  meet();
}

static void run_block(struct call *c, const struct block *b) {
  const struct room *r = &c->room;
  multiply_all(c, (const struct linear *[]){&b->q, &b->k, &b->v}, r->normed, (uint16_t *[]){r->q, r->k, r->v}, 3);
  place_heads(c, b);
  struct attention attention = c->attention;
  attention.keys = b->keys, attention.values = b->values;
  share_attention(&attention);
  if (attention.failed) c->attention.failed = 1;
  meet();
  multiply_all(c, (const struct linear *[]){&b->o}, r->attended, (uint16_t *[]){r->out}, 1);
  add_and_norm(c, r->out, &b->mlp_norm);
  multiply_all(c, (const struct linear *[]){&b->gate, &b->up}, r->normed, (uint16_t *[]){r->gate, r->up}, 2);
  gate_up(c, b->gate.N);
  multiply_all(c, (const struct linear *[]){&b->down}, r->gate, (uint16_t *[]){r->out}, 1);
}

static void share_blocks(void *data) {
  struct call *c = data;
  const struct block *b = c->pass->blocks, *end = b + c->pass->num_blocks;
  add_and_norm(c, NULL, &b->norm);
  for (; b < end; b++) {
    run_block(c, b);
    add_and_norm(c, c->room.out, b + 1 < end ? &b[1].norm : NULL);
  }
}

static long padded(long num_bytes) { return (num_bytes + 63) / 64 * 64; }

static void *take(char **free_room, long num_bytes) {
  void *part = *free_room;
  *free_room += padded(num_bytes);
  return part;
}

/* Returns 0 when there was no memory. All numbers of features are multiples of 16 (64 where weights have fewer than 16
 * bits); keys and values have the same strides in all blocks. */
int decode(const struct pass *p) {
  const struct block *b = p->blocks;
  const long T = p->T, H = p->H, heads = p->N * H, F = b->gate.N, size = sizeof(uint16_t);
  long prepared = 0;
  const struct linear *const layers[] = {&b->q, &b->o, &b->gate, &b->down};
  for (int i = 0; i < 4; i++) {
    const struct product product = {.level = p->level, .bits = layers[i]->bits, .M = T, .K = layers[i]->K};
    prepared = room_of(&product) > prepared ? room_of(&product) : prepared;
  }
  char *const whole = malloc(64 + prepared + (2 * T * p->D + 2 * T * heads + 2 * T * heads * p->G + 2 * T * F) * size + 9 * 64);
  if (!whole) return 0;
  char *rest = whole + (-(uintptr_t)whole & 63);
  struct call call = {.pass = p};
  struct room *r = &call.room;
  r->normed = take(&rest, T * p->D * size), r->out = take(&rest, T * p->D * size);
  r->q = take(&rest, T * heads * p->G * size), r->attended = take(&rest, T * heads * p->G * size);
  r->k = take(&rest, T * heads * size), r->v = take(&rest, T * heads * size);
  r->gate = take(&rest, T * F * size), r->up = take(&rest, T * F * size);
  r->prepared = rest;
  call.attention = (struct attention){
      .q = r->q, .y = r->attended, .runs = p->runs, .ends = p->ends, .T = T, .N = p->N, .G = p->G, .H = H, .V = H,
      .key_head = p->head, .key_slot = p->slot, .value_head = p->head, .value_slot = p->slot, .scaling = p->scaling};
  run(share_blocks, &call, T * p->D * p->num_blocks * (heads + F));
  free(whole);
  return !call.attention.failed;
}
#endif
