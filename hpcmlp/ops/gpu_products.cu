// Matrix products of small shapes in float32 on a GPU: d = epilogue(b a^T), rows of n, columns of m, with sums in a fixed
// order. How the work is cut, and why: hpcmlp/ops/small_products.py. One source for the device and for its emulation.
#ifdef HPCMLP_EMULATED
#include "gpu_emulated.h"
#endif

struct Small {
    const float *a, *b;
    float *d, *bias;        // bias: added (m,), or the sums of b over k (n,)
    const float *gate;      // like d: only where it is above zero anything of d is kept
    int m, n, k, lda, ldb, ldd;
    int form;               // 0: a (m, k), b (n, k); 1: a (k, m), b (n, k); 2: a (k, m), b (k, n), row by row
    int epilogue;           // 0 nothing, 1 + bias, 2 + bias and relu, 3 gate, 4 sums of b
    int tile, warps;        // number of the tile, of `small_products` below; warps that share k
    int across, blocks;     // tiles along m, and all
};
#define MOST_PARTS 8192     // warps x elements of a tile
#define MOST_WARPS 12

// A lane holds N rows of an operand in pieces of four, so that the L lanes beside each other read what lies together.
__device__ inline int row_of(int i, int L, int l) { return i / 4 * (4 * L) + l * 4 + i % 4; }

// Four columns k .. k + 3 of N rows. ALONG: those of a row lie together. Rows behind the end repeat the last: nothing of
// them is stored. Columns behind the end, that is from `depth` on, are zero.
template <bool ALONG, int N, int L>
__device__ inline void load(float (&out)[N][4], const float *x, int ld, int first, int l, int rows, int k, int depth) {
    if (ALONG) {
        #pragma unroll
        for (int i = 0; i < N; i++) {
            int row = first + row_of(i, L, l);
            row = row < rows ? row : rows - 1;
            float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
            if (k < depth) v = *(const float4 *)(x + (row * ld + k));
            out[i][0] = v.x; out[i][1] = v.y; out[i][2] = v.z; out[i][3] = v.w;
        }
    } else {
        #pragma unroll
        for (int i = 0; i < N; i += 4) {
            int row = first + row_of(i, L, l);
            row = row < rows ? row : rows - 4;
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
                if (k + j < depth) v = *(const float4 *)(x + ((k + j) * ld + row));
                out[i][j] = v.x; out[i + 1][j] = v.y; out[i + 2][j] = v.z; out[i + 3][j] = v.w;
            }
        }
    }
}

// What the epilogue needs at one place of the tile, loaded early.
__device__ inline float beside(const Small &p, int n, int m) {
    if (n >= p.n || m >= p.m) return 0.0f;
    if (p.epilogue == 1 || p.epilogue == 2) return p.bias[m];
    if (p.epilogue == 3) return p.gate[(size_t)n * p.ldd + m];
    return 0.0f;
}

// Of the sums of all groups of a warp each group keeps one part and gives the rest away, half by half.
template <int HALF, int DISTANCE, int LANES, int COUNT>
__device__ inline void fold(float (&acc)[COUNT], int lane) {
    bool upper = lane & DISTANCE;
    #pragma unroll
    for (int i = 0; i < HALF; i++) {
        float given = __shfl_xor_sync(0xffffffffu, upper ? acc[i] : acc[i + HALF], DISTANCE);
        acc[i] = (upper ? acc[i + HALF] : acc[i]) + given;
    }
    if constexpr (DISTANCE > LANES) fold<HALF / 2, DISTANCE / 2, LANES>(acc, lane);
}

