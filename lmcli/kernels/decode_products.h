/* Products of float32 activations with matrices in float32, bfloat16, 8 or 4 bit, for decode_step.c.

   Weights are interleaved (`interleave`): each 64 bytes hold, for 16 outputs (a block), the weights of the same input, or
   of 2 inputs (bfloat16), 4 (8 bit) or 8 (4 bit). So each lane of a vector adds up one output, and weights are read from
   memory in one sequence.

   A row's numbers do not depend on the other rows, to the bit: every output adds the same terms in the same order, one
   input after the other. kernels.c may be compiled with -fassociative-math, this file may not. */

#ifdef __clang__
#pragma clang fp reassociate(off)
#elif defined(__GNUC__)
#pragma GCC optimize("no-associative-math")
#endif

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "numbers.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef __ARM_FEATURE_DOTPROD
#include <arm_neon.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#define PARALLEL _Pragma("omp parallel num_threads(threads)")
#define BARRIER _Pragma("omp barrier")
#define THREAD omp_get_thread_num()
#define THREADS omp_get_num_threads()
#else
#define PARALLEL
#define BARRIER
#define THREAD 0
#define THREADS 1
#endif

#define INLINE static inline __attribute__((always_inline))
#define ONCE static __attribute__((noinline, noclone))  /* its code is long */
#define UNROLL _Pragma("GCC unroll 16")
#define FETCH(address) __builtin_prefetch(address, 0, 2)
#define LANES 16  /* numbers of a vector; outputs of a block */
#define STEP 32  /* columns of a product are shared out in multiples of this */
#define GROUP 32  /* integer weights of an output, or activations, that share a scale */
#define ALIGN 64  /* rows of activations are padded with zeros to a multiple of this */
#ifdef __AVX512F__
#define TILE_BLOCKS 2  /* a tile of a product: blocks of outputs */
#define TILE_ROWS 8  /* and rows; their sums stay in registers */
#else
#define TILE_BLOCKS 1
#define TILE_ROWS 4
#endif

typedef float floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef float eight __attribute__((vector_size(32)));
typedef float four __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t integers __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2), may_alias));

enum { FLOAT32, BFLOAT16, INT8, INT4, BFLOAT16_AS_AMX };  /* the last: see add_32 */

#ifdef __AVX512VNNI__
#define UNSIGNED_8 ((int32_t)0x80808080)  /* from -128…127 to 0…255 */
#define OFFSET_8 128
#else
#define UNSIGNED_8 0
#define OFFSET_8 0
#endif

typedef struct {
    const void *weight;  /* interleaved; NULL: no such matrix */
    const uint16_t *scales;  /* of integers: (blocks, groups, 16) bfloat16 */
    const float *bias;  /* (outputs) or NULL */
    int64_t type, outputs, inputs;
} Matrix;

typedef struct {
    float *data;  /* (rows, stride) */
    void *packed;  /* the same as the products read it: the same array, bfloat16, or int8 */
    float *scales;  /* of int8: (rows, stride / GROUP) */
    int32_t *offsets;  /* (rows, stride / GROUP): what to add to a sum of products with it */
    int64_t stride;
} Rows;

/* ----------------------------------------------------------------------------------------------------- vectors */

INLINE floats load(const float *x) { return *(const floats *)x; }

INLINE floats load_bfloat16s(const uint16_t *x) {
#ifdef __AVX512F__  /* gcc converts halves of the vector, which takes three times as long */
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16);
#else
    return (floats)(__builtin_convertvector(*(const halves *)x, words) << 16);
#endif
}

INLINE float total(floats x) {  /* halves onto each other, always in this order; by vectors: compiles 4 times faster */
    eight a[2];
    memcpy(a, &x, sizeof a);
    a[0] += a[1];
    four b[2];
    memcpy(b, a, sizeof b);
    b[0] += b[1];
    return (b[0][0] + b[0][2]) + (b[0][1] + b[0][3]);
}

/* ---------------------------------------------------------------------------------------------- matrix products */

/* Vectors of 64 bytes of a block. In bfloat16 the inputs are padded with zeros to a multiple of 32. */
INLINE int64_t block_vectors(int64_t type, int64_t inputs) {
    return type == FLOAT32 ? inputs : type == INT8 ? inputs / 4 : type == INT4 ? inputs / 8 : (inputs + 31) / 32 * 16;
}

