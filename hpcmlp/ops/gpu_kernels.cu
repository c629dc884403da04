// The kernels of a training step on a GPU: all but the matrix products. One source for the device and for its emulation.
//
// Rows stand one after the other, padded to `stride` elements (a multiple of 16); padding is written as zero. Activations
// are float or bf16 (16 bits, the upper half of a float). A batch has room for `capacity` rows, `rows` of them in use:
// the others are zero and weigh nothing, so that one captured graph serves every batch. What changes from step to step
// comes from tables in device memory: Step (one line per step of the block under way) and Control.
// Sums are taken in a fixed order: partial sums per block, added up by the block that finishes last.
#ifdef HPCMLP_EMULATED
#include "gpu_emulated.h"
#endif

typedef unsigned short bf16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct Step {           // written by the host before the block of steps begins
    float rate;         // learning rate, with the bias correction of the first moment
    float keep;         // 1 - lr * weight decay: decoupled decay
    float second;       // 1 / sqrt(1 - beta2^n)
    int starts;         // whether momentum starts with this step
    u64 number;         // step of the run: keys the dropout
    u64 first;          // place of the first local row in the global batch
    int rows;           // rows of this rank
    int unused;
};

struct Result {         // read by the host after the block of steps
    double loss, weight, square;
    int skipped, rows;
};

struct Control {        // one for the run
    int at;             // line of the step under way
    int ticket;         // blocks that have finished
    int skip;           // whether the update under way must not happen
    float factor;       // 1 / weight, clipped: times the gradient
    float rate, keep, second;
    int starts;
    double loss, weight, square, bad;   // summed over the ranks where there are several
};

struct Shard {          // how one epoch orders the rows of a shard: a Feistel network on [0, a) x [0, b), or a table
    int rows, a, b;
    int table;          // place of its table, or -1
    u32 keys[6];
    int base;           // its first row in memory
    int unused;
};

struct Hyper {          // of the update rule
    int rule, decoupled, nesterov, unused;
    float beta1, beta2, eps, decay, momentum, dampening, average, clip;
};

// ---- storage

__device__ inline float as_float(float value) { return value; }
__device__ inline float as_float(bf16 value) { return __uint_as_float((u32)value << 16); }
__device__ inline void put(float *at, float value) { *at = value; }
__device__ inline void put(bf16 *at, float value) {
    u32 bits = __float_as_uint(value);
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    *at = nan ? 0x7fffu : (bf16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);     // to nearest, ties to even
}

// ---- sums

__device__ inline double warp_sum(double value) {
    for (int k = 16; k; k >>= 1) value += __shfl_xor_sync(0xffffffffu, value, k);
    return value;
}
__device__ inline float warp_sum(float value) {
    for (int k = 16; k; k >>= 1) value += __shfl_xor_sync(0xffffffffu, value, k);
    return value;
}
__device__ inline float warp_max(float value) {
    for (int k = 16; k; k >>= 1) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, k));
    return value;
}
// The sum over the threads of the block, on every thread.
__device__ inline double block_sum(double value) {
    __shared__ double parts[32];
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    double sum = 0.0;
    for (int k = 0; k < (int)blockDim.x / 32; k++) sum += parts[k];
    return sum;
}

// ---- random bits and the order of rows, as hpcmlp/ops/counter.py and hpcmlp/data/order.py have them

__device__ inline u64 finalize(u64 key) {
    key += 0x9E3779B97F4A7C15ull;
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9ull;
    key = (key ^ (key >> 27)) * 0x94D049BB133111EBull;
    return key ^ (key >> 31);
}
__device__ inline u32 bits_of(u64 key, u32 column) {
    u32 bits = column * 0x9E3779B9u + (u32)key;
    bits ^= bits >> 16;
    bits *= 0x7FEB352Du;
    bits ^= (u32)(key >> 32);
    bits ^= bits >> 15;
    bits *= 0x846CA68Bu;
    return bits ^ (bits >> 16);
}
__device__ inline u32 mix_half(u32 half, u32 other, u32 modulus, u32 key) {
    u32 hashed = (other + key) * 0x7FEB352Du;
    hashed ^= hashed >> 15;
    hashed = ((hashed * 0x846CA68Bu >> 16) * modulus) >> 16;
    half += hashed;
    return half < modulus ? half : half - modulus;
}
__device__ inline int place_in_shard(const Shard &shard, const int *tables, int position) {
    if (shard.table >= 0) return tables[shard.table + position];
    u32 x = (u32)position;
    do {
        u32 left = x / (u32)shard.b, right = x - left * (u32)shard.b;
        for (int k = 0; k < 6; k += 2) {
            left = mix_half(left, right, (u32)shard.a, shard.keys[k]);
            right = mix_half(right, left, (u32)shard.b, shard.keys[k + 1]);
        }
        x = left * (u32)shard.b + right;
    } while (x >= (u32)shard.rows);
    return (int)x;
}

