// One step of a stack of transformer blocks on a CPU, in one call; native.py builds this file and calls `step`.
//
// A step at small batch is bounded by reading the weights. Here they are read where they lie, once, in order, and ahead
// of their use; each is multiplied with several rows of the batch (TILE) while it is in a register.
// Weights are float32, bfloat16, or 8-bit numbers with a scale for each output; everything else is float32, but keys and
// values, which are stored as bfloat16 beside bfloat16 weights.
//
// A row's sums run over the same numbers in the same order whatever the batch and the number of threads, so its results
// depend on nothing but itself, bit for bit.
//
// Letters: B rows (sequences), C width, D head width, F feed-forward width, H query heads, G key heads, V entries.

#if !defined(__GNUC__) || defined(__clang__) || defined(__INTEL_COMPILER) || defined(__NVCOMPILER)
#error "needs GNU C++: the OpenMP of other compilers is a second one beside torch's, and some of those end the process"
#endif

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <omp.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

// --- what native.py hands over: keep its mirrors in step

struct Matrix {
    const void *weights;  // (outputs, inputs), row by row
    const float *scales;  // (outputs,), or null
};

struct Block {
    Matrix wqkv, wo, w1, w3, w2;
    const float *attention_norm, *ffn_norm, *q_norm, *k_norm;  // gains; the last two null where there are none
    void *keys, *values;  // see `attend`
};

struct Stack {
    int kind;  // of the weights: 0 float32, 1 bfloat16, 2 8-bit
    int blocks_count, C, F, H, G, D, length, V, threads;
    float eps;
    const Block *blocks;
    const float *norm;  // null where there is none
    Matrix output;  // null weights: the normed width is the result
    const float *bias;
};

