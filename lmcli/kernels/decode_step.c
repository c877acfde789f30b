/* A decoder's forward pass with a key-value cache, in one call: rows of tokens -> logits.

   build.py compiles this file when first needed; decode_step.py describes the arrays and calls `decode_step`.
   All threads go through the layers together, in one parallel region with barriers. Each thread computes a range of the
   output columns of every matrix product for all rows, so each weight is read from memory once a call.

   A row's numbers do not depend on the other rows, to the bit: every dot product adds the same terms in the same order,
   whatever tile it falls into. kernels.c may be compiled with -fassociative-math, this file may not.

   C hidden size, H query heads, K key-value heads, D size of a head, F size inside the MLP, V vocabulary. */

#ifdef __clang__
#pragma clang fp reassociate(off)
#elif defined(__GNUC__)
#pragma GCC optimize("no-associative-math")
#endif

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
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
#define UNROLL _Pragma("GCC unroll 8")
#define LANES 16  /* numbers of a dot product's running sum */
#define STEP 32  /* columns of a product are shared out in multiples of this */
#define WEIGHT_ROWS 4  /* a tile of products: outputs */
#define TILE_ROWS 6  /* and rows; the sums fill the registers of AVX-512 */
#define ALIGN 64  /* rows of activations are padded with zeros to a multiple of this */

typedef float floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef float eight __attribute__((vector_size(32)));
typedef float four __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2), may_alias));

enum { FLOAT32, BFLOAT16 };
enum { SILU, GELU, GELU_TANH, RELU, TANH };

typedef struct {
    const void *weight;  /* (outputs, inputs) float32 or bfloat16; NULL: no such matrix */
    const float *bias;  /* (outputs) or NULL */
    int64_t outputs, inputs;
} Matrix;

typedef struct { const float *weight, *bias; } Norm;  /* weight NULL: no norm; bias NULL: none */

typedef struct {
    Norm attention_norm, query_norm, key_norm, cross_norm, cross_query_norm, mlp_norm;
    Matrix query, key, value, output, cross_query, cross_output, gate, up, down;
    int64_t window;  /* tokens visible, 0: all */
    int64_t local;  /* 1: uses the second table of rotary angles */
    float *keys, *values;  /* the cache, (slots, K, capacity, D) */
    const float *cross_keys, *cross_values;  /* (sources, K, cross_capacity, D) */
} Layer;

typedef struct {
    int64_t dtype, layers, hidden, heads, key_heads, head_dim, vocabulary, rotary;
    int64_t capacity, cross_capacity, rms, post_norm, parallel, activation;
    float eps, attention_scale, logit_scale;
    const Layer *layer;
    Norm final_norm;
    Matrix head;
    const float *relative;  /* (H, capacity): added to a score by distance; NULL: none */
} Model;

typedef struct { float *data; void *packed; int64_t stride; } Rows;  /* packed: in the type of the products */

typedef struct {  /* one call: `rows` tokens, each with a slot of the cache and a position in it */
    int64_t rows, logit_rows, longest;
    const int64_t *slot, *position, *source, *source_length, *logit_row;
    const float *cos, *sin, *local_cos, *local_sin;  /* (rows, rotary / 2) */
    float *x;  /* (rows, C): embeddings; overwritten */
    float *logits;  /* (logit_rows, V) */
    Rows normed, query, mixed, inner;  /* scratch: (rows, C), (rows, H D), (rows, H D), (rows, F) */
    float *key, *value;  /* scratch (rows, K D) */
    float *scores;  /* scratch (threads, longest) */
} Call;

/* ---------------------------------------------------------------------------------------------- single numbers */