ONCE void store_some(float *y, floats x, const float *bias, int64_t count, int add) {
    for (int64_t i = 0; i < count; i++) y[i] = (add ? y[i] : 0) + (x[i] + (bias ? bias[i] : 0));
}

/* y = x + bias, or with `add` y += x + bias, of `count` numbers, at most 16; bias NULL: none. */
INLINE void store(float *y, floats x, const float *bias, int64_t count, int add) {
    if (count < LANES) { store_some(y, x, bias, count, add); return; }
    if (bias) x += load(bias);
    if (add) x += load(y);
    *(floats *)y = x;
}

/* The compiler forgets how an address came about: else it keeps one for each row, of more it has registers for. */
#ifdef __GNUC__
#define FORGET(x) __asm__("" : "+r"(x))
#else
#define FORGET(x)
#endif

/* sum + the products of two weights of each lane with the same two activations */
INLINE floats add_pairs(floats sum, const char *weight, const char *x) {
    uint32_t pair;
    memcpy(&pair, x, 4);
#ifdef __AVX512BF16__
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(weight), (__m512bh)_mm512_set1_epi32(pair));
#else
    words w = *(const words *)weight;
    sum += (floats)(w << 16) * bits_float(pair << 16);
    return sum + (floats)(w & 0xffff0000) * bits_float(pair & 0xffff0000);
#endif
}

/* The sums of products of 4 numbers of each lane of w with the same 4 of x, added to sum. */
INLINE integers add_products(integers sum, integers w, const int8_t *x) {
#if defined(__AVX512VNNI__)  /* it multiplies unsigned with signed numbers: w + 128, and `offsets` mends the sum */
    int32_t four;
    memcpy(&four, x, 4);
    return (integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(four));
#elif defined(__ARM_FEATURE_DOTPROD)
    int8x16_t four = vreinterpretq_s8_s32(vld1q_dup_s32((const int32_t *)x));
    int8x16x4_t parts;
    memcpy(&parts, &w, sizeof w);
    int32x4x4_t sums;
    memcpy(&sums, &sum, sizeof sum);
    for (int i = 0; i < 4; i++) sums.val[i] = vdotq_s32(sums.val[i], parts.val[i], four);
    memcpy(&sum, &sums, sizeof sum);
    return sum;
#else
    for (int i = 0; i < 4; i++) sum += (w << (24 - 8 * i) >> 24) * x[i];
    return sum;
#endif
}

/* sums[b][s] of group `g` in integers, then scaled */
INLINE void add_group(const Matrix *matrix, int64_t type, const char *weight, int64_t bytes, int64_t block, int64_t groups,
                      int64_t g, Rows x, int64_t row, int B, int S, floats sums[TILE_BLOCKS][TILE_ROWS]) {
    int64_t each = x.stride / GROUP;
    UNROLL for (int b = 0; b < B; b++) {
        integers sum[TILE_ROWS];
        UNROLL for (int s = 0; s < S; s++) sum[s] = (integers){0} + x.offsets[(row + s) * each + g];
        UNROLL for (int i = 0; i < GROUP / 4; i++) {
            integers w = *(const integers *)(weight + b * bytes + (type == INT8 ? i : i / 2) * 64);
            if (type == INT8) w ^= UNSIGNED_8;
            else w = (i % 2 ? w >> 4 : w) & 0x0f0f0f0f;
            UNROLL for (int s = 0; s < S; s++)
                sum[s] = add_products(sum[s], w, (const int8_t *)x.packed + (row + s) * x.stride + g * GROUP + 4 * i);
        }
        floats scale = load_bfloat16s(matrix->scales + ((block + b) * groups + g) * LANES);
        UNROLL for (int s = 0; s < S; s++)
            sums[b][s] += __builtin_convertvector(sum[s], floats) * (scale * x.scales[(row + s) * each + g]);
    }
}