// ---- gather: one warp per row and piece of PIECE columns, so that wide rows have many loads under way

#define PIECE 128

// parts: per step and shard the first position in the shard's sequence and the local row it falls on, then the end.
// order: row numbers of the batches of the block, one after the other, instead of shards and parts; or null.
template <class T>
__device__ void gather_rows(const Control *control, const Step *steps, const Shard *shards, const int *parts,
                            const int *tables, int num_shards, const int *order, const void *source, int source_is_bytes,
                            const float *shift, const float *scale, const void *targets, int target_width,
                            const float *weights, int capacity, int width, int stride, T *x, void *batch_targets,
                            float *batch_weights) {
    int pieces = (stride + PIECE - 1) / PIECE, warp = (int)((blockIdx.x * blockDim.x + threadIdx.x) / 32);
    int row = warp / pieces, begin = (warp - row * pieces) * PIECE, lane = threadIdx.x % 32;
    if (row >= capacity) return;
    int at = control->at, end = begin + PIECE < stride ? begin + PIECE : stride;
    T *out = x + (size_t)row * stride;
    if (row >= steps[at].rows) {
        for (int c = begin + lane; c < end; c += 32) put(out + c, 0.0f);
        if (begin == 0 && lane == 0) batch_weights[row] = 0.0f;
        return;
    }
    size_t from;
    if (order) {
        from = (size_t)order[(size_t)at * capacity + row];
    } else {
        const int *starts = parts + (size_t)at * 2 * num_shards, *begins = starts + num_shards;
        int low = 0, high = num_shards - 1;         // the last shard that begins at this row or before it
        while (low < high) {
            int middle = (low + high + 1) / 2;
            if (begins[middle] <= row) low = middle; else high = middle - 1;
        }
        from = (size_t)shards[low].base + (size_t)place_in_shard(shards[low], tables, starts[low] + row - begins[low]);
    }
    #pragma unroll
    for (int k = 0; k < PIECE / 32; k++) {
        int c = begin + lane + 32 * k;
        if (c >= end) break;
        float value = 0.0f;
        if (c < width) {
            size_t place = from * (size_t)width + c;
            value = source_is_bytes ? (float)((const unsigned char *)source)[place] : ((const float *)source)[place];
            if (shift) value -= shift[c];
            if (scale) value *= scale[c];
        }
        put(out + c, value);
    }
    if (begin) return;
    if (target_width == 0) {
        if (lane == 0) ((int *)batch_targets)[row] = ((const int *)targets)[from];
    } else {
        for (int c = lane; c < target_width; c += 32)
            ((float *)batch_targets)[(size_t)row * target_width + c] = ((const float *)targets)[from * target_width + c];
    }
    if (lane == 0) batch_weights[row] = weights ? weights[from] : 1.0f;
}

#define GATHER(name, T) \
extern "C" __global__ void name(const Control *control, const Step *steps, const Shard *shards, const int *parts, \
        const int *tables, int num_shards, const int *order, const void *source, int source_is_bytes, \
        const float *shift, const float *scale, const void *targets, int target_width, const float *weights, \
        int capacity, int width, int stride, T *x, void *batch_targets, float *batch_weights) { \
    gather_rows<T>(control, steps, shards, parts, tables, num_shards, order, source, source_is_bytes, shift, scale, \
                   targets, target_width, weights, capacity, width, stride, x, batch_targets, batch_weights); \
}
GATHER(gather_f32, float)
GATHER(gather_bf16, bf16)

