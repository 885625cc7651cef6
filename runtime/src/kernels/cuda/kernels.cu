// The decoder's own kernels on a CUDA device. Activations and arithmetic are f32, the KV pools are K (f32 or bf16).
//
// A query's sum runs over its keys in an order that depends on their absolute positions alone: neither other sequences,
// nor chunks, nor the number of blocks in the grid change a bit of it. (cuBLAS, which multiplies the weights, promises no
// such thing.)

#include <cuda_bf16.h>

// Tokens in a KV block; kernels/batch.rs has the same number.
constexpr int BLOCK_TOKENS = 32;
// Keys that one thread block takes. Each run of so many keys is summed apart, then the runs are joined: a long context
// keeps many multiprocessors busy (split-K).
constexpr int SPLIT_KEYS = 512;
constexpr int WARPS = 4;
constexpr int LANES = 32;
constexpr unsigned ALL = 0xffffffffu;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename K> __device__ inline K narrow(float x);
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16(x); }

__device__ inline float warp_sum(float x) {
    for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}

// The sum over a thread block of up to 1,024 threads, for every thread.
__device__ float block_sum(float x) {
    __shared__ float sums[LANES];
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, warps = (blockDim.x + LANES - 1) / LANES;
    x = warp_sum(x);
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    x = warp_sum(lane < warps ? sums[lane] : 0.0f);
    __syncthreads();
    return x;
}

// One thread block a row. The `width` numbers from `from` on of each row of qkv -> pool [slots, width] at slot[row].
template <typename K>
__device__ void kv_write(const float *qkv, const unsigned *slot, K *pool, int row_width, int from, int width) {
    const float *row = qkv + (size_t)blockIdx.x * row_width + from;
    K *to = pool + (size_t)slot[blockIdx.x] * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = narrow<K>(row[i]);
}

// One thread block a row. out [2, T, width]: hidden + scale * update, and that / rms * weight.
extern "C" __global__ void add_rms_norm(const float *hidden, const float *update, float scale, const float *weight,
                                        float *out, int width, float eps) {
    const size_t start = (size_t)blockIdx.x * width;
    float *sums = out + start, *normed = sums + (size_t)gridDim.x * width, squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const float x = hidden[start + i] + scale * update[start + i];
        sums[i] = x;
        squares += x * x;
    }
    const float turn = rsqrtf(block_sum(squares) / width + eps);
    for (int i = threadIdx.x; i < width; i += blockDim.x) normed[i] = sums[i] * turn * weight[i];
}

__device__ inline float silu(float x) { return x / (1.0f + __expf(-x)); }
__device__ inline float gelu_tanh(float x) {
    return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

// One thread a number. gate_up [T, 2 * inner] -> act(gate) * up [T, inner].
template <float (*ACT)(float)> __device__ void gated(const float *gate_up, float *out, int inner, size_t count) {
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    const float *row = gate_up + at / inner * 2 * inner + at % inner;
    out[at] = ACT(row[0]) * row[inner];
}

extern "C" __global__ void silu_mul(const float *gate_up, float *out, int inner, size_t count) {
    gated<silu>(gate_up, out, inner, count);
}

extern "C" __global__ void gelu_tanh_mul(const float *gate_up, float *out, int inner, size_t count) {
    gated<gelu_tanh>(gate_up, out, inner, count);
}

// One row's queries that share a key head: `queries` of them, each with its own position.
struct Shape {
    int q_heads, kv_heads, dim;
    // A row sees so many keys at most, its own included; 0: all.
    int window;
    float scale;
    // Scores become softcap * tanh(score / softcap); 0: they stay.
    float softcap;
};

// The running softmax of one query: the largest score, the sum of weights, the weighted values of a lane's dimensions.
template <int PER_LANE> struct Running {
    float most = -INFINITY, total = 0.0f, mixed[PER_LANE] = {};

    __device__ void see(float score, const float (&value)[PER_LANE]) {
        if (score == -INFINITY) return;
        const float next = fmaxf(most, score), keep = __expf(most - next), weight = __expf(score - next);
        most = next;
        total = total * keep + weight;
        for (int i = 0; i < PER_LANE; i++) mixed[i] = mixed[i] * keep + weight * value[i];
    }
};

// Attention over paged keys. Grid: (tiles, kv heads * parts, splits), WARPS * 32 threads.
// A tile is up to QUERIES queries of one sequence that share a key head: tiles[4 * tile ..] = first row, rows, where its
// blocks begin in `tables`, unused. With more query heads to a key head than QUERIES a part takes QUERIES of them.
// Every split leaves (mixed, most, total) in partial [T, q_heads, splits, dim + 2]; `join` makes the output of them.
template <typename K, int PER_LANE, int QUERIES>
__device__ void attend(const float *qkv, const K *keys, const K *values, const unsigned *pos, const unsigned *tiles,
                       const unsigned *tables, float *partial, Shape shape, int parts) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, splits = gridDim.z;
    const unsigned *tile = tiles + 4 * blockIdx.x;
    const int first = tile[0], rows = tile[1], group = shape.q_heads / shape.kv_heads;
    const unsigned *table = tables + tile[2];
    const int kv = blockIdx.y / parts, head_in_group = blockIdx.y % parts * QUERIES;
    const int heads = min(group - head_in_group, QUERIES), queries = rows * heads;
    const int row_width = (shape.q_heads + 2 * shape.kv_heads) * shape.dim;

    const int last = pos[first + rows - 1];
    int from = blockIdx.z * SPLIT_KEYS, to = min(from + SPLIT_KEYS, last + 1);
    if (from > last) return;

    float query[QUERIES][PER_LANE];
    int at[QUERIES];
    Running<PER_LANE> running[QUERIES];
#pragma unroll
    for (int q = 0; q < QUERIES; q++) {
        at[q] = -1;
        const int row = first + q / heads, head = kv * group + head_in_group + q % heads;
        if (q < queries) at[q] = pos[row];
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const int d = lane + LANES * i;
            const bool there = q < queries && d < shape.dim;
            query[q][i] = there ? qkv[(size_t)row * row_width + head * shape.dim + d] : 0.0f;
        }
    }

    for (int key = from + warp; key < to; key += WARPS) {
        // Older than the window of the tile's oldest row: nobody sees it.
        if (shape.window > 0 && key + shape.window <= at[0]) continue;
        const size_t slot = (size_t)table[key / BLOCK_TOKENS] * BLOCK_TOKENS + key % BLOCK_TOKENS;
        const size_t start = (slot * shape.kv_heads + kv) * shape.dim;
        float k[PER_LANE], v[PER_LANE];
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const int d = lane + LANES * i;
            k[i] = d < shape.dim ? widen(keys[start + d]) : 0.0f;
            v[i] = d < shape.dim ? widen(values[start + d]) : 0.0f;
        }
