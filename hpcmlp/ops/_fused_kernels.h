/* The float32 kernels; _fused.c includes this file once per instruction set, with NAME(x) giving each set its names.

   Loops carry no branch, so that the compiler vectorises them; NaN passes through every one. Comparisons are written so
   that a NaN keeps its place (x < c ? c : x). An output may be exactly an input; VECTOR tells the compiler that such
   loops carry no dependence. Sums over a row or column run in 16 float lanes or short blocks, then in double. */

static inline float NAME(max_nan)(float x, float c) { return x < c ? c : x; }
static inline float NAME(min_nan)(float x, float c) { return x > c ? c : x; }

static inline float NAME(power2)(int32_t n)
{
    union { uint32_t i; float f; } u;
    u.i = (uint32_t)(n + 127) << 23;
    return u.f;
}

/* x = n ln 2 + r with |r| <= ln 2 / 2 (Cody and Waite's two-part ln 2); *q = expm1(r). The polynomials of this file are
   our own weighted minimax fits in float64. */
static inline int32_t NAME(reduce)(float x, float *q)
{
    union { float f; uint32_t i; } t;
    float n, r, p;
    t.f = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds to an integer in the low bits */
    n = t.f - 12582912.0f;
    r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    p = 1.39464481e-3f;
    p = p * r + 8.3665841e-3f;
    p = p * r + 4.16662821e-2f;
    p = p * r + 1.6666543e-1f;
    p = p * r + 0.5f;
    *q = p * (r * r) + r;
    return (int32_t)(t.i - 0x4B400000u);
}

static inline float NAME(exp)(float x)
{
    float q;
    int32_t n, half;
    x = NAME(min_nan)(NAME(max_nan)(x, -104.0f), 89.0f);
    n = NAME(reduce)(x, &q);
    half = n >> 1; /* two factors, so that the ends overflow to inf and underflow to 0 */
    return (q + 1.0f) * NAME(power2)(half) * NAME(power2)(n - half);
}

/* exp(x) - 1 for x <= 0 */
static inline float NAME(expm1_neg)(float x)
{
    float q, s;
    s = NAME(power2)(NAME(reduce)(NAME(max_nan)(x, -30.0f), &q));
    return s * q + (s - 1.0f);
}

/* log(1 + u) for 0 <= u <= 1 */
static inline float NAME(log1p_unit)(float u)
{
    float p = -3.24398089e-3f;
    p = p * u + 1.98512628e-2f;
    p = p * u + -5.69591593e-2f;
    p = p * u + 1.06036169e-1f;
    p = p * u + -1.53055701e-1f;
    p = p * u + 1.96759315e-1f;
    p = p * u + -2.49541321e-1f;
    p = p * u + 3.33299623e-1f;
    p = p * u + -4.99999024e-1f;
    p = p * u + 1.0f;
    return p * u;
}

static inline float NAME(tanh)(float x)
{
    float t = fabsf(x), s = x * x, e = NAME(exp)(2.0f * t), far, p;
    far = 1.0f - 2.0f / (e + 1.0f);
    p = 2.14753686e-3f;
    p = p * s + -8.18267385e-3f;
    p = p * s + 2.17029671e-2f;
    p = p * s + -5.39472043e-2f;
    p = p * s + 1.33332098e-1f;
    p = p * s + -3.33333309e-1f;
    return t < 0.625f ? p * s * x + x : copysignf(far, x);
}

static inline float NAME(erf)(float x)
{
    float t = NAME(min_nan)(fabsf(x), 4.0f), s = t * t, p, g;
    g = -2.12434938e-4f;
    g = g * t + 3.20216554e-3f;
    g = g * t + -2.28489009e-2f;
    g = g * t + 1.05197697e-1f;
    g = g * t + 6.35767102e-1f;
    g = g * t + 1.1284999f;
    p = 7.88911954e-5f;
    p = p * s + -8.02084128e-4f;
    p = p * s + 5.18953534e-3f;
    p = p * s + -2.68544446e-2f;
    p = p * s + 1.12836002e-1f;
    p = p * s + -3.76126271e-1f;
    p = p * s + 1.28379166e-1f;
    return t < 1.0f ? p * x + x : copysignf(1.0f - NAME(exp)(-t * g), x);
}