// ---- activations that no epilogue of the matrix product has; numbers as in hpcmlp/ops/activations.py KINDS

__device__ inline float sigmoid(float z) {
    float e = expf(-fabsf(z));
    return (z >= 0.0f ? 1.0f : e) / (1.0f + e);
}
__device__ inline float activate(int kind, float z) {
    switch (kind) {
    case 1: return z > 0.0f ? z : (z != z ? z : 0.0f);
    case 2: return z > 0.0f ? z : 0.01f * z;
    case 3: return 0.5f * z * (1.0f + erff(z * 0.70710678f));
    case 4: return z * sigmoid(z);
    case 5: return z > 0.0f ? z : expm1f(z);
    case 6: return 1.0507009873554805f * (z > 0.0f ? z : 1.6732632423543772f * expm1f(z));
    case 7: return tanhf(z);
    case 8: return sigmoid(z);
    case 9: return fmaxf(z, 0.0f) + log1pf(expf(-fabsf(z)));
    default: return z;
    }
}
__device__ inline float slope(int kind, float z) {
    float s;
    switch (kind) {
    case 1: return z > 0.0f ? 1.0f : 0.0f;
    case 2: return z > 0.0f ? 1.0f : 0.01f;
    case 3: return 0.5f * (1.0f + erff(z * 0.70710678f)) + z * 0.39894228f * expf(-0.5f * z * z);
    case 4: s = sigmoid(z); return s * (1.0f + z * (1.0f - s));
    case 5: return z > 0.0f ? 1.0f : expf(z);
    case 6: return 1.0507009873554805f * (z > 0.0f ? 1.0f : 1.6732632423543772f * expf(z));
    case 7: s = tanhf(z); return 1.0f - s * s;
    case 8: s = sigmoid(z); return s * (1.0f - s);
    case 9: return sigmoid(z);
    default: return 1.0f;
    }
}

// Dropout keeps an element, times `kept` = 1 / (1 - rate), where its bits reach `limit`; 0: nothing is dropped.
// seed_key: finalize(seed).
__device__ inline u64 layer_key(u64 seed_key, u64 number, u64 layer) {
    return finalize(finalize(seed_key ^ number) ^ layer);
}

// out = f(pre), dropped; both or one may be in place. One thread per element.
template <class T>
__device__ void activate_rows(const Control *control, const Step *steps, int kind, u64 seed_key, u64 layer, u32 limit,
                              float kept, int capacity, int width, int stride, const T *pre, T *out) {
    size_t total = (size_t)capacity * stride;
    u64 base = limit ? layer_key(seed_key, steps[control->at].number, layer) : 0;
    u64 first = limit ? steps[control->at].first : 0;
    for (size_t k = blockIdx.x * (size_t)blockDim.x + threadIdx.x; k < total; k += (size_t)gridDim.x * blockDim.x) {
        u32 row = (u32)(k / stride), column = (u32)(k - (size_t)row * stride);
        float value = 0.0f;
        if (column < (u32)width) {
            value = activate(kind, as_float(pre[k]));
            if (limit) value = bits_of(finalize(base ^ (first + row)), column) >= limit ? value * kept : 0.0f;
        }
        put(out + k, value);
    }
}
#define ACTIVATE(name, T) \
extern "C" __global__ void name(const Control *control, const Step *steps, int kind, u64 seed_key, u64 layer, u32 limit, \
                                float kept, int capacity, int width, int stride, const T *pre, T *out) { \
    activate_rows<T>(control, steps, kind, seed_key, layer, limit, kept, capacity, width, stride, pre, out); \
}
ACTIVATE(activate_f32, float)
ACTIVATE(activate_bf16, bf16)

// d = d * mask * f'(pre), in place, and its column sums over pieces of the rows, of type float.
//
// A block works on a strip of `across` packs of 16 bytes and on `chunk` rows; its threads are `across` wide and
// blockDim / across deep. Sums over the rows of a block go to `partial` (chunks, stride), which may be null;
// sum_partials adds them up. pre is the pre-activation, for relu the output will do; null for identity. PLAIN: relu or
// identity without dropout, where a product has left the padding zero: numbers are kept or cleared, never converted.
template <class T> struct alignas(16) Pack { T v[16 / sizeof(T)]; };