INLINE float bits_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE uint16_t to_bfloat16(float x) {  /* to the nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (x == x ? bits + 0x7fff + (bits >> 16 & 1) : 0x7fc00000) >> 16;
}

/* e^x to 2 units in the last place (the polynomial of Cephes' expf); 0 below -87, NaN for NaN. */
INLINE float exponential(float x) {
    float bounded = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(bounded * 1.44269504088896341f), r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    float y = (p * r * r + r + 1.0f) * bits_float((uint32_t)((int32_t)n + 127) << 23);
    return x < -87.0f ? 0.0f : y;
}

INLINE float gelu_tanh(float x) {  /* x/2 (1 + tanh(u)) = x / (1 + e^-2u) */
    return x / (1 + exponential(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
}

static void activate(int64_t activation, float *x, int64_t size) {
    if (activation == SILU) for (int64_t i = 0; i < size; i++) x[i] = x[i] / (1 + exponential(-x[i]));
    else if (activation == GELU) for (int64_t i = 0; i < size; i++) x[i] = 0.5f * x[i] * (1 + erff(x[i] * 0.70710678118654752f));
    else if (activation == GELU_TANH) for (int64_t i = 0; i < size; i++) x[i] = gelu_tanh(x[i]);
    else if (activation == RELU) for (int64_t i = 0; i < size; i++) x[i] = x[i] < 0 ? 0 : x[i];
    else for (int64_t i = 0; i < size; i++) x[i] = tanhf(x[i]);
}

/* ------------------------------------------------------------------------------------------------ dot products */

INLINE floats load(const float *x) { return *(const floats *)x; }

INLINE floats load_end(const float *x, int64_t count) {  /* the last `count` numbers of a row, then zeros */
    float padded[LANES] = {0};
    memcpy(padded, x, count * sizeof *x);
    return load(padded);
}

INLINE floats load_bfloat16(const uint16_t *x) {
    return (floats)(__builtin_convertvector(*(const halves *)x, words) << 16);
}

INLINE floats load_bfloat16_end(const uint16_t *x, int64_t count) {
    uint16_t padded[LANES] = {0};
    memcpy(padded, x, count * sizeof *x);
    return load_bfloat16(padded);
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

/* sums[r][s] = weights[r] · x[s] for R rows of weights and S rows of activations; each in one vector of LANES sums. */
INLINE void tile_float(const float *weight, const float *x, int64_t stride, int64_t size, int R, int S,
                       float sums[WEIGHT_ROWS][TILE_ROWS]) {
    floats sum[WEIGHT_ROWS][TILE_ROWS] = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        floats w[WEIGHT_ROWS];
        UNROLL for (int r = 0; r < R; r++) w[r] = load(weight + r * size + i);
        UNROLL for (int s = 0; s < S; s++) {
            floats v = load(x + s * stride + i);
            UNROLL for (int r = 0; r < R; r++) sum[r][s] += w[r] * v;
        }
    }
    if (i < size)
        UNROLL for (int r = 0; r < R; r++) {
            floats w = load_end(weight + r * size + i, size - i);
            UNROLL for (int s = 0; s < S; s++) sum[r][s] += w * load(x + s * stride + i);
        }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int s = 0; s < S; s++) sums[r][s] = total(sum[r][s]);
}

/* The same with weights and activations in bfloat16, and sums in float32. */
INLINE void tile_bfloat16(const uint16_t *weight, const uint16_t *x, int64_t stride, int64_t size, int R, int S,
                          float sums[WEIGHT_ROWS][TILE_ROWS]) {
    floats sum[WEIGHT_ROWS][TILE_ROWS] = {0};
    int64_t i = 0;
#ifdef __AVX512BF16__  /* pairs of neighbors are added first */
    for (; i + 2 * LANES <= size; i += 2 * LANES) {
        __m512bh w[WEIGHT_ROWS];
        UNROLL for (int r = 0; r < R; r++) w[r] = (__m512bh)_mm512_loadu_si512(weight + r * size + i);
        UNROLL for (int s = 0; s < S; s++) {
            __m512bh v = (__m512bh)_mm512_loadu_si512(x + s * stride + i);
            UNROLL for (int r = 0; r < R; r++) sum[r][s] = _mm512_dpbf16_ps(sum[r][s], w[r], v);
        }
    }
#endif
    for (; i + LANES <= size; i += LANES) {
        floats w[WEIGHT_ROWS];
        UNROLL for (int r = 0; r < R; r++) w[r] = load_bfloat16(weight + r * size + i);
        UNROLL for (int s = 0; s < S; s++) {
            floats v = load_bfloat16(x + s * stride + i);
            UNROLL for (int r = 0; r < R; r++) sum[r][s] += w[r] * v;
        }
    }
    if (i < size)
        UNROLL for (int r = 0; r < R; r++) {
            floats w = load_bfloat16_end(weight + r * size + i, size - i);
            UNROLL for (int s = 0; s < S; s++) sum[r][s] += w * load_bfloat16(x + s * stride + i);
        }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int s = 0; s < S; s++) sums[r][s] = total(sum[r][s]);
}

/* ---------------------------------------------------------------------------------------------- matrix products */

INLINE void store_tile(const Matrix *matrix, float sums[WEIGHT_ROWS][TILE_ROWS], float *out, int64_t stride, int64_t column,
                       int R, int S, int add) {
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int s = 0; s < S; s++) {
        float *y = out + s * stride + column + r;
        float value = sums[r][s] + (matrix->bias ? matrix->bias[column + r] : 0);
        *y = add ? *y + value : value;
    }
}