#pragma unroll
        for (int q = 0; q < QUERIES; q++) {
            float score = 0.0f;
            for (int i = 0; i < PER_LANE; i++) score += query[q][i] * k[i];
            score = warp_sum(score) * shape.scale;
            if (shape.softcap > 0.0f) score = shape.softcap * tanhf(score / shape.softcap);
            const bool seen = key <= at[q] && (shape.window == 0 || key + shape.window > at[q]);
            running[q].see(seen ? score : -INFINITY, v);
        }
    }

    // The warps' shares, joined in the order of the warps.
    __shared__ float most[WARPS][QUERIES], total[WARPS][QUERIES], mixed[WARPS][QUERIES][LANES * PER_LANE];
    for (int q = 0; q < QUERIES; q++) {
        if (lane == 0) {
            most[warp][q] = running[q].most;
            total[warp][q] = running[q].total;
        }
        for (int i = 0; i < PER_LANE; i++) mixed[warp][q][lane + LANES * i] = running[q].mixed[i];
    }
    __syncthreads();
    for (int q = warp; q < queries; q += WARPS) {
        float highest = -INFINITY, sum = 0.0f;
        for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, most[w][q]);
        const int row = first + q / heads, head = kv * group + head_in_group + q % heads;
        float *out = partial + (((size_t)row * shape.q_heads + head) * splits + blockIdx.z) * (shape.dim + 2);
        float share[WARPS];
        for (int w = 0; w < WARPS; w++) {
            share[w] = most[w][q] == -INFINITY ? 0.0f : __expf(most[w][q] - highest);
            sum += share[w] * total[w][q];
        }
        for (int d = lane; d < shape.dim; d += LANES) {
            float x = 0.0f;
            for (int w = 0; w < WARPS; w++) x += share[w] * mixed[w][q][d];
            out[d] = x;
        }
        if (lane == 0) {
            out[shape.dim] = highest;
            out[shape.dim + 1] = sum;
        }
    }
}

// Joins a query's splits. Grid: (T, q heads). out [T, q_heads * dim].
extern "C" __global__ void join(const float *partial, const unsigned *pos, float *out, int dim, int splits) {
    const size_t query = (size_t)blockIdx.x * gridDim.y + blockIdx.y;
    const float *mine = partial + query * splits * (dim + 2);
    const int count = pos[blockIdx.x] / SPLIT_KEYS + 1;
    float highest = -INFINITY;
    for (int s = 0; s < count; s++) highest = fmaxf(highest, mine[s * (dim + 2) + dim]);
    for (int d = threadIdx.x; d < dim; d += blockDim.x) {
        float sum = 0.0f, mixed = 0.0f;
        for (int s = 0; s < count; s++) {
            const float *split = mine + s * (dim + 2);
            // A split of which the window shows nothing.
            if (split[dim] == -INFINITY) continue;
            const float share = __expf(split[dim] - highest);
            sum += share * split[dim + 1];
            mixed += share * split[d];
        }
        out[query * dim + d] = mixed / sum;
    }
}

#define ATTEND(NAME, K, PER_LANE, QUERIES)                                                                             \
    extern "C" __global__ void __launch_bounds__(WARPS *LANES)                                                         \
        attend_##NAME##_##PER_LANE##_##QUERIES(const float *qkv, const K *keys, const K *values, const unsigned *pos,  \
                                               const unsigned *tiles, const unsigned *tables, float *partial,          \
                                               int q_heads, int kv_heads, int dim, int window, float scale,            \
                                               float softcap, int parts) {                                             \
        const Shape shape = {q_heads, kv_heads, dim, window, scale, softcap};                                          \
        attend<K, PER_LANE, QUERIES>(qkv, keys, values, pos, tiles, tables, partial, shape, parts);                    \
    }

#define EACH(NAME, K)                                                                                                  \
    extern "C" __global__ void kv_write_##NAME(const float *qkv, const unsigned *slot, K *pool, int row_width,         \
                                               int from, int width) {                                                  \
        kv_write<K>(qkv, slot, pool, row_width, from, width);                                                          \
    }                                                                                                                  \
    ATTEND(NAME, K, 1, 8)                                                                                              \
    ATTEND(NAME, K, 2, 8)                                                                                              \
    ATTEND(NAME, K, 4, 8)                                                                                              \
    ATTEND(NAME, K, 8, 4)

EACH(f32, float)
EACH(bf16, __nv_bfloat16)