static inline float NAME(sigmoid)(float x) { return 1.0f / (1.0f + NAME(exp)(-x)); }

#define LOOP(expression) \
    VECTOR for (Index j = 0; j < n; j++) { out[j] = (expression); } \
    break;

/* out = f(z) over n elements */
static void NAME(activate)(int kind, const float *z, float *out, Index n)
{
    switch (kind) {
    case IDENTITY: if (z != out) memmove(out, z, (size_t)n * sizeof(float)); break;
    case RELU: LOOP(z[j] < 0.0f ? 0.0f : z[j])
    case LEAKY_RELU: LOOP(z[j] > 0.0f ? z[j] : 0.01f * z[j])
    case GELU: LOOP(0.5f * z[j] * (1.0f + NAME(erf)(z[j] * SQRT_HALF)))
    case SILU: LOOP(z[j] * NAME(sigmoid)(z[j]))
    case ELU: LOOP(z[j] > 0.0f ? z[j] : NAME(expm1_neg)(z[j]))
    case SELU: LOOP(SELU_SCALE * (z[j] > 0.0f ? z[j] : SELU_ALPHA * NAME(expm1_neg)(z[j])))
    case TANH: LOOP(NAME(tanh)(z[j]))
    case SIGMOID: LOOP(NAME(sigmoid)(z[j]))
    case SOFTPLUS: LOOP(NAME(max_nan)(z[j], 0.0f) + NAME(log1p_unit)(NAME(exp)(-fabsf(z[j]))))
    }
}

static inline float NAME(gelu_slope)(float z)
{
    return 0.5f * (1.0f + NAME(erf)(z * SQRT_HALF)) + z * (INV_SQRT_2PI * NAME(exp)(-0.5f * z * z));
}

static inline float NAME(silu_slope)(float z)
{
    float s = NAME(sigmoid)(z);
    return s * (1.0f + z * (1.0f - s));
}

/* out = da * f'; y is the activation's output, for GELU and SILU its input */
static void NAME(activate_backward)(int kind, const float *da, const float *y, float *out, Index n)
{
    switch (kind) {
    case IDENTITY: if (da != out) memmove(out, da, (size_t)n * sizeof(float)); break;
    case RELU: LOOP(y[j] <= 0.0f ? 0.0f : da[j])
    case LEAKY_RELU: LOOP(y[j] <= 0.0f ? 0.01f * da[j] : da[j])
    case GELU: LOOP(da[j] * NAME(gelu_slope)(NAME(min_nan)(NAME(max_nan)(y[j], -40.0f), 40.0f)))
    case SILU: LOOP(da[j] * NAME(silu_slope)(y[j]))
    case ELU: LOOP(y[j] > 0.0f ? da[j] : da[j] * (y[j] + 1.0f))
    case SELU: LOOP(da[j] * (y[j] > 0.0f ? SELU_SCALE : y[j] + SELU_SCALE * SELU_ALPHA))
    case TANH: LOOP(da[j] * (1.0f - y[j] * y[j]))
    case SIGMOID: LOOP(da[j] * (y[j] * (1.0f - y[j])))
    case SOFTPLUS: LOOP(da[j] * -NAME(expm1_neg)(-y[j]))
    }
}

static void NAME(add_bias)(const float *z, const float *b, float *out, Index n)
{
    LOOPS(out[j] = z[j] + b[j])
}

/* out = f(z + b), tile by tile; z + b is left in z when z is not out */
static void NAME(bias_activation)(int kind, Matrix z, const float *b, Matrix out)
{
    Index rows = z.cols < TILE ? TILE / z.cols : 1;
    int flat = z.ld == z.cols && out.ld == out.cols;
    for (Index i = 0; i < z.rows; i += rows) {
        Index stop = i + rows < z.rows ? i + rows : z.rows;
        if (b)
            for (Index r = i; r < stop; r++)
                NAME(add_bias)(z.data + r * z.ld, b, z.data + r * z.ld, z.cols);
        if (flat)
            NAME(activate)(kind, z.data + i * z.cols, out.data + i * z.cols, (stop - i) * z.cols);
        else
            for (Index r = i; r < stop; r++)
                NAME(activate)(kind, z.data + r * z.ld, out.data + r * out.ld, z.cols);
    }
}