/* sums[b][s] of 32 inputs of bfloat16 in the order of AMX: even and odd ones apart, then both together. */
INLINE void add_32(const char *weight, int64_t bytes, const uint16_t *x, int64_t stride, int B, int S,
                   floats sums[TILE_BLOCKS][TILE_ROWS]) {
    floats even[TILE_BLOCKS][4] = {0}, odd[TILE_BLOCKS][4] = {0};
    UNROLL for (int i = 0; i < 16; i++) UNROLL for (int b = 0; b < B; b++) {
        words w = *(const words *)(weight + b * bytes + i * 64);
        UNROLL for (int s = 0; s < S; s++) {
            even[b][s] += (floats)(w << 16) * bits_float((uint32_t)x[s * stride + 2 * i] << 16);
            odd[b][s] += (floats)(w & 0xffff0000) * bits_float((uint32_t)x[s * stride + 2 * i + 1] << 16);
        }
    }
    UNROLL for (int b = 0; b < B; b++) UNROLL for (int s = 0; s < S; s++) sums[b][s] += even[b][s] + odd[b][s];
}

/* sums[b][s] of all inputs, of which 4 bytes of a row at x, and `row_bytes` further of the next one, belong to 64 of weights. */
INLINE void add_inputs(int64_t type, const char *weight, int64_t bytes, int64_t vectors, const char *x, int64_t row_bytes, int B,
                       int S, const char *next, int64_t step, floats sums[TILE_BLOCKS][TILE_ROWS]) {
    const char *end = weight + vectors * 64, *sixth = x + 5 * row_bytes;
    int64_t three = 3 * row_bytes;
    for (; weight != end; weight += 64, x += 4, sixth += 4, next += step) {
        FORGET(row_bytes);
        FORGET(three);
        FORGET(sixth);
        UNROLL for (int b = 0; b < B; b++) FETCH(next + b * 64);
        UNROLL for (int s = 0; s < S; s++) {
            const char *at = s == 3 ? x + three : s < 5 ? x + s * row_bytes : sixth + (s - 5) * row_bytes;
            UNROLL for (int b = 0; b < B; b++)
                if (type == FLOAT32) sums[b][s] += load((const float *)(weight + b * bytes)) * *(const float *)at;
                else sums[b][s] = add_pairs(sums[b][s], weight + b * bytes, at);
        }
    }
}

/* B blocks of outputs of S rows. Meanwhile the weights at `next` are fetched, with steps of `step` bytes. */
INLINE void tile(const Matrix *matrix, int64_t type, Rows x, int64_t row, float *out, int64_t stride, int64_t column, int B,
                 int S, const char *next, int64_t step, int add) {
    int64_t inputs = matrix->inputs, vectors = block_vectors(type, inputs), bytes = vectors * 64, block = column / LANES;
    const char *weight = (const char *)matrix->weight + block * bytes;
    floats sums[TILE_BLOCKS][TILE_ROWS] = {0};
    if (type == FLOAT32 || type == BFLOAT16) {
        int64_t row_bytes = x.stride * (type == FLOAT32 ? 4 : 2);
        const char *rows = type == FLOAT32 ? (const char *)x.data : (const char *)x.packed;
        add_inputs(type, weight, bytes, vectors, rows + row * row_bytes, row_bytes, B, S, next, step, sums);
    } else {
        int64_t at_once = type == INT8 ? 8 : type == INT4 ? 4 : 16;
        for (int64_t k = 0; k < vectors; k += at_once) {
            UNROLL for (int i = 0; i < B * at_once; i++) FETCH(next + k * step + i * 64);
            if (type == BFLOAT16_AS_AMX)
                add_32(weight + k * 64, bytes, (const uint16_t *)x.packed + row * x.stride + 2 * k, x.stride, B, S, sums);
            else add_group(matrix, type, weight + k * 64, bytes, block, inputs / GROUP, k / at_once, x, row, B, S, sums);
        }
    }
    UNROLL for (int b = 0; b < B; b++) {
        int64_t first = column + b * LANES, count = matrix->outputs - first < LANES ? matrix->outputs - first : LANES;
        const float *bias = matrix->bias ? matrix->bias + first : 0;
        UNROLL for (int s = 0; s < S; s++)
            store(out + (row + s) * stride + first, sums[b][s], bias, count, add);
    }
}