// One tile of (LN R) x (LM C). LN x LM lanes, each with R x C sums, make a group; the 32 / (LN LM) groups of a warp, and
// the warps, share k in turn. Sums are added up in a fixed order: over groups by halves, then over warps.
template <bool A_ALONG, bool B_ALONG, int R, int C, int LN, int LM>
__device__ inline void compute_tile(const Small &p, int block, float *parts, float (*sums)[32]) {
    const int LANES = LN * LM, TN = LN * R, TM = LM * C, STEP = 4 * (32 / LANES);
    int warp = (int)threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / LANES;
    int ln = lane / LM % LN, lm = lane % LM;
    int n0 = block / p.across * TN, m0 = block % p.across * TM;
    float aside = beside(p, n0 + (int)threadIdx.x / TM, m0 + (int)threadIdx.x % TM);
    bool adds = p.epilogue == 4 && m0 == 0;
    float acc[R * C], total[R];
    #pragma unroll
    for (int i = 0; i < R * C; i++) acc[i] = 0.0f;
    #pragma unroll
    for (int i = 0; i < R; i++) total[i] = 0.0f;
    #pragma unroll 1
    for (int base = warp < p.warps ? warp * STEP : p.k; base < p.k; base += p.warps * STEP) {
        float a[C][4], b[R][4];
        load<B_ALONG, R, LN>(b, p.b, p.ldb, n0, ln, p.n, base + group * 4, p.k);
        load<A_ALONG, C, LM>(a, p.a, p.lda, m0, lm, p.m, base + group * 4, p.k);
        #pragma unroll
        for (int k = 0; k < 4; k++)
            #pragma unroll
            for (int i = 0; i < R; i++)
                #pragma unroll
                for (int j = 0; j < C; j++) acc[i * C + j] += b[i][k] * a[j][k];
        if (!B_ALONG && adds)
            #pragma unroll
            for (int i = 0; i < R; i++) total[i] += (b[i][0] + b[i][1]) + (b[i][2] + b[i][3]);
    }
    fold<R * C / 2, 16, LANES>(acc, lane);      // by all warps of the block: a branch would double the code
    if (!B_ALONG && adds)
        #pragma unroll
        for (int i = 0; i < R; i++)
            for (int distance = 16; distance >= LANES; distance /= 2)
                total[i] += __shfl_xor_sync(0xffffffffu, total[i], distance);
    if (warp < p.warps) {
        const int KEPT = R * C * LANES / 32;
        #pragma unroll
        for (int i = 0; i < KEPT; i++) {
            int at = group * KEPT + i;
            parts[warp * TN * TM + row_of(at / C, LN, ln) * TM + row_of(at % C, LM, lm)] = acc[i];
        }
        if (!B_ALONG && adds && group == 0 && lm == 0)
            #pragma unroll
            for (int i = 0; i < R; i++) sums[warp][row_of(i, LN, ln)] = total[i];
    }
    __syncthreads();
    if (!B_ALONG && adds)
        for (int i = threadIdx.x; i < TN && n0 + i < p.n; i += blockDim.x) {
            float sum = sums[0][i];
            for (int k = 1; k < p.warps; k++) sum += sums[k][i];
            p.bias[n0 + i] = sum;
        }
    for (int at = threadIdx.x; at < TN * TM;) {
        float sum = parts[at];
        for (int k = 1; k < p.warps; k++) sum += parts[k * TN * TM + at];
        if (p.epilogue == 1 || p.epilogue == 2) sum += aside;
        if (p.epilogue == 2) sum = sum > 0.0f ? sum : (sum != sum ? sum : 0.0f);
        if (p.epilogue == 3) sum *= aside > 0.0f ? 1.0f : 0.0f;
        int n = n0 + at / TM, m = m0 + at % TM;
        if (n < p.n && m < p.m) p.d[(size_t)n * p.ldd + m] = sum;
        at += blockDim.x;
        aside = beside(p, n0 + at / TM, m0 + at % TM);
    }
}
template <int R, int C, int LN, int LM>
__device__ inline void compute(const Small &p, int block, float *parts, float (*sums)[32]) {
    if (p.form == 0) compute_tile<true, true, R, C, LN, LM>(p, block, parts, sums);
    else if (p.form == 1) compute_tile<false, true, R, C, LN, LM>(p, block, parts, sums);
    else compute_tile<false, false, R, C, LN, LM>(p, block, parts, sums);
}

// One product, or two that know nothing of each other (then `two` has blocks).
extern "C" __global__ void __launch_bounds__(32 * MOST_WARPS) small_products(const Small one, const Small two) {
    __shared__ float parts[MOST_PARTS];
    __shared__ float sums[MOST_WARPS][32];
    bool other = (int)blockIdx.x >= one.blocks;
    const Small p = other ? two : one;
    int block = (int)blockIdx.x - (other ? one.blocks : 0);
    switch (p.tile) {
    case 0: compute<4, 4, 2, 2>(p, block, parts, sums); break;
    case 1: compute<8, 8, 2, 2>(p, block, parts, sums); break;
    case 2: compute<8, 8, 4, 2>(p, block, parts, sums); break;
    default: compute<8, 8, 4, 4>(p, block, parts, sums); break;
    }
}

#ifdef HPCMLP_EMULATED
EXPORT(small_products, true)
#endif