__device__ inline bool above_zero(float value) { return value > 0.0f; }
__device__ inline bool above_zero(bf16 value) { return (short)value > 0; }     // not of a NaN, which no relu gives

template <bool PLAIN, class T>
__device__ void activate_rows_backward(const Control *control, const Step *steps, int kind, u64 seed_key, u64 layer,
                                       u32 limit, float kept, int capacity, int width, int stride, const T *pre, T *d,
                                       float *partial, int across, int chunk) {
    const int N = 16 / sizeof(T);
    __shared__ float sums[256][N + 1];
    int packs = stride / N, strips = (packs + across - 1) / across, depth = blockDim.x / across;
    int strip = blockIdx.x % strips, part = blockIdx.x / strips;
    int column = strip * across + (int)threadIdx.x % across, group = threadIdx.x / across;
    bool active = group < depth && column < packs;
    u64 base = !PLAIN && limit ? layer_key(seed_key, steps[control->at].number, layer) : 0;
    u64 first = !PLAIN && limit ? steps[control->at].first : 0;
    float sum[N];
    #pragma unroll
    for (int j = 0; j < N; j++) sum[j] = 0.0f;
    int end = (part + 1) * chunk < capacity ? (part + 1) * chunk : capacity;
    if (active) {
        #pragma unroll 4
        for (int row = part * chunk + group; row < end; row += depth) {
            size_t at = (size_t)row * stride + (size_t)column * N;
            Pack<T> value = *(const Pack<T> *)(d + at), before;
            if (pre) before = *(const Pack<T> *)(pre + at);
            u64 key = !PLAIN && limit ? finalize(base ^ (first + row)) : 0;
            #pragma unroll
            for (int j = 0; j < N; j++) {
                if (PLAIN) {
                    if (pre && !above_zero(before.v[j])) value.v[j] = 0;
                } else {
                    float v = as_float(value.v[j]);
                    if (pre) v *= slope(kind, as_float(before.v[j]));
                    if (limit) v = bits_of(key, column * N + j) >= limit ? v * kept : 0.0f;
                    if (column * N + j >= width) v = 0.0f;
                    put(&value.v[j], v);
                }
                sum[j] += as_float(value.v[j]);
            }
            if (pre || (!PLAIN && limit)) *(Pack<T> *)(d + at) = value;
        }
    }
    if (!partial) return;
    #pragma unroll
    for (int j = 0; j < N; j++) sums[threadIdx.x][j] = sum[j];
    __syncthreads();
    for (int k = threadIdx.x; k < across * N; k += blockDim.x) {
        int at = strip * across * N + k;
        if (at >= stride) break;
        float total = 0.0f;
        for (int g = 0; g < depth; g++) total += sums[g * across + k / N][k % N];
        partial[(size_t)part * stride + at] = total;
    }
}
#define ACTIVATE_BACKWARD(name, PLAIN, T) \
extern "C" __global__ void name(const Control *control, const Step *steps, int kind, u64 seed_key, u64 layer, u32 limit, \
                                float kept, int capacity, int width, int stride, const T *pre, T *d, float *partial, \
                                int across, int chunk) { \
    activate_rows_backward<PLAIN, T>(control, steps, kind, seed_key, layer, limit, kept, capacity, width, stride, pre, d, \
                                     partial, across, chunk); \
}
ACTIVATE_BACKWARD(activate_backward_f32, false, float)
ACTIVATE_BACKWARD(activate_backward_bf16, false, bf16)
ACTIVATE_BACKWARD(relu_backward_f32, true, float)
ACTIVATE_BACKWARD(relu_backward_bf16, true, bf16)

// Bias gradients from the partial sums of all layers: 32 columns a block, in a fixed order.
struct Partial { const float *partial; float *bias; int parts, stride, first_block, unused; };