/* sum[j] += the sum over rows of x, x at most STRIP columns and BLOCK_ROWS rows */
static void NAME(strip_sum)(const float *x, Index ld, Index rows, Index n, double *sum)
{
    float part[STRIP];
    Index i = 0;
    for (Index j = 0; j < n; j++)
        part[j] = 0.0f;
    for (; i + 4 <= rows; i += 4) {
        const float *a = x + i * ld, *b = a + ld, *c = b + ld, *d = c + ld;
        LOOPS(part[j] += (a[j] + b[j]) + (c[j] + d[j]))
    }
    for (; i < rows; i++) {
        const float *a = x + i * ld;
        LOOPS(part[j] += a[j])
    }
    for (Index j = 0; j < n; j++)
        sum[j] += part[j];
}

/* dz = da * f'; db = column sums of dz, of da alone when y is NULL. Strip by strip, so that the sums stay in the cache. */
static void NAME(activation_backward)(int kind, Matrix da, Matrix y, Matrix dz, float *db)
{
    double sum[STRIP];
    for (Index c = 0; c < dz.cols; c += STRIP) {
        Index n = dz.cols - c < STRIP ? dz.cols - c : STRIP;
        Index rows = TILE / n < BLOCK_ROWS ? TILE / n : BLOCK_ROWS;
        int flat = n == da.ld && n == dz.ld && n == y.ld;
        for (Index j = 0; j < n; j++)
            sum[j] = 0.0;
        for (Index i = 0; i < dz.rows; i += rows) {
            Index count = dz.rows - i < rows ? dz.rows - i : rows;
            if (y.data && flat)
                NAME(activate_backward)(kind, da.data + i * n, y.data + i * n, dz.data + i * n, count * n);
            else if (y.data)
                for (Index r = i; r < i + count; r++)
                    NAME(activate_backward)(kind, da.data + r * da.ld + c, y.data + r * y.ld + c,
                                            dz.data + r * dz.ld + c, n);
            if (db)
                NAME(strip_sum)(dz.data + i * dz.ld + c, dz.ld, count, n, sum);
        }
        if (db)
            for (Index j = 0; j < n; j++)
                db[c + j] = (float)sum[j];
    }
}

/* Sums over a row: 16 lanes over blocks of 512, the blocks in double. */
#define ROW_SUM(expression) \
    double total = 0.0; \
    for (Index start = 0; start < n; start += 512) { \
        Index stop = start + 512 < n ? start + 512 : n, j = start; \
        float lane[16] = {0}, rest = 0.0f; \
        for (; j + 16 <= stop; j += 16) \
            for (Index l = 0; l < 16; l++) { Index k = j + l; lane[l] += (expression); } \
        for (; j < stop; j++) { Index k = j; rest += (expression); } \
        for (int l = 0; l < 16; l++) total += lane[l]; \
        total += rest; \
    } \
    return total;

static double NAME(sum)(const float *x, Index n) { ROW_SUM(x[k]) }
static double NAME(dot)(const float *x, const float *y, Index n) { ROW_SUM(x[k] * y[k]) }
static double NAME(sum_centred)(const float *x, float mean, Index n) { ROW_SUM((x[k] - mean) * (x[k] - mean)) }

