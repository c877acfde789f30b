/* A decoder's forward pass with a key-value cache, in one call: rows of tokens -> logits.

   build.py compiles this file when first needed; decode_step.py describes the arrays and calls `decode_step`.
   All threads go through the layers together, in one parallel region with barriers. Each thread computes a range of the
   output columns of every matrix product for all rows, so each weight is read from memory once a call.

   A row's numbers do not depend on the other rows, to the bit.

   C hidden size, H query heads, K key-value heads, D size of a head, F size inside the MLP, V vocabulary. */

#include "decode_products.h"

#define QUERIES 16  /* of one head that are attended together, at most */
#define PART 64  /* values that are read together */

enum { SILU, GELU, GELU_TANH, RELU, TANH };

typedef struct { const float *weight, *bias; } Norm;  /* weight NULL: no norm; bias NULL: none */

typedef struct {
    Norm attention_norm, query_norm, key_norm, attention_out_norm, cross_norm, cross_query_norm, mlp_norm, mlp_out_norm;
    Matrix query, key, value, output, cross_query, cross_output, gate, up, down;
    int64_t window;  /* tokens visible, 0: all */
    int64_t local;  /* 1: uses the second table of rotary angles */
    void *keys, *values;  /* the cache in cache_type: (slots, K, capacity / 16, D, 16) and (slots, K, capacity, D) */
    const float *cross_keys, *cross_values;  /* (sources, K, cross_capacity / 16, D, 16) and (sources, K, cross_capacity, D) */
} Layer;

typedef struct {
    int64_t layers, hidden, heads, key_heads, head_dim, vocabulary, rotary;
    int64_t capacity, cross_capacity, cache_type, rms, post_norm, parallel, activation;
    float eps, attention_scale, logit_scale;
    const Layer *layer;
    Norm final_norm;
    Matrix head;
    const float *relative;  /* (H, capacity): added to a score by distance; NULL: none */
} Model;

typedef struct {  /* one call: `rows` tokens, each with a slot of the cache and a position in it */
    int64_t rows, logit_rows, longest;
    const int64_t *slot, *position, *source, *source_length, *logit_row;
    const float *cos, *sin, *local_cos, *local_sin;  /* (rows, rotary / 2) */
    float *x;  /* (rows, C): embeddings; overwritten */
    float *logits;  /* (logit_rows, V) */
    Rows normed, query, mixed, inner;  /* scratch: (rows, C), (rows, H D), (rows, H D), (2 rows, F) */
    float *key, *value;  /* scratch (rows, K D) */
    float *scores, *part;  /* scratch (threads, QUERIES, longest), (threads, 16, D) */
} Call;

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