INLINE void tile(const Matrix *matrix, int64_t dtype, Rows x, int64_t row, float *out, int64_t stride, int64_t column,
                 int R, int S, int add) {
    float sums[WEIGHT_ROWS][TILE_ROWS];
    int64_t size = matrix->inputs;
    if (dtype == FLOAT32)
        tile_float((const float *)matrix->weight + column * size, (const float *)x.packed + row * x.stride, x.stride, size,
                   R, S, sums);
    else
        tile_bfloat16((const uint16_t *)matrix->weight + column * size, (const uint16_t *)x.packed + row * x.stride,
                      x.stride, size, R, S, sums);
    store_tile(matrix, sums, out + row * stride, stride, column, R, S, add);
}

INLINE void columns_of(const Matrix *matrix, int64_t dtype, Rows x, int64_t rows, float *out, int64_t stride,
                       int64_t column, int R, int add) {
    int64_t row = 0;
    for (; row + TILE_ROWS <= rows; row += TILE_ROWS) tile(matrix, dtype, x, row, out, stride, column, R, TILE_ROWS, add);
    switch (rows - row) {
        case 1: tile(matrix, dtype, x, row, out, stride, column, R, 1, add); break;
        case 2: tile(matrix, dtype, x, row, out, stride, column, R, 2, add); break;
        case 3: tile(matrix, dtype, x, row, out, stride, column, R, 3, add); break;
        case 4: tile(matrix, dtype, x, row, out, stride, column, R, 4, add); break;
        case 5: tile(matrix, dtype, x, row, out, stride, column, R, 5, add); break;
    }
}

INLINE void product_of(const Matrix *matrix, int64_t dtype, Rows x, int64_t rows, float *out, int64_t stride,
                       int64_t from, int64_t to, int add) {
    int64_t column = from;
    for (; column + WEIGHT_ROWS <= to; column += WEIGHT_ROWS)
        columns_of(matrix, dtype, x, rows, out, stride, column, WEIGHT_ROWS, add);
    for (; column < to; column++) columns_of(matrix, dtype, x, rows, out, stride, column, 1, add);
}

/* Columns `from` to `to` of out = x weightᵀ + bias for all rows; with `add`, of out += that. */
static void product(const Model *model, const Matrix *matrix, Rows x, int64_t rows, float *out, int64_t stride,
                    int64_t from, int64_t to, int add) {
    if (model->dtype == FLOAT32) product_of(matrix, FLOAT32, x, rows, out, stride, from, to, add);
    else product_of(matrix, BFLOAT16, x, rows, out, stride, from, to, add);
}

/* A thread's part of `size` columns, in multiples of `step`. */
INLINE void share(int64_t size, int64_t step, int64_t *from, int64_t *to) {
    int64_t thread = THREAD, threads = THREADS, steps = (size + step - 1) / step;
    *from = steps * thread / threads * step;
    *to = steps * (thread + 1) / threads * step;
    if (*to > size) *to = size;
    if (*from > size) *from = size;
}

static void product_share(const Model *model, const Matrix *matrix, Rows x, int64_t rows, float *out, int64_t stride,
                          int add) {
    int64_t from, to;
    share(matrix->outputs, STEP, &from, &to);
    product(model, matrix, x, rows, out, stride, from, to, add);
}

/* Writes columns `from` to `to` of a row in the type of the products. */
static void pack(const Model *model, Rows x, int64_t row, int64_t from, int64_t to) {
    if (model->dtype == FLOAT32) return;  /* the same array */
    const float *in = x.data + row * x.stride;
    uint16_t *out = (uint16_t *)x.packed + row * x.stride;
    for (int64_t i = from; i < to; i++) out[i] = to_bfloat16(in[i]);
}

/* ------------------------------------------------------------------------------------------------------- norms */

INLINE float sum_of_squares(const float *x, int64_t size, float mean) {
    floats sum = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) { floats v = load(x + i) - mean; sum += v * v; }
    float end = 0;
    for (; i < size; i++) end += (x[i] - mean) * (x[i] - mean);
    return total(sum) + end;
}