/* Cross entropy of `rows` rows (at most TILE_ROWS) with its gradient; d may be z. */
static void NAME(cross_entropy_tile)(Matrix z, const int32_t *target, const float *weight, Matrix d, float smoothing,
                                     const float *cw, double cw_sum, double *loss, double *weight_sum)
{
    double at_target[TILE_ROWS], spread[TILE_ROWS];
    Index n = z.cols;
    float share = smoothing / (float)n, hit = 1.0f - smoothing;
    for (Index i = 0; i < z.rows; i++) {
        const float *row = z.data + i * z.ld;
        float *out = d.data + i * d.ld, top = row[0];
        for (Index j = 1; j < n; j++)
            top = top < row[j] ? row[j] : top;
        LOOPS(out[j] = row[j] - top)
        at_target[i] = out[target[i]];
        spread[i] = smoothing == 0.0f ? 0.0 : cw ? NAME(dot)(cw, out, n) : NAME(sum)(out, n);
    }
    if (d.ld == n) {
        float *out = d.data;
        VECTOR for (Index j = 0; j < n * z.rows; j++) out[j] = NAME(exp)(out[j]);
    } else
        for (Index i = 0; i < z.rows; i++) {
            float *out = d.data + i * d.ld;
            LOOPS(out[j] = NAME(exp)(out[j]))
        }
    for (Index i = 0; i < z.rows; i++) {
        float *out = d.data + i * d.ld, factor, even, mine;
        double total = NAME(sum)(out, n), mass;
        mine = cw ? cw[target[i]] : 1.0f;
        mass = (double)hit * mine + (double)share * (cw ? cw_sum : (double)n);
        double w = weight ? weight[i] : 1.0;
        *loss += w * (mass * log(total) - (double)hit * mine * at_target[i] - (double)share * spread[i]);
        *weight_sum += w * mine;
        factor = (float)(w * mass / total);
        even = (float)(w * share);
        if (smoothing == 0.0f)
            LOOPS(out[j] *= factor)
        else if (cw)
            LOOPS(out[j] = out[j] * factor - even * cw[j])
        else
            LOOPS(out[j] = out[j] * factor - even)
        out[target[i]] -= (float)(w * hit * mine);
    }
}

static void NAME(cross_entropy)(Matrix z, const int32_t *target, const float *weight, Matrix d, float smoothing,
                                const float *cw, double *loss, double *weight_sum)
{
    double cw_sum = cw ? NAME(sum)(cw, z.cols) : 0.0;
    Index rows = z.rows;
    for (Index i = 0; i < rows; i += TILE_ROWS) {
        z.rows = rows - i < TILE_ROWS ? rows - i : TILE_ROWS;
        NAME(cross_entropy_tile)(z, target + i, weight ? weight + i : NULL, d, smoothing, cw, cw_sum, loss, weight_sum);
        z.data += TILE_ROWS * z.ld;
        d.data += TILE_ROWS * d.ld;
    }
}

#define PAIR(...) \
    VECTOR for (Index j = 0; j < n; j++) { float z = a[j], t = b[j]; __VA_ARGS__ } \
    break;

/* value = loss of each element, d = factor * its gradient */
static void NAME(element_loss)(int kind, const float *a, const float *b, float *value, float *d, Index n, float factor,
                               float delta)
{
    switch (kind) {
    case BINARY_CROSS_ENTROPY:
        PAIR(float e = NAME(exp)(-fabsf(z)); value[j] = NAME(max_nan)(z, 0.0f) - z * t + NAME(log1p_unit)(e);
             d[j] = ((z >= 0.0f ? 1.0f : e) / (1.0f + e) - t) * factor;)
    case MEAN_SQUARED:
        PAIR(float x = z - t; value[j] = x * x; d[j] = 2.0f * factor * x;)
    case MEAN_ABSOLUTE:
        PAIR(float x = z - t; value[j] = fabsf(x); d[j] = (x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x) * factor;)
    case HUBER:
        PAIR(float x = z - t, c = NAME(min_nan)(NAME(max_nan)(x, -delta), delta); value[j] = c * (x - 0.5f * c);
             d[j] = c * factor;)
    }
}

/* Losses that are means over the columns; all three matrices contiguous */
static void NAME(mean_loss)(int kind, Matrix z, Matrix t, const float *weight, Matrix d, float delta, double *loss,
                            double *weight_sum)
{
    float value[TILE], factor = 1.0f / (float)z.cols;
    double sum = 0.0;
    if (!weight) {
        Index size = z.rows * z.cols;
        for (Index j = 0; j < size; j += TILE) {
            Index n = size - j < TILE ? size - j : TILE;
            NAME(element_loss)(kind, z.data + j, t.data + j, value, d.data + j, n, factor, delta);
            sum += NAME(sum)(value, n);
        }
        *weight_sum += (double)z.rows;
    }
    for (Index i = 0; weight && i < z.rows; i++) {
        double row = 0.0;
        for (Index j = 0; j < z.cols; j += TILE) {
            Index n = z.cols - j < TILE ? z.cols - j : TILE, at = i * z.cols + j;
            NAME(element_loss)(kind, z.data + at, t.data + at, value, d.data + at, n, factor * weight[i], delta);
            row += NAME(sum)(value, n);
        }
        sum += row * weight[i];
        *weight_sum += weight[i];
    }
    *loss += sum / (double)z.cols;
}