extern "C" __global__ void sum_partials(const Partial *layers, int count) {
    __shared__ float sums[8][33];
    int layer = 0, lane = threadIdx.x % 32, group = threadIdx.x / 32;
    while (layer + 1 < count && layers[layer + 1].first_block <= (int)blockIdx.x) layer++;
    const Partial own = layers[layer];
    int column = ((int)blockIdx.x - own.first_block) * 32 + lane;
    float sum = 0.0f;
    if (column < own.stride) {
        #pragma unroll 8
        for (int k = group; k < own.parts; k += 8) sum += own.partial[(size_t)k * own.stride + column];
    }
    sums[group][lane] = sum;
    __syncthreads();
    if (group == 0 && column < own.stride) {
        for (int k = 1; k < 8; k++) sum += sums[k][lane];
        own.bias[column] = sum;
    }
}

// ---- losses: one warp per row; kinds as in hpcmlp/ops/losses.py KINDS

// Loss and gradient of one element of the losses that are means over columns.
__device__ inline float element_loss(int kind, float z, float t, float parameter, float *gradient) {
    float d = z - t, inside;
    switch (kind) {
    case 1: {
        float e = expf(-fabsf(z));
        *gradient = (z >= 0.0f ? 1.0f : e) / (1.0f + e) - t;
        return fmaxf(z, 0.0f) - z * t + log1pf(e);
    }
    case 2: *gradient = 2.0f * d; return d * d;
    case 3: *gradient = d > 0.0f ? 1.0f : d < 0.0f ? -1.0f : d; return fabsf(d);
    case 4:
        inside = fminf(fmaxf(d, -parameter), parameter);
        *gradient = inside;
        return inside * (d - 0.5f * inside);
    default:        // quantile `parameter`
        *gradient = d < 0.0f ? -parameter : d > 0.0f ? 1.0f - parameter : d;
        return d < 0.0f ? -parameter * d : (1.0f - parameter) * d;
    }
}

// The gradient of the weighted loss sum is written over the logits; partial sums of loss and weight, one pair a block.
// parameters: class weights (kind 0) or null; quantiles (kind 5). targets: int per row, or `target_width` floats.
template <class T>
__device__ void loss_rows(const Control *control, const Step *steps, int kind, float smoothing, float parameter,
                          const float *parameters, int target_width, int capacity, int width, int stride, T *logits,
                          const void *targets, const float *weights, double *partial) {
    int lane = threadIdx.x % 32, row = (int)((blockIdx.x * blockDim.x + threadIdx.x) / 32);
    int per_target = kind == 5 ? width / target_width : 1;
    int rows = steps[control->at].rows;
    double loss = 0.0, weight = 0.0;
    if (row < capacity) {
        T *z = logits + (size_t)row * stride;
        if (row >= rows) {
            for (int c = lane; c < stride; c += 32) put(z + c, 0.0f);
        } else if (kind == 0) {
            int label = ((const int *)targets)[row];
            float most = -__uint_as_float(0x7f800000u), total = 0.0f, nan = 0.0f;
            for (int c = lane; c < width; c += 32) { most = fmaxf(most, as_float(z[c])); nan += as_float(z[c]) * 0.0f; }
            most = warp_max(most) + warp_sum(nan);      // fmaxf forgets a NaN
            float uniform = smoothing / width, wanted_sum = 0.0f, cross = 0.0f;
            for (int c = lane; c < width; c += 32) {
                float shifted = as_float(z[c]) - most;
                float class_weight = parameters ? parameters[c] : 1.0f;
                float wanted = (uniform + (c == label ? 1.0f - smoothing : 0.0f)) * class_weight;
                total += expf(shifted);
                wanted_sum += wanted;
                cross += wanted != 0.0f ? wanted * shifted : 0.0f * shifted;
            }
            total = warp_sum(total);
            wanted_sum = warp_sum(wanted_sum);
            cross = warp_sum(cross);
            float w = weights[row];
            for (int c = lane; c < stride; c += 32) {
                float gradient = 0.0f;
                if (c < width) {
                    float class_weight = parameters ? parameters[c] : 1.0f;
                    float wanted = (uniform + (c == label ? 1.0f - smoothing : 0.0f)) * class_weight;
                    gradient = w * (expf(as_float(z[c]) - most) / total * wanted_sum - wanted);
                }
                put(z + c, gradient);
            }
            if (lane == 0) {
                loss = (double)w * (logf(total) * wanted_sum - cross);
                weight = (double)w * (parameters ? parameters[label] : 1.0f);
            }
        } else {
            float sum = 0.0f, w = weights[row];
            for (int c = lane; c < stride; c += 32) {
                float gradient = 0.0f;
                if (c < width) {
                    float t = target_width ? ((const float *)targets)[(size_t)row * target_width + c / per_target]
                                           : (float)((const int *)targets)[row];
                    sum += element_loss(kind, as_float(z[c]), t, kind == 5 ? parameters[c % per_target] : parameter,
                                        &gradient);
                    gradient *= w / width;
                }
                put(z + c, gradient);
            }
            sum = warp_sum(sum);
            if (lane == 0) { loss = (double)w * sum / width; weight = w; }
        }
    }
    loss = block_sum(loss);
    weight = block_sum(weight);
    if (threadIdx.x == 0) { partial[2 * blockIdx.x] = loss; partial[2 * blockIdx.x + 1] = weight; }
}
#define LOSS(name, T) \
extern "C" __global__ void name(const Control *control, const Step *steps, int kind, float smoothing, float parameter, \
        const float *parameters, int target_width, int capacity, int width, int stride, T *logits, \
        const void *targets, const float *weights, double *partial) { \
    loss_rows<T>(control, steps, kind, smoothing, parameter, parameters, target_width, capacity, width, stride, logits, \
                 targets, weights, partial); \
}
LOSS(loss_f32, float)
LOSS(loss_bf16, bf16)