namespace {

// --- vectors of as many floats as a register holds

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE = 8;
#elif defined(__AVX2__)
constexpr int LANES = 8, TILE = 4;
#else
constexpr int LANES = 4, TILE = 4;
#endif
constexpr int OUTPUTS = 3;  // of a tile of TILE rows: OUTPUTS * TILE sums and their factors fill the registers
constexpr int BLOCK = 48;  // outputs that all rows pass before the next: few enough for a cache; a multiple of OUTPUTS

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef float loose_vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t loose_halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef int8_t loose_bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

struct bfloat16 {
    uint16_t bits;
};

INLINE vec load(const float *p) { return *(const loose_vec *)p; }
INLINE void store(float *p, vec v) { *(loose_vec *)p = v; }

// Compilers split up the generic forms of what follows, so the common instruction sets are named.
#if defined(__AVX512F__)
INLINE vec load(const bfloat16 *p) {
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}
INLINE vec load(const int8_t *p) {
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
#elif defined(__AVX2__)
INLINE vec load(const bfloat16 *p) {
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
}
INLINE vec load(const int8_t *p) {
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
#else
INLINE vec load(const bfloat16 *p) { return (vec)(__builtin_convertvector(*(const loose_halves *)p, words) << 16); }
INLINE vec load(const int8_t *p) { return __builtin_convertvector(*(const loose_bytes *)p, vec); }
#endif

INLINE float widen(float x) { return x; }
INLINE float widen(int8_t x) { return x; }
INLINE float widen(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

INLINE void narrow(float x, float *p) { *p = x; }
INLINE void narrow(float x, bfloat16 *p) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    p->bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

#if defined(__AVX512F__)
INLINE float total(vec v) { return _mm512_reduce_add_ps((__m512)v); }
#elif defined(__AVX2__)
INLINE float total(vec v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#else
INLINE float total(vec v) { return (v[0] + v[1]) + (v[2] + v[3]); }
#endif

// e^x up to 3e-7 of it; 0 below -87, and e^88 above 88.
INLINE vec exponential(vec x) {
    const vec zero = {};
    vec inside = x < -87.f ? zero - 87.f : x > 88.f ? zero + 88.f : x;
    const float rounder = 12582912.f;  // 1.5 * 2^23: what is added to it and taken off again is a whole number
    vec whole = (inside * 1.44269504f + rounder) - rounder;
    vec rest = inside - whole * 0.693359375f + whole * 2.12194440e-4f;  // ln 2 in two parts
    vec series = zero + 1.f / 5040;
    const float factors[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f};
    UNROLL for (int i = 0; i < 7; i++) series = series * rest + factors[i];
    vec power = (vec)((__builtin_convertvector(whole, ints) + 127) << 23);
    return x < -87.f ? zero : series * power;
}

// --- products

// The dot products of `outputs` rows of w (., C) with `rows` rows of x (., C).
template <class W, int outputs, int rows>
void dots(const W *w, int C, const float *x, float found[][TILE]) {
    vec sum[outputs][rows] = {};
    int c = 0;
    for (; c + LANES <= C; c += LANES) {
        vec weights[outputs];
        UNROLL for (int n = 0; n < outputs; n++) {
            const W *here = w + (ptrdiff_t)n * C + c;
            weights[n] = load(here);
            __builtin_prefetch((const void *)((uintptr_t)here + (size_t)outputs * C * sizeof(W)));  // or past the end
        }
        UNROLL for (int b = 0; b < rows; b++) {
            vec in = load(x + b * C + c);
#if defined(__AVX512F__)
            asm("" : "+v"(in));  // in a register, not read again for each output
#endif
            UNROLL for (int n = 0; n < outputs; n++) sum[n][b] += weights[n] * in;
        }
    }
    UNROLL for (int n = 0; n < outputs; n++)
        UNROLL for (int b = 0; b < rows; b++) {
            float s = total(sum[n][b]);
            for (int i = c; i < C; i++) s += widen(w[(ptrdiff_t)n * C + i]) * x[b * C + i];
            found[n][b] = s;
        }
}

template <class W, int outputs>
void dots(int rows, const W *w, int C, const float *x, float found[][TILE]) {
    switch (rows) {
        case 1: return dots<W, outputs, 1>(w, C, x, found);
        case 2: return dots<W, outputs, 2>(w, C, x, found);
        case 3: return dots<W, outputs, 3>(w, C, x, found);
        case 4: return dots<W, outputs, 4>(w, C, x, found);
#if defined(__AVX512F__)
        case 5: return dots<W, outputs, 5>(w, C, x, found);
        case 6: return dots<W, outputs, 6>(w, C, x, found);
        case 7: return dots<W, outputs, 7>(w, C, x, found);
        case 8: return dots<W, outputs, 8>(w, C, x, found);
#endif
    }
}

struct Range {
    int begin, end;
};

// This thread's share of `count`, in whole units.
Range share(int count, int unit) {
    ptrdiff_t threads = omp_get_num_threads(), id = omp_get_thread_num();
    int units = (count + unit - 1) / unit;
    int begin = units * id / threads * unit, end = units * (id + 1) / threads * unit;
    return {begin < count ? begin : count, end < count ? end : count};
}

enum Into { SET, ADD };

// y (B, N) = or += x (B, C) @ matrix.T + bias, for some of the N outputs.
template <class W>
void product(Into into, Matrix matrix, const float *bias, int C, const float *x, int B, float *y, int N, Range outputs) {
    float found[OUTPUTS][TILE];
    for (int block = outputs.begin; block < outputs.end; block += BLOCK) {
        int end = block + BLOCK < outputs.end ? block + BLOCK : outputs.end;
        for (int b = 0; b < B; b += TILE) {
            int rows = B - b < TILE ? B - b : TILE;
            for (int n = block, several; n < end; n += several) {
                several = end - n < OUTPUTS ? 1 : OUTPUTS;
                const W *w = (const W *)matrix.weights + (ptrdiff_t)n * C;
                const float *in = x + (ptrdiff_t)b * C;
                several == OUTPUTS ? dots<W, OUTPUTS>(rows, w, C, in, found) : dots<W, 1>(rows, w, C, in, found);
                for (int i = 0; i < several; i++)
                    for (int r = 0; r < rows; r++) {
                        float value = found[i][r];
                        if (matrix.scales) value *= matrix.scales[n + i];
                        if (bias) value += bias[n + i];
                        float *place = y + (ptrdiff_t)(b + r) * N + n + i;
                        *place = into == ADD ? *place + value : value;
                    }
            }
        }
    }
}

// --- between the products

// y = x / sqrt(mean(x²) + eps) * gain; y may be x.
void normalize(const float *x, const float *gain, int C, float eps, float *y) {
    vec sum = {};
    int c = 0;
    for (; c + LANES <= C; c += LANES) sum += load(x + c) * load(x + c);
    float squares = total(sum);
    for (; c < C; c++) squares += x[c] * x[c];
    float scale = 1 / std::sqrt(squares / C + eps);
    for (c = 0; c < C; c++) y[c] = x[c] * scale * gain[c];
}

void normalize_rows(const float *x, const float *gain, int B, int C, float eps, float *y) {
    for (int b = 0; b < B; b++) normalize(x + (ptrdiff_t)b * C, gain, C, eps, y + (ptrdiff_t)b * C);
}

// gate = silu(gate) * up
void gated(float *gate, const float *up, int count) {
    int f = 0;
    for (; f + LANES <= count; f += LANES) {
        vec g = load(gate + f);
        store(gate + f, g / (1 + exponential(-g)) * load(up + f));
    }
    for (; f < count; f++) gate[f] = gate[f] / (1 + exponential(vec{} - gate[f])[0]) * up[f];
}

// Channel pairs of one head turned by table (D / 2, 2).
void turn(float *x, const float *table, int D) {
    for (int d = 0; d < D; d += 2) {
        float even = x[d], odd = x[d + 1], cosine = table[d], sine = table[d + 1];
        x[d] = even * cosine - odd * sine;
        x[d + 1] = even * sine + odd * cosine;
    }
}

int whole_vectors(int count) { return (count + LANES - 1) / LANES * LANES; }

// Sums of `vectors` (1 to 4) neighbouring vectors: out = sum over i of factors[i] * those at from + i * stride.
template <int vectors, class T>
INLINE void weighted_sum(const T *from, int stride, const float *factors, int count, float scale, float *out, int apart) {
    vec sum[vectors] = {};
    for (int i = 0; i < count; i++)
        UNROLL for (int j = 0; j < vectors; j++) sum[j] += factors[i] * load(from + (ptrdiff_t)i * stride + j * (ptrdiff_t)apart);
    UNROLL for (int j = 0; j < vectors; j++) store(out + j * LANES, sum[j] * scale);
}

template <class T>
INLINE void weighted_sums(const T *from, int stride, const float *factors, int count, float scale, float *out, int vectors, int apart) {
    int j = 0;
    for (; j + 4 <= vectors; j += 4) weighted_sum<4>(from + (ptrdiff_t)j * apart, stride, factors, count, scale, out + j * LANES, apart);
    for (; j < vectors; j++) weighted_sum<1>(from + (ptrdiff_t)j * apart, stride, factors, count, scale, out + j * LANES, apart);
}

// One key head's queries q (queries, D) over its keys and values up to position p, into y (queries, D).
//
// keys: (length / LANES, D, LANES), so that a vector holds as many positions; values: (length, D); both padded to whole
// vectors. scores: room for as many as positions and for D more, both padded so.
template <class T>
void attend(const float *q, int queries, int D, int p, const T *keys, const T *values, float *scores, float *y) {
    int vectors = p / LANES + 1, wide = whole_vectors(D);
    float *mixed = scores + (ptrdiff_t)vectors * LANES;
    for (; queries--; q += D, y += D) {
        weighted_sums(keys, LANES, q, D, 1 / std::sqrt((float)D), scores, vectors, D * LANES);
        for (int t = p + 1; t < vectors * LANES; t++) scores[t] = -INFINITY;
        vec largest = load(scores);
        for (int t = 1; t < vectors; t++) {
            vec s = load(scores + t * LANES);
            largest = s > largest ? s : largest;
        }
        float top = largest[0];
        for (int i = 1; i < LANES; i++) top = largest[i] > top ? largest[i] : top;
        vec sum = {};
        for (int t = 0; t < vectors; t++) {
            vec e = exponential(load(scores + t * LANES) - top);
            store(scores + t * LANES, e);
            sum += e;
        }
        weighted_sums(values, wide, scores, p + 1, 1 / total(sum), mixed, wide / LANES, LANES);
        memcpy(y, mixed, D * sizeof(float));
    }
}

// Row b, key head g: normed and turned queries and keys, stored keys and values, attention. qkv: (B, H + 2 G, D).
template <class T>
void mix(const Stack &s, const Block &block, int b, int g, int p, float *qkv, const float *table, float *scores, float *y) {
    const int D = s.D, group = s.H / s.G;
    float *row = qkv + (ptrdiff_t)b * (s.H + 2 * s.G) * D;
    float *q = row + g * group * D, *k = row + (s.H + g) * D, *v = row + (s.H + s.G + g) * D;
    T *keys = (T *)block.keys + ((ptrdiff_t)b * s.G + g) * whole_vectors(s.length) * D;
    T *values = (T *)block.values + ((ptrdiff_t)b * s.G + g) * s.length * whole_vectors(D);
    y += ((ptrdiff_t)b * s.H + g * group) * D;
    if (block.k_norm) normalize(k, block.k_norm, D, s.eps, k);
    if (table) turn(k, table, D);
    for (int d = 0; d < D; d++) narrow(k[d], keys + ((ptrdiff_t)p / LANES * D + d) * LANES + p % LANES);
    for (int d = 0; d < D; d++) narrow(v[d], values + (ptrdiff_t)p * whole_vectors(D) + d);
    if (p == 0) {  // it sees only itself, and there are no queries
        for (int h = 0; h < group; h++) memcpy(y + h * D, v, D * sizeof(float));
        return;
    }
    for (int h = 0; h < group; h++) {
        if (block.q_norm) normalize(q + h * D, block.q_norm, D, s.eps, q + h * D);
        if (table) turn(q + h * D, table, D);
    }
    attend(q, group, D, p, keys, values, scores, y);
}

template <class W, class T>
void run(const Stack &s, int B, int p, float *x, const float *table, float *y, float *scratch) {
    const int C = s.C, F = s.F, heads = s.H * s.D, Q = (s.H + 2 * s.G) * s.D;
    float *qkv = scratch, *mixed = qkv + (ptrdiff_t)B * Q, *gate = mixed + (ptrdiff_t)B * heads, *up = gate + (ptrdiff_t)B * F;
    float *own = up + (ptrdiff_t)B * F;
    const int scores_count = whole_vectors(s.length) + whole_vectors(s.D);
    #pragma omp parallel num_threads(s.threads)
    {
        // Norms are cheap: each thread has its own, rather than waiting for the others'.
        float *normed = own + omp_get_thread_num() * ((ptrdiff_t)B * C + scores_count), *scores = normed + (ptrdiff_t)B * C;
        for (const Block *block = s.blocks; block < s.blocks + s.blocks_count; block++) {
            normalize_rows(x, block->attention_norm, B, C, s.eps, normed);
            int queries = p ? 0 : heads;
            Range mine = share(Q - queries, OUTPUTS);
            product<W>(SET, block->wqkv, nullptr, C, normed, B, qkv, Q, {mine.begin + queries, mine.end + queries});
            #pragma omp barrier
            mine = share(B * s.G, 1);
            for (int i = mine.begin; i < mine.end; i++) mix<T>(s, *block, i / s.G, i % s.G, p, qkv, table, scores, mixed);
            #pragma omp barrier
            product<W>(ADD, block->wo, nullptr, heads, mixed, B, x, C, share(C, OUTPUTS));
            #pragma omp barrier
            normalize_rows(x, block->ffn_norm, B, C, s.eps, normed);
            mine = share(F, OUTPUTS * LANES);
            product<W>(SET, block->w1, nullptr, C, normed, B, gate, F, mine);
            product<W>(SET, block->w3, nullptr, C, normed, B, up, F, mine);
            for (int b = 0; b < B; b++) {
                ptrdiff_t first = (ptrdiff_t)b * F + mine.begin;
                gated(gate + first, up + first, mine.end - mine.begin);
            }
            #pragma omp barrier
            product<W>(ADD, block->w2, nullptr, F, gate, B, x, C, share(C, OUTPUTS));
            #pragma omp barrier
        }
        if (!s.output.weights) {
            Range mine = share(B, 1);
            normalize_rows(x + (ptrdiff_t)mine.begin * C, s.norm, mine.end - mine.begin, C, s.eps, y + (ptrdiff_t)mine.begin * C);
        } else {
            if (s.norm) normalize_rows(x, s.norm, B, C, s.eps, normed);
            product<W>(SET, s.output, s.bias, C, s.norm ? normed : x, B, y, s.V, share(s.V, OUTPUTS));
        }
    }
}

}  // namespace

// The number of floats in a vector, which the shapes of keys and values follow.
extern "C" int lanes() { return LANES; }

// One step at position p of a stack: x (B, C), which is overwritten → y (B, C), normed, or the output's (B, V).
//
// table: (D / 2, 2) cosines and sines of the position, or null.   scratch: floats, as many as native.py says.
extern "C" void step(const Stack *stack, int B, int p, float *x, const float *table, float *y, float *scratch) {
    switch (stack->kind) {
        case 0: return run<float, float>(*stack, B, p, x, table, y, scratch);
        case 1: return run<bfloat16, bfloat16>(*stack, B, p, x, table, y, scratch);
        case 2: return run<int8_t, float>(*stack, B, p, x, table, y, scratch);
    }
}