static void NAME(layer_norm)(Matrix x, const float *gamma, const float *beta, Matrix out, float *mean, float *rstd,
                             double eps)
{
    Index n = x.cols;
    for (Index i = 0; i < x.rows; i++) {
        const float *row = x.data + i * x.ld;
        float *o = out.data + i * out.ld;
        float m = (float)(NAME(sum)(row, n) / (double)n);
        float r = (float)(1.0 / sqrt(NAME(sum_centred)(row, m, n) / (double)n + eps));
        LOOPS(o[j] = (row[j] - m) * r * gamma[j] + beta[j])
        mean[i] = m;
        rstd[i] = r;
    }
}

/* dgamma and dbeta of one strip of columns; before dx overwrites dout, which it may be */
static void NAME(norm_sums)(Matrix dout, Matrix x, const float *mean, const float *rstd, Index c, Index n,
                            float *dgamma, float *dbeta)
{
    double gamma_sum[STRIP], beta_sum[STRIP];
    float part[STRIP];
    for (Index j = 0; j < n; j++)
        gamma_sum[j] = beta_sum[j] = 0.0;
    for (Index i = 0; i < x.rows; i += BLOCK_ROWS) {
        Index count = x.rows - i < BLOCK_ROWS ? x.rows - i : BLOCK_ROWS;
        NAME(strip_sum)(dout.data + i * dout.ld + c, dout.ld, count, n, beta_sum);
        for (Index j = 0; j < n; j++)
            part[j] = 0.0f;
        for (Index r = i; r < i + count; r++) {
            const float *g = dout.data + r * dout.ld + c, *row = x.data + r * x.ld + c;
            float m = mean[r], s = rstd[r];
            LOOPS(part[j] += g[j] * ((row[j] - m) * s))
        }
        for (Index j = 0; j < n; j++)
            gamma_sum[j] += part[j];
    }
    for (Index j = 0; j < n; j++) {
        dgamma[c + j] = (float)gamma_sum[j];
        dbeta[c + j] = (float)beta_sum[j];
    }
}

static double NAME(norm_dot)(const float *g, const float *gamma, const float *x, float m, float s, Index n)
{
    ROW_SUM(g[k] * gamma[k] * ((x[k] - m) * s))
}

static void NAME(layer_norm_backward)(Matrix dout, Matrix x, const float *gamma, const float *mean, const float *rstd,
                                      Matrix dx, float *dgamma, float *dbeta)
{
    Index n = x.cols;
    for (Index c = 0; c < n; c += STRIP)
        NAME(norm_sums)(dout, x, mean, rstd, c, n - c < STRIP ? n - c : STRIP, dgamma, dbeta);
    for (Index i = 0; i < x.rows; i++) {
        const float *g = dout.data + i * dout.ld, *row = x.data + i * x.ld;
        float *o = dx.data + i * dx.ld, m = mean[i], s = rstd[i];
        float even = (float)(NAME(dot)(g, gamma, n) / (double)n);
        float along = (float)(NAME(norm_dot)(g, gamma, row, m, s, n) / (double)n);
        LOOPS(o[j] = (g[j] * gamma[j] - even - (row[j] - m) * s * along) * s)
    }
}