/* All rows of TILE_BLOCKS blocks. The next weights are fetched in one pass over these, or in halves by the first two. */
INLINE void columns_of(const Matrix *matrix, int64_t type, Rows x, int64_t rows, float *out, int64_t stride, int64_t column,
                       int add) {
    int64_t bytes = block_vectors(type, matrix->inputs) * 64, step = TILE_BLOCKS * 64, row = 0;
    const char *next = (const char *)matrix->weight + (column / LANES + TILE_BLOCKS) * bytes;
    if (rows > TILE_ROWS) step /= 2;
    for (int S = type == BFLOAT16_AS_AMX ? 2 : TILE_ROWS; row < rows; ) {
        while (rows - row < S) S /= 2;
        if (S == 8) tile(matrix, type, x, row, out, stride, column, TILE_BLOCKS, TILE_ROWS, next, step, add);
        else if (S == 4) tile(matrix, type, x, row, out, stride, column, TILE_BLOCKS, 4, next, step, add);
        else if (S == 2) tile(matrix, type, x, row, out, stride, column, TILE_BLOCKS, 2, next, step, add);
        else tile(matrix, type, x, row, out, stride, column, TILE_BLOCKS, 1, next, step, add);
        next += bytes;
        if (row) step = 0;  /* all are on their way */
        row += S;
    }
}

INLINE void product_of(const Matrix *matrix, int64_t type, Rows x, int64_t rows, float *out, int64_t stride, int64_t from,
                       int64_t to, int add) {
    int64_t column = from;
    for (; column + (TILE_BLOCKS - 1) * LANES < to; column += TILE_BLOCKS * LANES)
        columns_of(matrix, type, x, rows, out, stride, column, add);
    for (; column < to; column += LANES)
        for (int64_t row = 0; row < rows; row++)
            tile(matrix, type, x, row, out, stride, column, 1, 1, (const char *)matrix->weight, 0, add);
}

/* ------------------------------------------------------------------------------------------- bfloat16 and 8 bit with AMX */

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

/* What AMX reads and writes in memory the compiler does not see. */
#define ORDER __asm__ volatile("" ::: "memory")
#define AMX_ROWS 4  /* of fewer rows, vectors are as fast */
#define AMX_INT8_ROWS 8  /* the same for 8 bit */
#define DENORMALS_ARE_ZERO 0x8040

/* Sets up this thread's 8 registers: tiles of 16 rows of 64 bytes. AMX takes numbers below 1e-38 for 0: so do vectors. */
static void amx_configure(void) {
    uint8_t shapes[64] __attribute__((aligned(64))) = {1};
    for (int i = 0; i < 8; i++) shapes[16 + 2 * i] = 64, shapes[48 + i] = 16;
    ORDER;
    _tile_loadconfig(shapes);
    _mm_setcsr(_mm_getcsr() | DENORMALS_ARE_ZERO);
}

static void amx_release(void) {
    _tile_release();
    _mm_setcsr(_mm_getcsr() & ~DENORMALS_ARE_ZERO);
}