// ---- the end of a step

// Decide about the update from the sums, note the result, and go on to the next line of the table. One thread.
__device__ inline void close(Control *control, const Step *steps, Result *results, float clip) {
    const Step &step = steps[control->at];
    Result &result = results[control->at];
    double size = sqrt(control->square);
    bool finite = control->bad == 0.0 && control->loss - control->loss == 0.0 && size - size == 0.0;
    bool skip = !finite || !(control->weight > 0.0);
    float factor = skip ? 0.0f : (float)(1.0 / control->weight);
    if (!skip && clip > 0.0f && size / control->weight > (double)clip) factor = (float)(clip / size);
    result.loss = control->loss;
    result.weight = control->weight;
    result.square = control->square;
    result.skipped = skip;
    result.rows = step.rows;
    control->skip = skip;
    control->factor = factor;
    control->rate = step.rate;
    control->keep = step.keep;
    control->second = step.second;
    control->starts = step.starts;
    control->at += 1;
    control->ticket = 0;
}
extern "C" __global__ void close_step(Control *control, const Step *steps, Result *results, float clip) {
    close(control, steps, results, clip);
}

// Sum of squares of g, and the sums of the loss kernel's pairs; the last block adds up, and ends the step when `closes`.
extern "C" __global__ void finish_sums(Control *control, const Step *steps, Result *results, float clip, int closes,
                                       u64 count, const float *g, int num_pairs, const double *pairs, double *partial) {
    double sum = 0.0;
    #pragma unroll 4
    for (u64 k = (blockIdx.x * (u64)blockDim.x + threadIdx.x) * 4; k < count; k += (u64)gridDim.x * blockDim.x * 4) {
        float4 v = *(const float4 *)(g + k);        // count is a multiple of 4
        sum += (double)v.x * v.x + (double)v.y * v.y + (double)v.z * v.z + (double)v.w * v.w;
    }
    sum = block_sum(sum);
    __shared__ int last;
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
        __threadfence();
        last = atomicAdd(&control->ticket, 1) == (int)gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    double square = 0.0, loss = 0.0, weight = 0.0;
    for (int k = threadIdx.x; k < (int)gridDim.x; k += blockDim.x) square += ((volatile double *)partial)[k];
    for (int k = threadIdx.x; k < num_pairs; k += blockDim.x) { loss += pairs[2 * k]; weight += pairs[2 * k + 1]; }
    square = block_sum(square);
    loss = block_sum(loss);
    weight = block_sum(weight);
    if (threadIdx.x == 0) {
        control->square = square;
        control->loss = loss;
        control->weight = weight;
        control->bad = square - square == 0.0 && loss - loss == 0.0 ? 0.0 : 1.0;
        control->ticket = 0;
        if (closes) close(control, steps, results, clip);
    }
}