/* The hash of counter.py: mask = bits(row key, column) >= threshold */
static void NAME(dropout_mask)(uint8_t *mask, Index rows, Index n, Index ld, uint32_t threshold, uint64_t base,
                               uint64_t first)
{
    for (Index i = 0; i < rows; i++) {
        uint64_t key = splitmix64(base ^ (first + (uint64_t)i));
        uint32_t low = (uint32_t)key, high = (uint32_t)(key >> 32);
        uint8_t *out = mask + i * ld;
        VECTOR for (Index j = 0; j < n; j++) {
            uint32_t bits = (uint32_t)j * 0x9E3779B9u + low;
            bits ^= bits >> 16;
            bits *= 0x7FEB352Du;
            bits ^= high;
            bits ^= bits >> 15;
            bits *= 0x846CA68Bu;
            bits ^= bits >> 16;
            out[j] = bits >= threshold;
        }
    }
}

static void NAME(dropout)(const float *a, const uint8_t *mask, float factor, float *out, Index n)
{
    LOOPS(out[j] = a[j] * (float)(mask[j] != 0) * factor)
}

#define GATHER_ROW(type) \
    static void NAME(gather_##type)(const type *row, const float *shift, const float *scale, float *out, Index n) \
    { \
        if (shift && scale) \
            LOOPS(out[j] = ((float)row[j] - shift[j]) * scale[j]) \
        else if (shift) \
            LOOPS(out[j] = (float)row[j] - shift[j]) \
        else if (scale) \
            LOOPS(out[j] = (float)row[j] * scale[j]) \
        else \
            LOOPS(out[j] = (float)row[j]) \
    }
GATHER_ROW(uint8_t)
GATHER_ROW(float)

static void NAME(add_scaled)(float *p, const float *u, float factor, Index n) { LOOPS(p[j] += u[j] * factor) }

static double NAME(sum_squares)(const float *x, Index n)
{
    double lane[16] = {0}, total = 0.0;
    Index j = 0;
    for (; j + 16 <= n; j += 16)
        for (int l = 0; l < 16; l++)
            lane[l] += (double)x[j + l] * (double)x[j + l];
    for (; j < n; j++)
        total += (double)x[j] * (double)x[j];
    for (int l = 0; l < 16; l++)
        total += lane[l];
    return total;
}

static int NAME(finite)(const uint32_t *bits, Index n)
{
    for (Index start = 0; start < n; start += 4096) {
        Index stop = start + 4096 < n ? start + 4096 : n;
        uint32_t bad = 0;
        for (Index j = start; j < stop; j++)
            bad |= (bits[j] & 0x7F800000u) == 0x7F800000u;
        if (bad)
            return 0;
    }
    return 1;
}

/* The wrapping 64-bit sum of word i times (2 i + 1) */
static uint64_t NAME(checksum)(const uint32_t *word, Index n)
{
    uint64_t total = 0;
    for (Index start = 0; start < n; start += 1 << 16) {
        uint32_t count = (uint32_t)(n - start < 1 << 16 ? n - start : 1 << 16);
        uint64_t within = 0, plain = 0;
        for (uint32_t j = 0; j < count; j++) {
            within += (uint64_t)word[start + j] * (2u * j + 1u);
            plain += word[start + j];
        }
        total += within + 2u * (uint64_t)start * plain;
    }
    return total;
}

static void NAME(sgd)(float *p, const float *g, float *buf, Index n, float lr, float momentum, float keep,
                      int nesterov, float decay, float grad_scale)
{
    if (!buf)
        LOOPS(p[j] -= lr * (g[j] * grad_scale + decay * p[j]))
    else if (nesterov)
        LOOPS(float d = g[j] * grad_scale + decay * p[j]; float s = momentum * buf[j] + keep * d; buf[j] = s;
              p[j] -= lr * (d + momentum * s))
    else
        LOOPS(float d = g[j] * grad_scale + decay * p[j]; float s = momentum * buf[j] + keep * d; buf[j] = s;
              p[j] -= lr * s)
}

/* decay: coupled weight decay; shrink: 1 - lr * decoupled weight decay; root: 1 / sqrt(1 - beta2^step) */
static void NAME(adam)(float *p, const float *g, float *m, float *v, Index n, const float *k)
{
    float rate = k[0], gain1 = k[1], beta2 = k[2], gain2 = k[3], eps = k[4], decay = k[5], shrink = k[6], root = k[7];
    float grad_scale = k[8];
    LOOPS(float d = g[j] * grad_scale + decay * p[j]; float first = m[j] + gain1 * (d - m[j]);
          float second = beta2 * v[j] + gain2 * (d * d); m[j] = first; v[j] = second;
          p[j] = p[j] * shrink - rate * first / (sqrtf(second) * root + eps))
}

static void NAME(adam_direction)(const float *p, const float *g, float *m, float *v, float *u, Index n, const float *k)
{
    float rate = k[0], gain1 = k[1], beta2 = k[2], gain2 = k[3], eps = k[4], decay = k[5], root = k[6];
    float grad_scale = k[7];
    LOOPS(float d = g[j] * grad_scale; float first = m[j] + gain1 * (d - m[j]);
          float second = beta2 * v[j] + gain2 * (d * d); m[j] = first; v[j] = second;
          u[j] = rate * first / (sqrtf(second) * root + eps) + decay * p[j])
}

static void NAME(rmsprop)(float *p, const float *g, float *v, float *buf, Index n, float lr, float alpha, float gain,
                          float eps, float momentum, float decay, float grad_scale)
{
    if (buf)
        LOOPS(float d = g[j] * grad_scale + decay * p[j]; float second = alpha * v[j] + gain * (d * d); v[j] = second;
              float u = momentum * buf[j] + d / (sqrtf(second) + eps); buf[j] = u; p[j] -= lr * u)
    else
        LOOPS(float d = g[j] * grad_scale + decay * p[j]; float second = alpha * v[j] + gain * (d * d); v[j] = second;
              p[j] -= lr * d / (sqrtf(second) + eps))
}

static void NAME(adagrad)(float *p, const float *g, float *s, Index n, float rate, float eps, float decay,
                          float grad_scale)
{
    LOOPS(float d = g[j] * grad_scale + decay * p[j]; float second = s[j] + d * d; s[j] = second;
          p[j] -= rate * (d / (sqrtf(second) + eps)))
}

static void NAME(ema)(float *e, const float *p, float gain, Index n) { LOOPS(e[j] += gain * (p[j] - e[j])) }

/* Sum of the sources in their order, element by element, written to every target; a target may be one of the sources.
   Tile by tile, so that the running sum stays in the first cache and memory is read once and written once. */
#define SUM_OF(type) \
static void NAME(sum_##type)(const Array *target, int targets, const Array *source, int sources) \
{ \
    type sum[TILE]; \
    for (Index start = 0; start < source->size; start += TILE) { \
        Index n = source->size - start < TILE ? source->size - start : TILE; \
        const type *a = (const type *)source[0].data + start; \
        const type *b = (const type *)source[sources > 1].data + start; \
        if (sources == 2 && targets == 1) { \
            type *to = (type *)target[0].data + start; \
            LOOPS(to[j] = a[j] + b[j]) \
            continue; \
        } \
        if (sources == 2 && targets == 2) { \
            type *to = (type *)target[0].data + start, *too = (type *)target[1].data + start; \
            LOOPS(type s = a[j] + b[j]; to[j] = s; too[j] = s) \
            continue; \
        } \
        if (sources == 1) \
            memcpy(sum, a, (size_t)n * sizeof(type)); \
        else \
            LOOPS(sum[j] = a[j] + b[j]) \
        for (int k = 2; k < sources; k++) { \
            const type *next = (const type *)source[k].data + start; \
            LOOPS(sum[j] += next[j]) \
        } \
        for (int k = 0; k < targets; k++) \
            memcpy((type *)target[k].data + start, sum, (size_t)n * sizeof(type)); \
    } \
}
SUM_OF(float)
SUM_OF(double)
#undef SUM_OF

#include "_fused_wire.h"

static const Kernels NAME(kernels) = {
    NAME(bias_activation), NAME(activation_backward), NAME(cross_entropy), NAME(mean_loss), NAME(layer_norm),
    NAME(layer_norm_backward), NAME(dropout_mask), NAME(dropout), NAME(gather_uint8_t), NAME(gather_float),
    NAME(add_scaled), NAME(sum_squares), NAME(finite), NAME(checksum), NAME(sgd), NAME(adam), NAME(adam_direction),
    NAME(rmsprop), NAME(adagrad), NAME(ema), NAME(wire), NAME(sum_float), NAME(sum_double),
};
