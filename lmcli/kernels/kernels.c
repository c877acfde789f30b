/* The operations of a block between its matrix products, forward and backward, each in one pass over memory.

   build.py compiles this file when first needed; fused_block.py, causal_attention.py and fused_loss.py call it and say
   what each function computes. Arrays are contiguous. `T` is their type, `A` that of the arithmetic: float for bfloat16;
   double only checks gradients. Work is divided into `chunks` that do not depend on the number of threads, and sums over
   rows are kept per chunk, so results are the same to the bit in every run. The compiler vectorizes the inner loops.

   S positions of a row, H query and K key-value heads, D size of a head (even, at most BUFFER), F size inside the MLP. */

#ifndef T
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <tgmath.h>
#include "numbers.h"
#ifndef _OPENMP
#include <dispatch/dispatch.h>
static long threads = 1;
void set_threads(long count) { threads = count; }
#endif

#define LANES 16
#define QUERIES 6  /* the sums of a tile, ACROSS vectors for each query, fill the registers */
#if defined(__AVX512F__)
#define VECTOR 64  /* bytes */
#define ACROSS 4
#elif defined(__AVX__)
#define VECTOR 32
#define ACROSS 2
#else
#define VECTOR 16
#define ACROSS 4
#endif
#define UNROLL _Pragma("GCC unroll 8")
typedef float vector_float __attribute__((vector_size(VECTOR), aligned(4)));
typedef double vector_double __attribute__((vector_size(VECTOR), aligned(8)));
#define BUFFER 1024  /* numbers of a row on the stack between two loops; WIDEST_HEAD of build.py */
#define INLINE static inline __attribute__((always_inline))  /* loops over a known size need no remainder */
typedef uint16_t bfloat16;

static inline float load_float(float x) { return x; }
static inline float store_float(float x) { return x; }
static inline double load_double(double x) { return x; }
static inline double store_double(double x) { return x; }