/* This thread's rows of call->normed = norm(x), as the products with `matrix` read them. */
static void norm_share(const Model *model, const Call *call, Norm norm, const Matrix *matrix) {
    int64_t size = model->hidden, from, to;
    share(call->rows, 1, &from, &to);
    for (int64_t row = from; row < to; row++) {
        const float *x = call->x + row * size;
        float *y = call->normed.data + row * call->normed.stride;
        if (norm.weight) normalize(x, norm, y, size, model->eps, model->rms);
        else memcpy(y, x, size * sizeof *y);
        pack(matrix, call->normed, row, 0, size);
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

/* ------------------------------------------------------------------------------------------------- activations */

INLINE float gelu_tanh(float x) {  /* x/2 (1 + tanh(u)) = x / (1 + e^-2u) */
    return x / (1 + exponential_float(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
}

static void activate(int64_t activation, float *x, int64_t size) {
    if (activation == SILU) for (int64_t i = 0; i < size; i++) x[i] = x[i] / (1 + exponential_float(-x[i]));
    else if (activation == GELU) for (int64_t i = 0; i < size; i++) x[i] = 0.5f * x[i] * (1 + erff(x[i] * 0.70710678118654752f));
    else if (activation == GELU_TANH) for (int64_t i = 0; i < size; i++) x[i] = gelu_tanh(x[i]);
    else if (activation == RELU) for (int64_t i = 0; i < size; i++) x[i] = x[i] < 0 ? 0 : x[i];
    else for (int64_t i = 0; i < size; i++) x[i] = tanhf(x[i]);
}

/* --------------------------------------------------------------------------------------------------- attention */

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

/* 16 numbers of a cache, or one, from its element `at` on. */
INLINE floats cached(const void *cache, int64_t type, int64_t at) {
    return type == FLOAT32 ? load((const float *)cache + at) : load_bfloat16s((const uint16_t *)cache + at);
}

INLINE float cached_one(const void *cache, int64_t type, int64_t at) {
    return type == FLOAT32 ? ((const float *)cache)[at] : load_bfloat16(((const uint16_t *)cache)[at]);
}

/* out[s], lane k = query s · key k, of S queries and the 16 keys of a block, in which a dimension's numbers are together. */
INLINE void dots(const float *query, int64_t stride, const void *keys, int64_t type, int64_t size, int S, floats *out) {
    floats sum[4][4] = {0};
    int64_t i = 0;
    for (; i + 4 <= size; i += 4)
        UNROLL for (int k = 0; k < 4; k++) {
            floats key = cached(keys, type, (i + k) * LANES);
            UNROLL for (int s = 0; s < S; s++) sum[s][k] += query[s * stride + i + k] * key;
        }
    for (; i < size; i++)
        UNROLL for (int s = 0; s < S; s++) sum[s][0] += query[s * stride + i] * cached(keys, type, i * LANES);
    UNROLL for (int s = 0; s < S; s++) out[s] = (sum[s][0] + sum[s][1]) + (sum[s][2] + sum[s][3]);
}

/* out[s] += Σ weights[s][i] · values[i] of S queries, the dimensions `from` to `from` + 16 N. */
INLINE void weighted_sums(const float *weights, int64_t longest, const void *values, int64_t type, int64_t count, int64_t size,
                          int64_t from, int S, int N, float *out, int64_t stride) {
    floats sum[4][4];
    UNROLL for (int s = 0; s < S; s++) UNROLL for (int n = 0; n < N; n++) sum[s][n] = load(out + s * stride + from + LANES * n);
    for (int64_t i = 0; i < count; i++)
        UNROLL for (int n = 0; n < N; n++) {
            floats value = cached(values, type, i * size + from + LANES * n);
            UNROLL for (int s = 0; s < S; s++) sum[s][n] += weights[s * longest + i] * value;
        }
    UNROLL for (int s = 0; s < S; s++) UNROLL for (int n = 0; n < N; n++) *(floats *)(out + s * stride + from + LANES * n) = sum[s][n];
}

/* The same for all dimensions. */
INLINE void add_values(const float *weights, int64_t longest, const void *values, int64_t type, int64_t count, int64_t size,
                       int S, float *out, int64_t stride) {
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES)
        weighted_sums(weights, longest, values, type, count, size, i, S, 4, out, stride);
    for (; i + LANES <= size; i += LANES) weighted_sums(weights, longest, values, type, count, size, i, S, 1, out, stride);
    for (; i < size; i++)
        for (int s = 0; s < S; s++)
            for (int64_t k = 0; k < count; k++) out[s * stride + i] += weights[s * longest + k] * cached_one(values, type, k * size + i);
}

/* The largest number, which NaN is not; -INFINITY if there is none. */
INLINE float largest_number(const float *x, int64_t size) {
    floats most = (floats){0} - INFINITY;
    float largest = -INFINITY;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        integers greater = load(x + i) > most;
        most = (floats)(((integers)load(x + i) & greater) | ((integers)most & ~greater));
    }
    for (; i < size; i++) largest = x[i] > largest ? x[i] : largest;
    for (int k = 0; k < LANES; k++) largest = most[k] > largest ? most[k] : largest;
    return largest;
}

/* out = e^(x - largest), then zeros up to a multiple of 16; returns their sum. out may be x. */
INLINE float exponentials(const float *x, int64_t count, float largest, float *out) {
    int64_t i;
    for (i = 0; i < count; i++) out[i] = exponential_float(x[i] - largest);
    for (; i % LANES; i++) out[i] = 0;
    floats sums = {0};
    for (i = 0; i < count; i += LANES) sums += load(out + i);
    return total(sums);
}

typedef struct {
    const void *keys, *values;  /* (blocks, D, 16) and (16 · blocks, D) */
    int64_t type;  /* FLOAT32 or BFLOAT16 */
    const float *bias;  /* is read backwards: by distance; NULL: none */
    int64_t skipped, count, more;  /* keys before the first that are seen, those up to the last; more for each further query */
    float *scores;  /* scratch, (QUERIES, longest) */
    int64_t longest;
    float *part;  /* scratch, (16, D) */
    const void *next;  /* keys that are read after this: they are fetched meanwhile */
} Attended;

/* The row `at` of keys or values, which has `bytes`. */
INLINE const void *row_of(const void *cache, int64_t bytes, int64_t at) { return (const char *)cache + at * bytes; }

/* The rows `from` to `to` of keys or values, as numbers of `type`: their own memory, or of at most 16 copies in `part`. */
INLINE const void *rows_of(const void *cache, int64_t stored, int64_t type, int64_t from, int64_t to, int64_t size, float *part) {
    if (stored == type) return row_of(cache, size * (type == FLOAT32 ? 4 : 2), from);
    int64_t i = 0, all = (to - from) * size;
    for (; i + LANES <= all; i += LANES) *(floats *)(part + i) = cached(cache, stored, from * size + i);
    for (; i < all; i++) part[i] = cached_one(cache, stored, from * size + i);
    return part;
}

/* Fetches rows of keys or values. */
INLINE void fetch_rows(const void *cache, int64_t bytes, int64_t from, int64_t to) {
    for (int64_t i = from * bytes; i < to * bytes; i += 64) FETCH((const char *)cache + i);
}

/* Scores of S queries from `first` on, with the 16 keys of the block at key `at`. */
INLINE void score(const Model *model, Attended to, const float *query, int64_t stride, const void *keys, int64_t type,
                  int64_t first, int S, int64_t at) {
    floats dot[4];
    dots(query + first * stride, stride, keys, type, model->head_dim, S, dot);
    UNROLL for (int s = 0; s < S; s++)
        *(floats *)(to.scores + (first + s) * to.longest + at) = dot[s] * model->attention_scale;
}

/* out = softmax(query · keys · scale + bias) values of each of `queries` queries, (queries, D), by numbers of `type`.
   Keys and values are read in parts for all queries: these stay in the cache of the processor. */
INLINE void attend_as(int64_t type, const Model *model, Attended to, const float *query, int64_t query_stride, int64_t queries,
                      float *out, int64_t stride) {
    int64_t size = model->head_dim, longest = to.longest, all = to.count + (queries - 1) * to.more;
    int64_t bytes = size * (to.type == FLOAT32 ? 4 : 2), each = size * (type == FLOAT32 ? 4 : 2);
    int64_t step = to.type == type ? PART : LANES;
    float sums[QUERIES];
    for (int64_t i = 0; i < all; i += LANES) {
        const void *keys = rows_of(to.keys, to.type, type, i, i + LANES, size, to.part);
        fetch_rows(to.values, bytes, i, i + LANES < all ? i + LANES : all);
        int64_t s = to.count > i || !to.more ? 0 : (i - to.count) / to.more + 1;  /* the first query that sees one of them */
        for (; s + 4 <= queries; s += 4) score(model, to, query, query_stride, keys, type, s, 4, i);
        for (; s < queries; s++) score(model, to, query, query_stride, keys, type, s, 1, i);
    }
    for (int64_t s = 0; s < queries; s++) {
        int64_t count = to.count + s * to.more;
        float *scores = to.scores + s * longest;
        if (to.bias) for (int64_t i = 0; i < count; i++) scores[i] += to.bias[count - 1 - i];
        for (int64_t i = 0; i < to.skipped; i++) scores[i] = -INFINITY;
        sums[s] = exponentials(scores, count, largest_number(scores, count), scores);
        memset(out + s * stride, 0, size * sizeof *out);
    }
    for (int64_t i = 0; i < all; i += step) {
        int64_t s = 0, end = i + step < to.count ? i + step : to.count, last_row = i + step < all ? i + step : all;
        const void *values = rows_of(to.values, to.type, type, i, last_row, size, to.part);
        if (to.next) fetch_rows(to.next, bytes, i, last_row);
        if (end > i)
            for (; s + 4 <= queries; s += 4)
                add_values(to.scores + s * longest + i, longest, values, type, end - i, size, 4, out + s * stride, stride);
        for (int64_t q = 0; q < queries; q++) {  /* what the others do not see */
            int64_t begin = q < s ? end : i, last = to.count + q * to.more;
            if (last > i + step) last = i + step;
            if (begin < i) begin = i;
            if (last > begin)
                add_values(to.scores + q * longest + begin, longest, row_of(values, each, begin - i), type, last - begin, size, 1,
                           out + q * stride, stride);
        }
    }
    for (int64_t s = 0; s < queries; s++)
        for (int64_t i = 0; i < size; i++) out[s * stride + i] /= sums[s];
}

/* Few queries read numbers as the cache has them; for many these are converted once. */
ONCE void attend(const Model *model, Attended to, const float *query, int64_t query_stride, int64_t queries, float *out,
                 int64_t stride) {
    if (to.type == BFLOAT16 && queries < 3) attend_as(BFLOAT16, model, to, query, query_stride, queries, out, stride);
    else attend_as(FLOAT32, model, to, query, query_stride, queries, out, stride);
}

/* Element `at` of a cache. */
INLINE void *cache_at(const Model *model, const void *cache, int64_t at) {
    return (char *)cache + at * (model->cache_type == FLOAT32 ? 4 : 2);
}

/* Stores a head's numbers, in a cache from its element `at` on, with a distance of `step`. */
INLINE void store_head(const Model *model, void *cache, int64_t at, int64_t step, const float *head) {
    int64_t size = model->head_dim;
    if (model->cache_type == FLOAT32) for (int64_t i = 0; i < size; i++) ((float *)cache)[at + i * step] = head[i];
    else for (int64_t i = 0; i < size; i++) ((uint16_t *)cache)[at + i * step] = store_bfloat16(head[i]);
}

/* The keys and values of this thread's (head, row) pairs, into the cache. */
static void cache_share(const Model *model, const Layer *layer, const Call *call) {
    int64_t from, to, size = model->head_dim, heads = model->key_heads;
    share(call->rows * heads, 1, &from, &to);
    for (int64_t i = from; i < to; i++) {
        int64_t head = i / call->rows, row = i % call->rows, position = call->position[row];
        float *key = call->key + (row * heads + head) * size, *value = call->value + (row * heads + head) * size;
        prepare_head(model, layer, call, row, key, layer->key_norm);
        int64_t at = (call->slot[row] * heads + head) * model->capacity * size, within = position % LANES;
        store_head(model, layer->keys, at + (position - within) * size + within, LANES, key);
        store_head(model, layer->values, at + position * size, 1, value);
    }
}

/* Rows from `row` on, up to `end`, whose queries can be attended together: of one sequence, or of one source. */
INLINE int64_t run_of(const Layer *layer, const Call *call, int cross, int64_t row, int64_t end) {
    const int64_t *slot = call->slot, *position = call->position, *source = call->source;
    int64_t next = row + 1;
    if (cross) while (next < end && source[next] == source[row]) next++;
    else if (layer->window && position[row] + QUERIES > layer->window) return 1;  /* the keys of each begin elsewhere */
    else while (next < end && slot[next] == slot[row] && position[next] == position[next - 1] + 1) next++;
    return next - row;
}

/* The keys and values that the query of a row sees, and the queries of the rows after it in a run. */
INLINE Attended seen_by(const Model *model, const Layer *layer, const Call *call, int cross, int64_t row, int64_t head) {
    int64_t size = model->head_dim, heads = model->key_heads, key_head = head / (model->heads / heads);
    float *scores = call->scores + THREAD * QUERIES * call->longest, *part = call->part + THREAD * LANES * size;
    if (cross) {
        int64_t at = (call->source[row] * heads + key_head) * model->cross_capacity * size;
        Attended to = {layer->cross_keys + at, layer->cross_values + at, FLOAT32, 0, 0, call->source_length[row], 0, scores,
                       call->longest, part, 0};
        return to;
    }
    int64_t position = call->position[row], skipped = 0;
    if (layer->window && position >= layer->window) skipped = position - layer->window + 1;
    int64_t first = skipped / LANES * LANES;  /* where a block of keys begins */
    int64_t at = ((call->slot[row] * heads + key_head) * model->capacity + first) * size;
    Attended to = {cache_at(model, layer->keys, at), cache_at(model, layer->values, at), model->cache_type,
                   model->relative ? model->relative + head * model->capacity : 0, skipped - first,
                   position + 1 - first, 1, scores, call->longest, part, 0};
    return to;
}

/* call->mixed of this thread's rows and heads: attention to the cache, or with `cross` to the encoder's output. */
static void attention_share(const Model *model, const Layer *layer, const Call *call, int cross) {
    int64_t size = model->head_dim, heads = model->heads, step = call->rows * heads / (THREADS * 8);
    step = step < 1 ? 1 : step > QUERIES ? QUERIES : step;  /* rows that a thread takes at once, of one head */
    int64_t parts = (call->rows + step - 1) / step * heads;
    for (int64_t i = THREAD; i < parts; i += THREADS) {
        int64_t following = i + THREADS < parts ? i + THREADS : i;
        const void *next = seen_by(model, layer, call, cross, following / heads * step, following % heads).keys;
        int64_t row = i / heads * step, end = row + step < call->rows ? row + step : call->rows, head = i % heads, count;
        for (; row < end; row += count) {
            float *query = call->query.data + row * call->query.stride + head * size;
            count = run_of(layer, call, cross, row, end);
            for (int64_t s = 0; s < count; s++) {
                float *each = query + s * call->query.stride;
                if (!cross) prepare_head(model, layer, call, row + s, each, layer->query_norm);
                else if (layer->cross_query_norm.weight) normalize(each, layer->cross_query_norm, each, size, model->eps, 1);
            }
            Attended to = seen_by(model, layer, call, cross, row, head);
            to.next = next;
            attend(model, to, query, call->query.stride, count, call->mixed.data + row * call->mixed.stride + head * size,
                   call->mixed.stride);
        }
    }
}

/* call->mixed as the products with `matrix` read it. */
static void pack_share(const Matrix *matrix, const Call *call) {
    if (matrix->type == FLOAT32) return;
    int64_t from, to;
    share(call->rows, 1, &from, &to);
    for (int64_t row = from; row < to; row++) pack(matrix, call->mixed, row, 0, matrix->inputs);
    BARRIER
}

/* call->mixed = attention(normed), in the type of the products */
static void attention_heads(const Model *model, const Layer *layer, const Call *call) {
    int64_t key_width = model->key_heads * model->head_dim;
    product_share(&layer->query, call->normed, call->rows, call->query.data, call->query.stride, 0);
    product_share(&layer->key, call->normed, call->rows, call->key, key_width, 0);
    product_share(&layer->value, call->normed, call->rows, call->value, key_width, 0);
    BARRIER
    cache_share(model, layer, call);
    BARRIER
    attention_share(model, layer, call, 0);
    BARRIER
    pack_share(&layer->output, call);
}

/* x += y weightᵀ + bias, or norm(that). Nothing reads call->normed any more: it takes what is normed, by columns first,
   then by rows. */
static void add_product(const Model *model, const Call *call, const Matrix *matrix, Rows y, Norm norm) {
    int64_t from, to, size = model->hidden, stride = call->normed.stride;
    if (!norm.weight) {
        product_share(matrix, y, call->rows, call->x, size, 1);
        return;
    }
    product_share(matrix, y, call->rows, call->normed.data, stride, 0);
    BARRIER
    share(call->rows, 1, &from, &to);
    for (int64_t row = from; row < to; row++) {
        float *x = call->x + row * size, *update = call->normed.data + row * stride;
        normalize(update, norm, update, size, model->eps, model->rms);
        for (int64_t i = 0; i < size; i++) x[i] += update[i];
    }
}

/* x += output(attention(normed)), or norm(that) */
static void attention_sublayer(const Model *model, const Layer *layer, const Call *call, Norm norm) {
    attention_heads(model, layer, call);
    add_product(model, call, &layer->output, call->mixed, norm);
}

/* x += cross_output(attention from normed to the encoder's output) */
static void cross_sublayer(const Model *model, const Layer *layer, const Call *call) {
    product_share(&layer->cross_query, call->normed, call->rows, call->query.data, call->query.stride, 0);
    BARRIER
    attention_share(model, layer, call, 1);
    BARRIER
    pack_share(&layer->cross_output, call);
    product_share(&layer->cross_output, call->mixed, call->rows, call->x, model->hidden, 1);
}

/* call->inner = act(up(normed)), or gated: act(gate(normed)) · up(normed); in the type of the products */
static void mlp_inner(const Model *model, const Layer *layer, const Call *call) {
    int64_t from, to, stride = call->inner.stride;
    float *inner = call->inner.data, *gate = inner + call->rows * stride;  /* the gate's rows follow */
    share(layer->up.outputs, STEP, &from, &to);
    product(&layer->up, call->normed, call->rows, inner, stride, from, to, 0);
    if (layer->gate.weight) product(&layer->gate, call->normed, call->rows, gate, stride, from, to, 0);
    for (int64_t row = 0; row < call->rows; row++) {
        float *up = inner + row * stride, *gated = gate + row * stride;
        if (layer->gate.weight) {
            activate(model->activation, gated + from, to - from);
            for (int64_t i = from; i < to; i++) up[i] *= gated[i];
        } else activate(model->activation, up + from, to - from);
        pack(&layer->down, call->inner, row, from, to);
    }
    BARRIER
}

/* x += down(inner), or norm(that) */
static void mlp_sublayer(const Model *model, const Layer *layer, const Call *call, Norm norm) {
    mlp_inner(model, layer, call);
    add_product(model, call, &layer->down, call->inner, norm);
}

/* ------------------------------------------------------------------------------------------------- whole layers */

/* x + f(norm(x)), or x + norm(f(norm(x))) */
static void pre_norm_layer(const Model *model, const Layer *layer, const Call *call) {
    norm_share(model, call, layer->attention_norm, &layer->query);
    BARRIER
    attention_sublayer(model, layer, call, layer->attention_out_norm);
    BARRIER
    if (layer->cross_query.weight) {
        norm_share(model, call, layer->cross_norm, &layer->cross_query);
        BARRIER
        cross_sublayer(model, layer, call);
        BARRIER
    }
    norm_share(model, call, layer->mlp_norm, &layer->up);
    BARRIER
    mlp_sublayer(model, layer, call, layer->mlp_out_norm);
    BARRIER
}

/* norm(x + f(x)) in place of x + f(norm(x)) */
static void post_norm_layer(const Model *model, const Layer *layer, const Call *call) {
    Norm none = {0, 0};
    norm_share(model, call, none, &layer->query);
    BARRIER
    attention_sublayer(model, layer, call, none);
    BARRIER
    renormalize_share(model, call, layer->attention_norm);
    norm_share(model, call, none, layer->cross_query.weight ? &layer->cross_query : &layer->up);
    BARRIER
    if (layer->cross_query.weight) {
        cross_sublayer(model, layer, call);
        BARRIER
        renormalize_share(model, call, layer->cross_norm);
        norm_share(model, call, none, &layer->up);
        BARRIER
    }
    mlp_sublayer(model, layer, call, none);
    BARRIER
    renormalize_share(model, call, layer->mlp_norm);
    BARRIER
}

/* x + attention(norm(x)) + mlp(norm(x)): both read the same x. */
static void parallel_layer(const Model *model, const Layer *layer, const Call *call) {
    norm_share(model, call, layer->attention_norm, &layer->query);
    BARRIER
    attention_heads(model, layer, call);
    norm_share(model, call, layer->mlp_norm, &layer->up);
    BARRIER
    mlp_inner(model, layer, call);
    product_share(&layer->output, call->mixed, call->rows, call->x, model->hidden, 1);
    product_share(&layer->down, call->inner, call->rows, call->x, model->hidden, 1);
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
        pack(&model->head, call->normed, i, 0, size);
    }
    BARRIER
    product_share(&model->head, call->normed, call->logit_rows, call->logits, model->vocabulary, 0);
}

void decode_step(const Model *model, const Call *call, int64_t threads) {
    amx_usable();  /* asks once, before there are threads */
    PARALLEL {
        amx_begin();
        for (int64_t i = 0; i < model->layers; i++) {
            const Layer *layer = model->layer + i;
            if (model->parallel) parallel_layer(model, layer, call);
            else if (model->post_norm) post_norm_layer(model, layer, call);
            else pre_norm_layer(model, layer, call);
        }
        if (call->logit_rows) head_share(model, call);
        amx_end();
    }
}

/* ------------------------------------------------------------------------------------------------- log-sums of rows */

/* log Σ e^x; NaN or infinite if a number is NaN or +∞, or all are -∞. */
static double log_sum(const float *x, int64_t size) {
    float largest = largest_number(x, size), powers[64 * LANES];
    double all = 0;
    for (int64_t i = 0; i < size; i += 64 * LANES)  /* few numbers are added in float32, their sums in float64 */
        all += exponentials(x + i, size - i < 64 * LANES ? size - i : 64 * LANES, largest, powers);
    return largest + log(all);
}

/* out[r] = log Σ e^x of each row of x, (rows, size). */
void log_sums(const float *x, int64_t rows, int64_t size, double *out, int64_t threads) {
    PARALLEL {
        int64_t from, to;
        share(rows, 1, &from, &to);
        for (int64_t row = from; row < to; row++) out[row] = log_sum(x + row * size, size);
    }
}

/* ------------------------------------------------------------------------------------------ largest numbers of rows */

INLINE int is_above(float a, float b) { return a > b || (a != a && b == b); }  /* NaN is above all others */

/* False if none of 64 numbers is above `bound`. */
INLINE int some_above(const float *x, float bound) {
    integers above = {0};
    int32_t some = 0;
    for (int i = 0; i < 4; i++) above |= (load(x + LANES * i) > bound) | (load(x + LANES * i) != load(x + LANES * i));
    for (int k = 0; k < LANES; k++) some |= above[k];
    return some;
}

/* The indices of the `count` largest numbers of x, in descending order; of equal ones the first. */
static void largest(const float *x, int64_t size, int64_t count, int64_t *out) {
    int64_t filled = 0, step = 4 * LANES;
    for (int64_t from = 0; from < size; from += step) {
        int64_t to = from + step < size ? from + step : size;
        if (filled == count && to - from == step && !some_above(x + from, x[out[count - 1]])) continue;
        for (int64_t i = from; i < to; i++) {
            if (filled == count && !is_above(x[i], x[out[count - 1]])) continue;
            int64_t at = filled < count ? filled++ : count - 1;
            for (; at && is_above(x[i], x[out[at - 1]]); at--) out[at] = out[at - 1];
            out[at] = i;
        }
    }
}

/* out[r] = the columns of the `count` largest numbers of each row of x, (rows, size). */
void largest_columns(const float *x, int64_t rows, int64_t size, int64_t count, int64_t *out, int64_t threads) {
    PARALLEL {
        int64_t from, to;
        share(rows, 1, &from, &to);
        for (int64_t row = from; row < to; row++) largest(x + row * size, size, count, out + row * count);
    }
}

/* ------------------------------------------------------------------------------------------------------- numbers */

/* y = x in bfloat16. */
void round_to_bfloat16(const float *x, uint16_t *y, int64_t size, int64_t threads) {
    PARALLEL {
        int64_t from, to;
        share(size, ALIGN, &from, &to);
        for (int64_t i = from; i < to; i++) y[i] = store_bfloat16(x[i]);
    }
}

/* Reads `bytes` of memory once with all threads, to measure how fast that is; a value that depends on all of them. */
uint32_t read_memory(const uint32_t *data, int64_t bytes, int64_t threads) {
    uint32_t result = 0;
    PARALLEL {
        int64_t from, to;
        share(bytes / 4, 4 * LANES, &from, &to);
        words sum[4] = {0};
        for (int64_t i = from; i + 4 * LANES <= to; i += 4 * LANES)
            UNROLL for (int k = 0; k < 4; k++) sum[k] ^= *(const words *)(data + i + k * LANES);
        words all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
        for (int i = 0; i < LANES; i++) __atomic_fetch_xor(&result, all[i], __ATOMIC_RELAXED);
    }
    return result;
}