INLINE float mean_of(const float *x, int64_t size) {
    floats sum = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sum += load(x + i);
    float end = 0;
    for (; i < size; i++) end += x[i];
    return (total(sum) + end) / size;
}

/* RMSNorm: x / sqrt(mean(x²) + eps) · weight; LayerNorm subtracts the mean first, and adds a bias. y may be x. */
static void normalize(const float *x, Norm norm, float *y, int64_t size, float eps, int64_t rms) {
    float mean = rms ? 0 : mean_of(x, size), inverse = 1 / sqrtf(sum_of_squares(x, size, mean) / size + eps);
    if (norm.bias) for (int64_t i = 0; i < size; i++) y[i] = (x[i] - mean) * inverse * norm.weight[i] + norm.bias[i];
    else for (int64_t i = 0; i < size; i++) y[i] = (x[i] - mean) * inverse * norm.weight[i];
}

/* This thread's rows of call->normed = norm(x), in the type of the products. */
static void norm_share(const Model *model, const Call *call, Norm norm) {
    int64_t size = model->hidden, from, to;
    share(call->rows, 1, &from, &to);
    for (int64_t row = from; row < to; row++) {
        const float *x = call->x + row * size;
        float *y = call->normed.data + row * call->normed.stride;
        if (norm.weight) normalize(x, norm, y, size, model->eps, model->rms);
        else memcpy(y, x, size * sizeof *y);
        pack(model, call->normed, row, 0, size);
    }
}

/* post_norm: this thread's rows of x = norm(x). */
static void renormalize_share(const Model *model, const Call *call, Norm norm) {
    int64_t from, to;
    share(call->rows, 1, &from, &to);
    for (int64_t row = from; row < to; row++) {
        float *x = call->x + row * model->hidden;
        normalize(x, norm, x, model->hidden, model->eps, model->rms);
    }
}

/* --------------------------------------------------------------------------------------------------- attention */

INLINE float dot(const float *a, const float *b, int64_t size) {
    floats sum = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sum += load(a + i) * load(b + i);
    if (i < size) sum += load_end(a + i, size - i) * load_end(b + i, size - i);
    return total(sum);
}

INLINE void add_scaled(float *y, float scale, const float *x, int64_t size) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) *(floats *)(y + i) += scale * load(x + i);
    for (; i < size; i++) y[i] += scale * x[i];
}