static inline uint32_t hash(uint32_t x) {  /* Wellons' lowbias32: every bit of x changes half of the bits */
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

static inline double exponential_double(double x) { return exp(x); }

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(function) PASTE(function, T)
#define IN const T *restrict
#define OUT T *restrict
#define WEIGHTS const A *restrict
#define SUMS A *restrict
#define LOAD PASTE(load, T)
#define STORE PASTE(store, T)
#define EXP PASTE(exponential, A)
#ifdef _OPENMP
#define FOR_CHUNKS _Pragma("omp parallel for schedule(static)") for (long chunk = 0; chunk < chunks; chunk++)
#define END_CHUNKS
#else  /* macOS: its compiler has no OpenMP */
#define FOR_CHUNKS dispatch_apply((size_t)threads, dispatch_get_global_queue(QOS_CLASS_USER_INITIATED, 0), ^(size_t part) { \
    for (long chunk = chunks * (long)part / threads; chunk < chunks * ((long)part + 1) / threads; chunk++)
#define END_CHUNKS });
#endif
#define FOR_ROWS(rows) for (long row = (rows) * chunk / chunks; row < (rows) * (chunk + 1) / chunks; row++)

#define A float
#define T float
#include "kernels.c"
#undef T
#define T bfloat16
#include "kernels.c"
#undef T
#undef A
#define A double
#define T double
#include "kernels.c"
#else

static A NAME(largest)(IN x, long size) {
    A lanes[LANES], most = -INFINITY;
    for (int l = 0; l < LANES; l++) lanes[l] = -INFINITY;
    long i = 0;
    for (; i + LANES <= size; i += LANES)
        for (int l = 0; l < LANES; l++) { A v = LOAD(x[i + l]); lanes[l] = v > lanes[l] ? v : lanes[l]; }
    for (; i < size; i++) { A v = LOAD(x[i]); most = v > most ? v : most; }
    for (int l = 0; l < LANES; l++) most = lanes[l] > most ? lanes[l] : most;
    return most;
}

INLINE A NAME(inverse_rms)(IN x, long size, A eps) {
    A sum = 0;
    for (long i = 0; i < size; i++) { A v = LOAD(x[i]); sum += v * v; }
    return 1 / sqrt(sum / size + eps);
}

/* y = x / rms(x) * weight */
void NAME(rms_norm)(IN x, WEIGHTS weight, OUT y, long rows, long size, A eps, long chunks) {
    FOR_CHUNKS FOR_ROWS(rows) {
        IN in = x + row * size;
        OUT out = y + row * size;
        A r = NAME(inverse_rms)(in, size, eps);
        for (long i = 0; i < size; i++) out[i] = STORE(LOAD(in[i]) * r * weight[i]);
    } END_CHUNKS
}

/* dx = residual (may be NULL) + the gradient through the norm; dweight (chunks, size) are the sums of each chunk. */
void NAME(rms_norm_backward)(IN x, WEIGHTS weight, IN dy, IN residual, OUT dx, SUMS dweight, long rows, long size, A eps,
                             long chunks) {
    FOR_CHUNKS {
        SUMS sums = dweight + chunk * size;
        FOR_ROWS(rows) {
            IN in = x + row * size, *d = dy + row * size, *also = residual ? residual + row * size : in;
            OUT out = dx + row * size;
            A r = NAME(inverse_rms)(in, size, eps), dot = 0, base = residual ? 1 : 0;
            for (long i = 0; i < size; i++) dot += LOAD(d[i]) * weight[i] * LOAD(in[i]);
            dot *= r * r / size;
            for (long i = 0; i < size; i++) {
                A v = LOAD(in[i]), g = LOAD(d[i]);
                sums[i] += g * v * r;
                out[i] = STORE(base * LOAD(also[i]) + r * (g * weight[i] - v * dot));
            }
        }
    } END_CHUNKS
}

/* `value` is x sigmoid(x ...); so far from 0 that powers of x may be infinite, its limit: 0 or x. Minus infinity gives
   NaN. */
INLINE A NAME(bounded)(A x, A value) { return x < -10000 ? x * 0 : x > 10000 ? x : value; }

/* out = act(gate) * up, of rows [gate, up]; act(x) = x sigmoid(x (a + b x^2)): SiLU, and GELU by its tanh formula */
void NAME(gated)(IN gate_up, OUT out, long rows, long F, A a, A b, long chunks) {
    FOR_CHUNKS FOR_ROWS(rows) {
        IN gate = gate_up + row * 2 * F, *up = gate + F;
        OUT y = out + row * F;
        for (long i = 0; i < F; i++) {
            A g = LOAD(gate[i]);
            y[i] = STORE(NAME(bounded)(g, g / (1 + EXP(-g * (a + b * g * g)))) * LOAD(up[i]));
        }
    } END_CHUNKS
}

/* As gated_row, for numbers so far from 0 that the sigmoid is 0 or 1. Not inline: they are rare. */
static __attribute__((noinline)) void NAME(gated_far)(IN gate, IN up, IN dy, OUT y, OUT dgate, OUT dup, long F) {
    for (long i = 0; i < F; i++) {
        A g = LOAD(gate[i]), u = LOAD(up[i]), d = LOAD(dy[i]), s = g > 0 ? 1 : 0;
        if (!(g < -10000 || g > 10000)) continue;
        y[i] = STORE(g * s * u);
        dup[i] = STORE(d * (g * s));
        dgate[i] = STORE(d * u * s * (1 + g * 0));
    }
}

static void NAME(gated_row)(IN gate, IN up, IN dy, OUT y, OUT dgate, OUT dup, long F, A a, A b) {
    for (long i = 0; i < F; i++) {
        A g = LOAD(gate[i]), u = LOAD(up[i]), s = 1 / (1 + EXP(-g * (a + b * g * g))), d = LOAD(dy[i]);
        y[i] = STORE(g * s * u);
        dup[i] = STORE(d * g * s);
        dgate[i] = STORE(d * u * s * (1 + g * (1 - s) * (a + 3 * b * g * g)));
    }
    int far = 0;
    for (long i = 0; i < F; i++) { A g = LOAD(gate[i]); far |= (g < -10000) | (g > 10000); }
    if (far) NAME(gated_far)(gate, up, dy, y, dgate, dup, F);
}

/* The gradient, and the result of the forward pass again. */
void NAME(gated_backward)(IN gate_up, IN dy, OUT dgate_up, OUT y, long rows, long F, A a, A b, long chunks) {
    FOR_CHUNKS FOR_ROWS(rows) {
        long at = row * 2 * F;
        NAME(gated_row)(gate_up + at, gate_up + at + F, dy + row * F, y + row * F, dgate_up + at, dgate_up + at + F, F,
                        a, b);
    } END_CHUNKS
}

/* y = residual + dropout(x): numbers whose hash is below `threshold` times scale, else 0. residual may be NULL. */
void NAME(dropout)(IN x, IN residual, OUT y, long rows, long size, long seed, long threshold, A scale, long chunks) {
    FOR_CHUNKS FOR_ROWS(rows) {
        uint32_t first = hash((uint32_t)seed ^ hash((uint32_t)row + 0x9e3779b9u));
        IN in = x + row * size, *also = residual ? residual + row * size : in;
        OUT out = y + row * size;
        A base = residual ? 1 : 0;
        for (long i = 0; i < size; i++)
            out[i] = STORE(base * LOAD(also[i]) +
                           (hash(first + (uint32_t)i) < (uint32_t)threshold ? LOAD(in[i]) * scale : 0));
    } END_CHUNKS
}

/* One head of one position, normalized (unless weight is NULL) and rotated by the angles of its position. */
INLINE void NAME(rotate_sized)(IN x, WEIGHTS weight, WEIGHTS cos, WEIGHTS sin, OUT y, long D, A eps) {
    A r = weight ? NAME(inverse_rms)(x, D, eps) : 1;
    for (long i = 0; i < D / 2; i++) {
        A a = LOAD(x[i]) * r, b = LOAD(x[i + D / 2]) * r;
        if (weight) { a *= weight[i]; b *= weight[i + D / 2]; }
        y[i] = STORE(a * cos[i] - b * sin[i]);
        y[i + D / 2] = STORE(b * cos[i] + a * sin[i]);
    }
}

INLINE void NAME(rotate_back_sized)(IN x, WEIGHTS weight, WEIGHTS cos, WEIGHTS sin, IN dy, OUT dx,
                                SUMS dweight, long D, A eps) {
    A r = weight ? NAME(inverse_rms)(x, D, eps) : 1, dot = 0;
    A d[BUFFER];  /* the gradient before the rotation */
    for (long i = 0; i < D / 2; i++) {
        A a = LOAD(dy[i]), b = LOAD(dy[i + D / 2]);
        d[i] = a * cos[i] + b * sin[i];
        d[i + D / 2] = b * cos[i] - a * sin[i];
    }
    if (!weight) {
        for (long i = 0; i < D; i++) dx[i] = STORE(d[i]);
        return;
    }
    for (long i = 0; i < D; i++) dot += d[i] * weight[i] * LOAD(x[i]);
    dot *= r * r / D;
    for (long i = 0; i < D; i++) {
        A v = LOAD(x[i]);
        dweight[i] += d[i] * v * r;
        dx[i] = STORE(r * (d[i] * weight[i] - v * dot));
    }
}

static void NAME(rotate)(IN x, WEIGHTS weight, WEIGHTS cos, WEIGHTS sin, OUT y, long D, A eps) {
    if (D == 32) NAME(rotate_sized)(x, weight, cos, sin, y, 32, eps);
    else if (D == 64) NAME(rotate_sized)(x, weight, cos, sin, y, 64, eps);
    else NAME(rotate_sized)(x, weight, cos, sin, y, D, eps);
}

static void NAME(rotate_backward)(IN x, WEIGHTS weight, WEIGHTS cos, WEIGHTS sin, IN dy, OUT dx, SUMS dweight,
                                  long D, A eps) {
    if (D == 32) NAME(rotate_back_sized)(x, weight, cos, sin, dy, dx, dweight, 32, eps);
    else if (D == 64) NAME(rotate_back_sized)(x, weight, cos, sin, dy, dx, dweight, 64, eps);
    else NAME(rotate_back_sized)(x, weight, cos, sin, dy, dx, dweight, D, eps);
}

/* x -> GELU(x) by its tanh formula, in place: x / 2 (1 + tanh(u)) = x / (1 + e^-2u) */
void NAME(gelu_tanh)(OUT values, long rows, long size, long chunks) {
    FOR_CHUNKS FOR_ROWS(rows) {
        OUT x = values + row * size;
        for (long i = 0; i < size; i++) {
            A v = LOAD(x[i]);
            x[i] = STORE(NAME(bounded)(v, v / (1 + EXP((A)-1.5957691216057308 * v * (1 + (A)0.044715 * v * v)))));
        }
    } END_CHUNKS
}

/* Rows of H + 2K heads, [queries, keys, values], of `rows` x S positions -> query (rows, H, S, D), key and value
   (rows, K, S, D) */
void NAME(split_heads)(IN qkv, WEIGHTS cos, WEIGHTS sin, WEIGHTS query_weight, WEIGHTS key_weight,
                       OUT query, OUT key, OUT value, long rows, long S, long H, long K, long D, A eps, long chunks) {
    FOR_CHUNKS FOR_ROWS(rows * S) {
        long b = row / S, t = row % S;
        IN x = qkv + row * (H + 2 * K) * D;
        WEIGHTS c = cos + t * (D / 2), *s = sin + t * (D / 2);
        for (long h = 0; h < H; h++) NAME(rotate)(x + h * D, query_weight, c, s, query + ((b * H + h) * S + t) * D, D, eps);
        x += H * D;
        for (long h = 0; h < K; h++) NAME(rotate)(x + h * D, key_weight, c, s, key + ((b * K + h) * S + t) * D, D, eps);
        x += K * D;
        for (long h = 0; h < K; h++) memcpy(value + ((b * K + h) * S + t) * D, x + h * D, D * sizeof(T));
    } END_CHUNKS
}

/* dweights (chunks, 2, D): the sums of each chunk for the norms of queries and keys */
void NAME(split_heads_backward)(IN qkv, WEIGHTS cos, WEIGHTS sin, WEIGHTS query_weight,
                                WEIGHTS key_weight, IN dquery, IN dkey, IN dvalue, OUT dqkv,
                                SUMS dweights, long rows, long S, long H, long K, long D, A eps, long chunks) {
    FOR_CHUNKS FOR_ROWS(rows * S) {
        long b = row / S, t = row % S, at = row * (H + 2 * K) * D;
        WEIGHTS c = cos + t * (D / 2), *s = sin + t * (D / 2);
        SUMS sums = dweights + chunk * 2 * D;
        for (long h = 0; h < H; h++, at += D)
            NAME(rotate_backward)(qkv + at, query_weight, c, s, dquery + ((b * H + h) * S + t) * D, dqkv + at, sums, D, eps);
        for (long h = 0; h < K; h++, at += D)
            NAME(rotate_backward)(qkv + at, key_weight, c, s, dkey + ((b * K + h) * S + t) * D, dqkv + at, sums + D, D, eps);
        for (long h = 0; h < K; h++, at += D) memcpy(dqkv + at, dvalue + ((b * K + h) * S + t) * D, D * sizeof(T));
    } END_CHUNKS
}

/* (rows, H, S, D) -> (rows, S, H, D), or with H and S exchanged, back */
void NAME(join_heads)(IN x, OUT y, long rows, long S, long H, long D, long chunks) {
    FOR_CHUNKS FOR_ROWS(rows * S) {
        long b = row / S, t = row % S;
        for (long h = 0; h < H; h++) memcpy(y + (row * H + h) * D, x + ((b * H + h) * S + t) * D, D * sizeof(T));
    } END_CHUNKS
}

/* Scores (matrices, queries, keys) -> weights, in place: row t of a matrix sees keys 0 to first + t, but none before its
   document_start, if given: an array of `length` positions for each group of H matrices. */
void NAME(causal_softmax)(OUT scores, const int64_t *document_start, long matrices, long queries, long keys, long first,
                          long H, long length, A scale, long chunks) {
    FOR_CHUNKS FOR_ROWS(matrices * queries) {
        long last = first + row % queries + 1;
        long begin = document_start ? document_start[row / queries / H * length + last - 1] : 0;
        long seen = last - begin;
        OUT x = scores + row * keys + begin;
        A most = NAME(largest)(x, seen), sum = 0;
        A e[BUFFER];
        for (long from = 0; from < seen; from += BUFFER) {  /* in pieces: a row of any length */
            long size = seen - from < BUFFER ? seen - from : BUFFER;
            for (long i = 0; i < size; i++) { e[i] = EXP((LOAD(x[from + i]) - most) * scale); sum += e[i]; }
            if (seen > BUFFER) for (long i = 0; i < size; i++) x[from + i] = STORE(e[i]);
        }
        A r = 1 / sum;
        if (seen > BUFFER) for (long i = 0; i < seen; i++) x[i] = STORE(LOAD(x[i]) * r);
        else for (long i = 0; i < seen; i++) x[i] = STORE(e[i] * r);
        memset(x - begin, 0, begin * sizeof(T));
        memset(x + seen, 0, (keys - last) * sizeof(T));
    } END_CHUNKS
}

/* The gradient of the scores, from weights and their gradient, which it overwrites. */
void NAME(causal_softmax_backward)(IN weights, OUT dweights, long matrices, long queries, long keys, long first,
                                   A scale, long chunks) {
    FOR_CHUNKS FOR_ROWS(matrices * queries) {
        IN p = weights + row * keys;
        OUT d = dweights + row * keys;
        long seen = first + row % queries + 1;
        A dot = 0;
        for (long i = 0; i < seen; i++) dot += LOAD(p[i]) * LOAD(d[i]);
        for (long i = 0; i < seen; i++) d[i] = STORE(LOAD(p[i]) * (LOAD(d[i]) - dot) * scale);
        memset(d + seen, 0, (keys - seen) * sizeof(T));
    } END_CHUNKS
}

#define WIDTH (VECTOR / (long)sizeof(A))
#define WHOLE(size) (((size) + WIDTH - 1) / WIDTH * WIDTH)

/* c (QUERIES x across vectors) = a (QUERIES x depth) times b (depth x across vectors); x_row is the distance of rows of x */
INLINE void NAME(tile)(const A *a, long a_row, const A *b, long b_row, A *c, long c_row, long depth, int across) {
    PASTE(vector, A) sums[QUERIES][ACROSS];
    UNROLL for (int q = 0; q < QUERIES; q++)
        UNROLL for (int v = 0; v < across; v++) sums[q][v] = (PASTE(vector, A)){0};
    for (long k = 0; k < depth; k++)
        UNROLL for (int v = 0; v < across; v++) {
            PASTE(vector, A) column = *(const PASTE(vector, A) *)(b + k * b_row + v * WIDTH);
            UNROLL for (int q = 0; q < QUERIES; q++) sums[q][v] += a[q * a_row + k] * column;
        }
    UNROLL for (int q = 0; q < QUERIES; q++)
        UNROLL for (int v = 0; v < across; v++) *(PASTE(vector, A) *)(c + q * c_row + v * WIDTH) = sums[q][v];
}

/* The same for `columns`, a multiple of WIDTH. */
static void NAME(product)(const A *a, long a_row, const A *b, long b_row, A *c, long c_row, long depth, long columns) {
    long at = 0;
    for (; at + ACROSS * WIDTH <= columns; at += ACROSS * WIDTH)
        NAME(tile)(a, a_row, b + at, b_row, c + at, c_row, depth, ACROSS);
    for (; at < columns; at += WIDTH) NAME(tile)(a, a_row, b + at, b_row, c + at, c_row, depth, 1);
}

/* softmax(query keys^T scale) values of one head; `buffer` is working memory, `q`, `k`, `v`, `o` the distances of rows.
   Query t sees keys 0 to first + t. */
static void NAME(attend)(IN query, IN key, IN value, OUT mixed, long q, long k, long v, long o, long N, long S, long D,
                         A scale, A *buffer) {
    long across = WHOLE(S), wide = WHOLE(D), first = S - N;
    A *keys = buffer, *values = keys + D * across, *scaled = values + S * wide, *scores = scaled + QUERIES * D,
      *sums_of_values = scores + QUERIES * across;
    for (long s = 0; s < across; s++)
        for (long d = 0; d < D; d++) keys[d * across + s] = s < S ? LOAD(key[s * k + d]) : 0;
    for (long s = 0; s < S; s++)
        for (long d = 0; d < wide; d++) values[s * wide + d] = d < D ? LOAD(value[s * v + d]) : 0;
    for (long t = 0; t < N; t += QUERIES) {
        long rows = N - t < QUERIES ? N - t : QUERIES, end = first + t + rows;
        for (long r = 0; r < QUERIES; r++)
            for (long d = 0; d < D; d++) scaled[r * D + d] = r < rows ? LOAD(query[(t + r) * q + d]) * scale : 0;
        NAME(product)(scaled, D, keys, across, scores, across, D, WHOLE(end));
        A sums[QUERIES];
        for (long r = 0; r < QUERIES; r++) {
            A *x = scores + r * across, sum = 0;
            long visible = r < rows ? first + t + r + 1 : end;
            A most = PASTE(largest, A)(x, visible);
            for (long s = 0; s < visible; s++) { x[s] = EXP(x[s] - most); sum += x[s]; }
            for (long s = visible; s < end; s++) x[s] = 0;
            sums[r] = sum;
        }
        NAME(product)(scores, across, values, wide, sums_of_values, wide, end, wide);
        for (long r = 0; r < rows; r++)
            for (long d = 0; d < D; d++) mixed[(t + r) * o + d] = STORE(sums_of_values[r * wide + d] / sums[r]);
    }
}

/* Causal attention of the last N of S positions, without a backward pass. `strides` are the distances of rows, heads and
   positions in query, key, value and mixed. */
void NAME(attention)(IN query, IN key, IN value, OUT mixed, const int64_t *strides, long rows, long H, long K, long N,
                     long S, long D, A scale, long chunks) {
    FOR_CHUNKS {
        A *buffer = NULL;
        FOR_ROWS(rows * H) {
            long b = row / H, h = row % H, group = h / (H / K);
            if (!buffer) buffer = malloc(sizeof(A) * (D * WHOLE(S) + S * WHOLE(D) +
                                                  QUERIES * (D + WHOLE(S) + WHOLE(D))));
            NAME(attend)(query + b * strides[0] + h * strides[1], key + b * strides[3] + group * strides[4],
                         value + b * strides[6] + group * strides[7], mixed + b * strides[9] + h * strides[10],
                         strides[2], strides[5], strides[8], strides[11], N, S, D, scale, buffer);
        }
        free(buffer);
    } END_CHUNKS
}

/* losses[row] = -log p(target); logits become their gradient. A logit of minus infinity is an impossible token. */
void NAME(cross_entropy)(OUT logits, const int64_t *targets, SUMS losses, long rows, long size, long chunks) {
    FOR_CHUNKS FOR_ROWS(rows) {
        OUT x = logits + row * size;
        A most = NAME(largest)(x, size), sum = 0, target = LOAD(x[targets[row]]);
        /* relative to the largest: a logit of 1e4 would leave a float no digits for the loss */
        for (long i = 0; i < size; i++) sum += EXP(LOAD(x[i]) - most);
        A r = 1 / sum;
        losses[row] = log(sum) - (target - most);
        for (long i = 0; i < size; i++) x[i] = STORE(EXP(LOAD(x[i]) - most) * r);
        x[targets[row]] = STORE(EXP(target - most) * r - 1);
    } END_CHUNKS
}

/* The same, the loss mixed with the mean over all tokens, which is infinite if one is impossible. */
void NAME(smoothed_cross_entropy)(OUT logits, const int64_t *targets, SUMS losses, long rows, long size, A smoothing,
                                  long chunks) {
    FOR_CHUNKS FOR_ROWS(rows) {
        OUT x = logits + row * size;
        A most = NAME(largest)(x, size), sum = 0, total = 0, target = LOAD(x[targets[row]]);
        for (long i = 0; i < size; i++) { A v = LOAD(x[i]) - most; sum += EXP(v); total += v; }
        A r = 1 / sum, spread = smoothing / size;
        losses[row] = log(sum) - (1 - smoothing) * (target - most) - spread * total;
        for (long i = 0; i < size; i++) x[i] = STORE(EXP(LOAD(x[i]) - most) * r - spread);
        x[targets[row]] = STORE(EXP(target - most) * r - spread - (1 - smoothing));
    } END_CHUNKS
}

/* Adds logits of tokens first to first + size to the statistics (rows x 3): the largest logit so far, the sum of
   exponentials relative to it, and the logit of the target. */
void NAME(merge_logits)(IN logits, const int64_t *targets, SUMS statistics, long rows, long size, long first, long chunks) {
    FOR_CHUNKS FOR_ROWS(rows) {
        IN x = logits + row * size;
        SUMS known = statistics + row * 3;
        long target = targets[row] - first;
        A before = known[0], most = NAME(largest)(x, size), sum = 0;
        if (before > most) most = before;
        A from = most > -INFINITY ? most : 0;  /* impossible tokens add nothing, and NaN must be kept */
        for (long i = 0; i < size; i++) sum += EXP(LOAD(x[i]) - from);
        known[0] = most;
        known[1] = known[1] * EXP(before - from) + sum;
        if (target >= 0 && target < size) known[2] = LOAD(x[target]);
    } END_CHUNKS
}
#endif