/* 16 · G rows of B blocks of outputs. */
INLINE void amx_tile(const Matrix *matrix, Rows x, int64_t row, int64_t rows, float *out, int64_t stride, int64_t column,
                     int B, int G, int lines, int add) {
    int64_t vectors = block_vectors(BFLOAT16, matrix->inputs), bytes = vectors * 64;
    const char *weight = (const char *)matrix->weight + column / LANES * bytes;
    const char *next = weight + (B + (lines == 16 * B ? 0 : row / 32)) * bytes;
    const uint16_t *first = (const uint16_t *)x.packed + row * x.stride;
    float sums[4][16][16] __attribute__((aligned(64)));
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    ORDER;
    for (int64_t k = 0; k < vectors / 16; k++) {
        UNROLL for (int l = 0; l < lines; l++) FETCH(next + (k * lines + l) * 64);
        _tile_loadd(4, first + k * 32, x.stride * 2);
        _tile_loadd(6, weight + k * 1024, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (B > 1) {
            _tile_loadd(7, weight + bytes + k * 1024, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (G > 1) {
            _tile_loadd(5, first + 16 * x.stride + k * 32, x.stride * 2);
            _tile_dpbf16ps(2, 5, 6);
            if (B > 1) {
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    ORDER;
    for (int b = 0; b < B; b++) {
        int64_t at = column + b * LANES, count = matrix->outputs - at < LANES ? matrix->outputs - at : LANES;
        const float *bias = matrix->bias ? matrix->bias + at : 0;
        for (int64_t s = 0; s < 16 * G && row + s < rows; s++) {
            store(out + (row + s) * stride + at, load(sums[s / 16 * 2 + b][s % 16]), bias, count, add);
        }
    }
}

static void product_with_amx(const Matrix *matrix, Rows x, int64_t rows, float *out, int64_t stride, int64_t from,
                             int64_t to, int add) {
    for (int64_t column = from; column < to; column += 2 * LANES)
        for (int64_t row = 0; row < rows; row += 32) {
            if (column + LANES >= to) amx_tile(matrix, x, row, rows, out, stride, column, 1, 2, 0, add);
            else if (rows - row <= 16) amx_tile(matrix, x, row, rows, out, stride, column, 2, 1, row ? 0 : 32, add);
            else amx_tile(matrix, x, row, rows, out, stride, column, 2, 2, row > 32 ? 0 : rows > 32 ? 16 : 32, add);
        }
}

/* As amx_configure, for groups of 8 bit numbers: sums in registers 0 and 3, rows in 1 and 4, weights in 2 and 5. */
static void amx_configure_int8(void) {
    uint8_t shapes[64] __attribute__((aligned(64))) = {1};
    for (int i = 0; i < 6; i++) shapes[16 + 2 * i] = i % 3 == 1 ? GROUP : 64, shapes[48 + i] = i % 3 == 2 ? GROUP / 4 : 16;
    ORDER;
    _tile_loadconfig(shapes);
}

/* sum = products of 16 rows with a block of weights, of the group `g`; C, X and W are numbers of registers. */
#define AMX_GROUP(C, X, W, g, sum) { \
    _tile_zero(C); \
    _tile_loadd(X, (const int8_t *)x.packed + row * x.stride + (g) * GROUP, x.stride); \
    _tile_loadd(W, weight + (g) * GROUP * LANES, 64); \
    _tile_dpbssd(C, X, W); \
    _tile_stored(C, sum, 64); }

/* 16 rows of a block of outputs: whole numbers as of add_group, scaled in the same order. */
INLINE void amx_tile_int8(const Matrix *matrix, Rows x, int64_t row, int64_t rows, float *out, int64_t stride, int64_t column,
                          int lines, int add) {
    int64_t groups = matrix->inputs / GROUP, each = x.stride / GROUP, block = column / LANES;
    const char *weight = (const char *)matrix->weight + block * groups * GROUP * LANES;
    const char *next = weight + groups * GROUP * LANES;
    const float *scales = x.scales + row * each;
    int32_t sum[2][16][LANES] __attribute__((aligned(64)));
    floats sums[16] = {0};
    for (int64_t g = 0; g < groups; g += 2) {
        int both = g + 1 < groups;
        UNROLL for (int l = 0; l < lines; l++) FETCH(next + (g * lines / 2 + l) * 64);
        ORDER;
        AMX_GROUP(0, 1, 2, g, sum[0])
        if (both) AMX_GROUP(3, 4, 5, g + 1, sum[1])
        ORDER;
        for (int k = 0; k <= both; k++) {
            floats scale = load_bfloat16s(matrix->scales + (block * groups + g + k) * LANES);
            UNROLL for (int s = 0; s < 16; s++)
                sums[s] += __builtin_convertvector(*(const integers *)sum[k][s], floats) * (scale * scales[s * each + g + k]);
        }
    }
    int64_t count = matrix->outputs - column < LANES ? matrix->outputs - column : LANES;
    const float *bias = matrix->bias ? matrix->bias + column : 0;
    UNROLL for (int s = 0; s < 16; s++)
        if (row + s < rows) store(out + (row + s) * stride + column, sums[s], bias, count, add);
}

static void product_with_amx_int8(const Matrix *matrix, Rows x, int64_t rows, float *out, int64_t stride, int64_t from,
                                  int64_t to, int add) {
    amx_configure_int8();
    for (int64_t column = from; column < to; column += LANES)
        for (int64_t row = 0; row < rows; row += 16) {
            if (row) amx_tile_int8(matrix, x, row, rows, out, stride, column, 0, add);
            else amx_tile_int8(matrix, x, row, rows, out, stride, column, 16, add);
        }
    amx_configure();
}

/* True if the system lets this process use the matrix units, and their sums are those of the vectors, to the bit. */
static int amx_usable(void) {
    static int usable = -1;
    if (usable >= 0) return usable;
    usable = 0;
    if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */)) return 0;
    uint16_t weight[1024], x[64 * 64];
    float expected[64 * LANES], sums[64 * LANES];
    uint32_t random = 1;
    for (int i = 0; i < 1024 + 64 * 64; i++) {
        random = random * 1664525 + 1013904223;
        *(i < 1024 ? weight + i : x + i - 1024) = store_bfloat16((int32_t)random * 1e-9f);
    }
    Matrix matrix = {weight, 0, 0, BFLOAT16, LANES, 64};
    Rows rows = {0, x, 0, 0, 64};
    amx_configure();
    product_with_amx(&matrix, rows, 64, sums, LANES, 0, LANES, 0);
    amx_release();
    for (int i = 0; i < 64; i += 2) {
        Rows two = {0, x + i * 64, 0, 0, 64};
        product_of(&matrix, BFLOAT16_AS_AMX, two, 2, expected + i * LANES, LANES, 0, LANES, 0);
    }
    return usable = !memcmp(sums, expected, sizeof sums);
}

static void amx_begin(void) { if (amx_usable()) amx_configure(); }
static void amx_end(void) { if (amx_usable()) amx_release(); }
#else
#define AMX_ROWS 0
#define AMX_INT8_ROWS 0
static int amx_usable(void) { return 0; }
static void amx_begin(void) {}
static void amx_end(void) {}
static void product_with_amx(const Matrix *matrix, Rows x, int64_t rows, float *out, int64_t stride, int64_t from,
                             int64_t to, int add) {}
static void product_with_amx_int8(const Matrix *matrix, Rows x, int64_t rows, float *out, int64_t stride, int64_t from,
                                  int64_t to, int add) {}
#endif

/* --------------------------------------------------------------------------------------------- all types, shares */

/* Columns `from` to `to` of out = x weightᵀ + bias for all rows; with `add`, of out += that. `from` is a multiple of
   STEP. */
ONCE void product(const Matrix *matrix, Rows x, int64_t rows, float *out, int64_t stride, int64_t from, int64_t to,
                    int add) {
    switch (matrix->type) {  /* code of its own for each type */
        case FLOAT32: product_of(matrix, FLOAT32, x, rows, out, stride, from, to, add); break;
        case INT8:
            if (rows >= AMX_INT8_ROWS && amx_usable()) product_with_amx_int8(matrix, x, rows, out, stride, from, to, add);
            else product_of(matrix, INT8, x, rows, out, stride, from, to, add);
            break;
        case INT4: product_of(matrix, INT4, x, rows, out, stride, from, to, add); break;
        case BFLOAT16:
            if (!amx_usable()) product_of(matrix, BFLOAT16, x, rows, out, stride, from, to, add);
            else if (rows < AMX_ROWS) product_of(matrix, BFLOAT16_AS_AMX, x, rows, out, stride, from, to, add);
            else product_with_amx(matrix, x, rows, out, stride, from, to, add);
    }
}

/* A thread's part of `size` columns, in multiples of `step`. */
INLINE void share(int64_t size, int64_t step, int64_t *from, int64_t *to) {
    int64_t thread = THREAD, threads = THREADS, steps = (size + step - 1) / step;
    *from = steps * thread / threads * step;
    *to = steps * (thread + 1) / threads * step;
    if (*to > size) *to = size;
    if (*from > size) *from = size;
}

static void product_share(const Matrix *matrix, Rows x, int64_t rows, float *out, int64_t stride, int add) {
    int64_t from, to;
    share(matrix->outputs, STEP, &from, &to);
    product(matrix, x, rows, out, stride, from, to, add);
}

/* The largest absolute value of a group, NaN if there is one: without the sign, the bits of floats are in their order. */
INLINE float largest_of(const float *x) {
    uint32_t most = 0;
    for (int i = 0; i < GROUP; i++) { uint32_t size = float_bits(x[i]) & 0x7fffffff; most = size > most ? size : most; }
    return bits_float(most);
}

/* 32 numbers as whole ones of -127 to 127, and what they are multiplied with. */
static void pack_group(const float *x, int8_t *out, float *scale, int32_t *offset, int64_t type) {
    float most = largest_of(x), inverse = most > 0 ? 127 / most : 0;
    int32_t sum = 0;
    int8_t packed[GROUP];  /* apart, so that the compiler uses vectors */
    for (int i = 0; i < GROUP; i++) { int32_t n = (int32_t)rintf(x[i] * inverse); packed[i] = n; sum += n; }
    memcpy(out, packed, GROUP);
    *scale = most == most ? most / 127 : most;
    *offset = -sum * (type == INT4 ? 8 : OFFSET_8);
}

/* Writes columns `from` to `to` (multiples of GROUP) of a row as the products with `matrix` read them. */
static void pack(const Matrix *matrix, Rows x, int64_t row, int64_t from, int64_t to) {
    const float *in = x.data + row * x.stride;
    if (matrix->type == BFLOAT16) {
        uint16_t *out = (uint16_t *)x.packed + row * x.stride;
        for (int64_t i = from; i < to; i++) out[i] = store_bfloat16(in[i]);
    } else if (matrix->type != FLOAT32) {
        int8_t *out = (int8_t *)x.packed + row * x.stride;
        int64_t at = row * (x.stride / GROUP);
        for (int64_t i = from; i < to; i += GROUP)
            pack_group(in + i, out + i, x.scales + at + i / GROUP, x.offsets + at + i / GROUP, matrix->type);
    }
}

/* ---------------------------------------------------------------------------------------------------- interleaving */

/* `size` numbers of an array of floats. */
static void read_floats(const void *source, int64_t type, int64_t from, int64_t size, float *out) {
    if (type == FLOAT32) memcpy(out, (const float *)source + from, size * sizeof *out);
    else for (int64_t i = 0; i < size; i++) out[i] = load_bfloat16(((const uint16_t *)source)[from + i]);
}

/* Whole numbers n of -most…most and a scale that bfloat16 holds, so that n · scale is next to x. */
static void quantize_group(const float *x, int most, int8_t *out, uint16_t *scale) {
    uint32_t bits;
    float exact = largest_of(x) / most;
    memcpy(&bits, &exact, 4);
    *scale = exact == exact ? (bits + 0xffff) >> 16 : 0x7fc0;  /* upwards: no n is beyond `most` */
    float rounded = bits_float((uint32_t)*scale << 16), inverse = rounded > 0 ? 1 / rounded : 0;
    for (int i = 0; i < GROUP; i++) out[i] = (int8_t)rintf(x[i] * inverse);
}

/* Writes row `r` of a block in the form of `type`. */
static void interleave_row(const float *x, int64_t type, int64_t inputs, int r, char *block, uint16_t *scales) {
    if (type == FLOAT32) for (int64_t i = 0; i < inputs; i++) ((float *)block)[i * LANES + r] = x[i];
    else if (type == BFLOAT16) for (int64_t i = 0; i < inputs; i += GROUP) {  /* rounded by vectors, stored by pairs */
        uint16_t n[GROUP] = {0};
        int64_t size = inputs - i < GROUP ? inputs - i : GROUP;
        for (int64_t j = 0; j < size; j++) n[j] = store_bfloat16(x[i + j]);
        for (int64_t j = 0; j < GROUP; j += 2) memcpy((uint16_t *)block + (i + j) * LANES + 2 * r, n + j, 4);
    }
    else for (int64_t g = 0; g < inputs / GROUP; g++) {
        int8_t n[GROUP];
        quantize_group(x + g * GROUP, type == INT8 ? 127 : 7, n, scales + g * LANES + r);
        for (int i = 0; i < GROUP; i++) {
            int64_t four = g * (GROUP / 4) + i / 4;
            if (type == INT8) block[four * 64 + 4 * r + i % 4] = n[i];
            else block[four / 2 * 64 + 4 * r + i % 4] |= (n[i] + 8) << four % 2 * 4;
        }
    }
}

/* Fills the interleaved `weight` (zeros so far) and `scales` of a matrix from (outputs, inputs) floats of source_type. */
void interleave(const Matrix *matrix, const void *source, int64_t source_type, int64_t threads) {
    int64_t inputs = matrix->inputs, bytes = block_vectors(matrix->type, inputs) * 64;
    PARALLEL {
        int64_t from, to;
        float *x = malloc((inputs + GROUP) * sizeof *x);
        if (!x) abort();
        share(matrix->outputs, LANES, &from, &to);
        for (int64_t o = from; o < to; o++) {
            read_floats(source, source_type, o * inputs, inputs, x);
            interleave_row(x, matrix->type, inputs, o % LANES, (char *)matrix->weight + o / LANES * bytes,
                           (uint16_t *)matrix->scales + o / LANES * (inputs / GROUP) * LANES);
        }
        free(x);
    }
}