/* Rotates the pairs (x[i], x[i + rotary/2]) of a head. */
INLINE void rotate(float *x, const float *cos, const float *sin, int64_t rotary) {
    int64_t half = rotary / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

INLINE void prepare_head(const Model *model, const Layer *layer, const Call *call, int64_t row, float *head, Norm norm) {
    int64_t half = model->rotary / 2;
    if (norm.weight) normalize(head, norm, head, model->head_dim, model->eps, 1);
    if (!model->rotary) return;
    const float *cos = layer->local ? call->local_cos : call->cos, *sin = layer->local ? call->local_sin : call->sin;
    rotate(head, cos + row * half, sin + row * half, model->rotary);
}

/* softmax(query · keys · scale + bias) values over `count` keys, (D). `bias` is read backwards: by distance. */
static void attend(const Model *model, const float *query, const float *keys, const float *values, const float *bias,
                   int64_t count, float *scores, float *out) {
    int64_t size = model->head_dim;
    float most = -INFINITY, sum = 0;
    for (int64_t i = 0; i < count; i++) {
        scores[i] = dot(query, keys + i * size, size) * model->attention_scale + (bias ? bias[count - 1 - i] : 0);
        most = scores[i] > most ? scores[i] : most;
    }
    for (int64_t i = 0; i < count; i++) scores[i] = exponential(scores[i] - most);
    for (int64_t i = 0; i < count; i++) sum += scores[i];
    memset(out, 0, size * sizeof *out);
    for (int64_t i = 0; i < count; i++) add_scaled(out, scores[i] / sum, values + i * size, size);
}

/* The keys and values of this thread's (row, head) pairs, into the cache. */
static void cache_share(const Model *model, const Layer *layer, const Call *call) {
    int64_t from, to, size = model->head_dim, heads = model->key_heads;
    share(call->rows * heads, 1, &from, &to);
    for (int64_t i = from; i < to; i++) {
        int64_t row = i / heads, head = i % heads;
        float *key = call->key + i * size;
        prepare_head(model, layer, call, row, key, layer->key_norm);
        int64_t at = ((call->slot[row] * heads + head) * model->capacity + call->position[row]) * size;
        memcpy(layer->keys + at, key, size * sizeof *key);
        memcpy(layer->values + at, call->value + i * size, size * sizeof *key);
    }
}

/* call->mixed of this thread's (row, head) pairs: attention to the cache. */
static void attention_share(const Model *model, const Layer *layer, const Call *call) {
    int64_t from, to, size = model->head_dim, heads = model->heads, group = heads / model->key_heads;
    share(call->rows * heads, 1, &from, &to);
    for (int64_t i = from; i < to; i++) {
        int64_t row = i / heads, head = i % heads, position = call->position[row];
        float *query = call->query.data + row * call->query.stride + head * size;
        prepare_head(model, layer, call, row, query, layer->query_norm);
        int64_t first = layer->window && position >= layer->window ? position - layer->window + 1 : 0;
        int64_t at = ((call->slot[row] * model->key_heads + head / group) * model->capacity + first) * size;
        const float *bias = model->relative ? model->relative + head * model->capacity : 0;
        attend(model, query, layer->keys + at, layer->values + at, bias, position + 1 - first,
               call->scores + THREAD * call->longest, call->mixed.data + row * call->mixed.stride + head * size);
    }
}

/* The same to the encoder's output. */
static void cross_share(const Model *model, const Layer *layer, const Call *call) {
    int64_t from, to, size = model->head_dim, heads = model->heads, group = heads / model->key_heads;
    share(call->rows * heads, 1, &from, &to);
    for (int64_t i = from; i < to; i++) {
        int64_t row = i / heads, head = i % heads;
        float *query = call->query.data + row * call->query.stride + head * size;
        if (layer->cross_query_norm.weight) normalize(query, layer->cross_query_norm, query, size, model->eps, 1);
        int64_t at = (call->source[row] * model->key_heads + head / group) * model->cross_capacity * size;
        attend(model, query, layer->cross_keys + at, layer->cross_values + at, 0, call->source_length[row],
               call->scores + THREAD * call->longest, call->mixed.data + row * call->mixed.stride + head * size);
    }
}

static void pack_share(const Model *model, const Call *call, Rows x, int64_t size) {
    int64_t from, to;
    share(call->rows, 1, &from, &to);
    for (int64_t row = from; row < to; row++) pack(model, x, row, 0, size);
}

/* call->mixed = attention(normed), in the type of the products */
static void attention_heads(const Model *model, const Layer *layer, const Call *call) {
    int64_t width = model->heads * model->head_dim, key_width = model->key_heads * model->head_dim;
    product_share(model, &layer->query, call->normed, call->rows, call->query.data, call->query.stride, 0);
    product_share(model, &layer->key, call->normed, call->rows, call->key, key_width, 0);
    product_share(model, &layer->value, call->normed, call->rows, call->value, key_width, 0);
    BARRIER
    cache_share(model, layer, call);
    BARRIER
    attention_share(model, layer, call);
    BARRIER
    if (model->dtype != FLOAT32) { pack_share(model, call, call->mixed, width); BARRIER }
}

/* x += output(attention(normed)) */
static void attention_sublayer(const Model *model, const Layer *layer, const Call *call) {
    attention_heads(model, layer, call);
    product_share(model, &layer->output, call->mixed, call->rows, call->x, model->hidden, 1);
}

/* x += cross_output(attention from normed to the encoder's output) */
static void cross_sublayer(const Model *model, const Layer *layer, const Call *call) {
    product_share(model, &layer->cross_query, call->normed, call->rows, call->query.data, call->query.stride, 0);
    BARRIER
    cross_share(model, layer, call);
    BARRIER
    if (model->dtype != FLOAT32) { pack_share(model, call, call->mixed, model->heads * model->head_dim); BARRIER }
    product_share(model, &layer->cross_output, call->mixed, call->rows, call->x, model->hidden, 1);
}

/* call->inner = act(up(normed)), or gated: act(gate(normed)) · up(normed); in the type of the products */
static void mlp_inner(const Model *model, const Layer *layer, const Call *call) {
    int64_t from, to, stride = call->inner.stride;
    float *inner = call->inner.data, *gate = inner + call->rows * stride;  /* the gate's rows follow */
    share(layer->up.outputs, STEP, &from, &to);
    product(model, &layer->up, call->normed, call->rows, inner, stride, from, to, 0);
    if (layer->gate.weight) product(model, &layer->gate, call->normed, call->rows, gate, stride, from, to, 0);
    for (int64_t row = 0; row < call->rows; row++) {
        float *up = inner + row * stride, *gated = gate + row * stride;
        if (layer->gate.weight) {
            activate(model->activation, gated + from, to - from);
            for (int64_t i = from; i < to; i++) up[i] *= gated[i];
        } else activate(model->activation, up + from, to - from);
        pack(model, call->inner, row, from, to);
    }
    BARRIER
}

/* x += down(inner) */
static void mlp_sublayer(const Model *model, const Layer *layer, const Call *call) {
    mlp_inner(model, layer, call);
    product_share(model, &layer->down, call->inner, call->rows, call->x, model->hidden, 1);
}

/* ------------------------------------------------------------------------------------------------- whole layers */

static void pre_norm_layer(const Model *model, const Layer *layer, const Call *call) {
    norm_share(model, call, layer->attention_norm);
    BARRIER
    attention_sublayer(model, layer, call);
    BARRIER
    if (layer->cross_query.weight) {
        norm_share(model, call, layer->cross_norm);
        BARRIER
        cross_sublayer(model, layer, call);
        BARRIER
    }
    norm_share(model, call, layer->mlp_norm);
    BARRIER
    mlp_sublayer(model, layer, call);
    BARRIER
}

/* norm(x + f(x)) in place of x + f(norm(x)) */
static void post_norm_layer(const Model *model, const Layer *layer, const Call *call) {
    Norm none = {0, 0};
    norm_share(model, call, none);
    BARRIER
    attention_sublayer(model, layer, call);
    BARRIER
    renormalize_share(model, call, layer->attention_norm);
    norm_share(model, call, none);
    BARRIER
    if (layer->cross_query.weight) {
        cross_sublayer(model, layer, call);
        BARRIER
        renormalize_share(model, call, layer->cross_norm);
        norm_share(model, call, none);
        BARRIER
    }
    mlp_sublayer(model, layer, call);
    BARRIER
    renormalize_share(model, call, layer->mlp_norm);
    BARRIER
}

/* x + attention(norm(x)) + mlp(norm(x)): both read the same x. */
static void parallel_layer(const Model *model, const Layer *layer, const Call *call) {
    norm_share(model, call, layer->attention_norm);
    BARRIER
    attention_heads(model, layer, call);
    norm_share(model, call, layer->mlp_norm);
    BARRIER
    mlp_inner(model, layer, call);
    product_share(model, &layer->output, call->mixed, call->rows, call->x, model->hidden, 1);
    product_share(model, &layer->down, call->inner, call->rows, call->x, model->hidden, 1);
    BARRIER
}

/* Logits of the rows `logit_row`, from the normed state. */
static void head_share(const Model *model, const Call *call) {
    int64_t from, to, size = model->hidden, stride = call->normed.stride;
    share(call->logit_rows, 1, &from, &to);
    for (int64_t i = from; i < to; i++) {
        float *x = call->x + call->logit_row[i] * size, *y = call->normed.data + i * stride;
        if (model->final_norm.weight) normalize(x, model->final_norm, y, size, model->eps, model->rms);
        else memcpy(y, x, size * sizeof *y);
        for (int64_t j = 0; j < size; j++) y[j] *= model->logit_scale;
        pack(model, call->normed, i, 0, size);
    }
    BARRIER
    product_share(model, &model->head, call->normed, call->logit_rows, call->logits, model->vocabulary, 0);
}

void decode_step(const Model *model, const Call *call, int64_t threads) {
    PARALLEL {
        for (int64_t i = 0; i < model->layers; i++) {
            const Layer *layer = model->layer + i;
            if (model->parallel) parallel_layer(model, layer, call);
            else if (model->post_norm) post_norm_layer(model, layer, call);
            else pre_norm_layer(model, layer, call);
        }
        if (call->logit_rows) head_share(model, call);
    }
}

/* y = x in bfloat16. */
void round_to_bfloat16(const float *x, uint16_t *y, int64_t size, int64_t threads) {
    PARALLEL {
        int64_t from, to;
        share(size, ALIGN, &from, &to);
        for (int64_t i = from; i < to; i++) y[i] = to_bfloat16(x[i]);
    }
}