// ---- update: rules 0 adam (decoupled: adamw), 1 sgd, 2 rmsprop, 3 adagrad; as hpcmlp/ops/plain.py has them

__device__ inline float updated(const Hyper &h, const Control &c, float p, float g, float *m, float *v) {
    g *= c.factor;
    if (h.decoupled) p *= c.keep; else g += h.decay * p;
    switch (h.rule) {
    case 0:
        *m += (1.0f - h.beta1) * (g - *m);
        *v = h.beta2 * *v + (1.0f - h.beta2) * g * g;
        return p - c.rate * *m / (sqrtf(*v) * c.second + h.eps);
    case 1:
        if (h.momentum != 0.0f) {
            *m = c.starts ? g : h.momentum * *m + (1.0f - h.dampening) * g;
            g = h.nesterov ? g + h.momentum * *m : *m;
        }
        return p - c.rate * g;
    case 2:
        *v = h.beta1 * *v + (1.0f - h.beta1) * g * g;
        g = g / (sqrtf(*v) + h.eps);
        if (h.momentum != 0.0f) g = *m = h.momentum * *m + g;
        return p - c.rate * g;
    default:
        *v += g * g;
        return p - c.rate * (g / (sqrtf(*v) + h.eps));
    }
}

// Four elements a thread and turn. m, v, q (bf16 copy for the matrix products) and e (average) may be null. Blocks may
// have 1024 threads: a few of them that leave the rest of the device to products move as much as many small ones.
extern "C" __global__ void __launch_bounds__(1024) update(const Control *control, const Hyper *hyper, u64 count, const float *g, float *p, float *m,
                                  float *v, bf16 *q, float *e) {
    const Control c = *control;
    const Hyper h = *hyper;
    if (c.skip) return;
    for (u64 k = (blockIdx.x * (u64)blockDim.x + threadIdx.x) * 4; k < count; k += (u64)gridDim.x * blockDim.x * 4) {
        float4 zero = {0.0f, 0.0f, 0.0f, 0.0f};
        float4 gradient = *(const float4 *)(g + k), value = *(float4 *)(p + k);
        float4 first = m ? *(float4 *)(m + k) : zero, second = v ? *(float4 *)(v + k) : zero;
        value.x = updated(h, c, value.x, gradient.x, &first.x, &second.x);
        value.y = updated(h, c, value.y, gradient.y, &first.y, &second.y);
        value.z = updated(h, c, value.z, gradient.z, &first.z, &second.z);
        value.w = updated(h, c, value.w, gradient.w, &first.w, &second.w);
        *(float4 *)(p + k) = value;
        if (m) *(float4 *)(m + k) = first;
        if (v) *(float4 *)(v + k) = second;
        if (q) {
            ushort4 narrow;
            put(&narrow.x, value.x); put(&narrow.y, value.y); put(&narrow.z, value.z); put(&narrow.w, value.w);
            *(ushort4 *)(q + k) = narrow;
        }
        if (e) {
            float4 mean = *(float4 *)(e + k);
            float share = 1.0f - h.average;
            mean.x += share * (value.x - mean.x); mean.y += share * (value.y - mean.y);
            mean.z += share * (value.z - mean.z); mean.w += share * (value.w - mean.w);
            *(float4 *)(e + k) = mean;
        }
    }
}

// q = p in bf16: after the parameters came from outside.
extern "C" __global__ void narrow(u64 count, const float *p, bf16 *q) {
    for (u64 k = blockIdx.x * (u64)blockDim.x + threadIdx.x; k < count; k += (u64)gridDim.x * blockDim.x) put(q + k, p[k]);
}

#ifdef HPCMLP_EMULATED
// Whether threads of a block meet.
EXPORT(gather_f32, false) EXPORT(gather_bf16, false) EXPORT(activate_f32, false) EXPORT(activate_bf16, false)
EXPORT(activate_backward_f32, true) EXPORT(activate_backward_bf16, true) EXPORT(relu_backward_f32, true)
EXPORT(relu_backward_bf16, true) EXPORT(sum_partials, true) EXPORT(loss_f32, true)
EXPORT(loss_bf16, true) EXPORT(close_step, false) EXPORT(finish_sums, true) EXPORT(update, false) EXPORT(narrow, false)
#endif
