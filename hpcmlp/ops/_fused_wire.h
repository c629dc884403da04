/* Narrow numbers for messages, as comm/wire.py defines them; _fused.c includes this file once per instruction set.

   A tile is what int8 gives one scale. Whatever is done with a tile happens in the first cache, so that an action costs
   one pass over its arrays. These kernels run without flushing of denormals: half precision has some that count, and
   the NumPy form must find the same bits. */

static inline int32_t NAME(bits)(float x)
{
    union { float f; int32_t i; } u;
    u.f = x;
    return u.i;
}

static inline float NAME(from_bits)(int32_t bits)
{
    union { int32_t i; float f; } u;
    u.i = bits;
    return u.f;
}

static inline uint16_t NAME(to_bf16)(float x)
{
    uint32_t b = (uint32_t)NAME(bits)(x), rounded = (b + 0x7FFFu + ((b >> 16) & 1u)) >> 16, nan = b >> 16 | 0x40u;
    return (uint16_t)((int32_t)(b & 0x7FFFFFFFu) > 0x7F800000 ? nan : rounded);
}

/* Below 2^-14 half precision has steps of 2^-24, which are those of float32 from 0.5 on */
static inline uint16_t NAME(to_half)(float x)
{
    int32_t all = NAME(bits)(x), b = all & 0x7FFFFFFF, finite = b > 0x477FE000 ? 0x477FE000 : b;
    int32_t normal = (finite + 0xFFF + ((finite >> 13) & 1) - 0x38000000) >> 13;
    int32_t tiny = NAME(bits)(NAME(from_bits)(finite) + 0.5f) - 0x3F000000;
    int32_t half = finite < 0x38800000 ? tiny : normal;
    half = b < 0x7F800000 ? half : b > 0x7F800000 ? 0x7E00 : 0x7C00;
    return (uint16_t)(half | (int32_t)((uint32_t)all >> 16 & 0x8000u));
}

static inline float NAME(from_half)(uint16_t h)
{
    int32_t b = (h & 0x7FFF) << 13, sign = (int32_t)((uint32_t)(h & 0x8000) << 16);
    int32_t scaled = NAME(bits)(NAME(from_bits)(b) * 0x1p112f);
    return NAME(from_bits)(sign | scaled | (b >= 0x0F800000 ? 0x7F800000 : 0));
}

static void NAME(halves_of)(const float *x, uint16_t *h, Index n)
{
    Index j = 0;
#ifdef USE_F16C
    const __m256 largest = _mm256_set1_ps(65504.0f), sign = _mm256_set1_ps(-0.0f), infinite = _mm256_set1_ps(INFINITY);
    for (; j + 8 <= n; j += 8) {
        __m256 v = _mm256_loadu_ps(x + j), near = _mm256_min_ps(_mm256_max_ps(v, _mm256_xor_ps(largest, sign)), largest);
        v = _mm256_blendv_ps(v, near, _mm256_cmp_ps(_mm256_andnot_ps(sign, v), infinite, _CMP_LT_OQ));
        _mm_storeu_si128((__m128i *)(h + j), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
#endif
    VECTOR for (; j < n; j++) h[j] = NAME(to_half)(x[j]);
}

static void NAME(of_halves)(const uint16_t *h, float *x, Index n)
{
    Index j = 0;
#ifdef USE_F16C
    for (; j + 8 <= n; j += 8)
        _mm256_storeu_ps(x + j, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(h + j))));
#endif
    VECTOR for (; j < n; j++) x[j] = NAME(from_half)(h[j]);
}

/* One byte each; returns the scale: NaN when a number is not finite */
static float NAME(bytes_of)(const float *x, int8_t *out, Index n)
{
    int32_t largest = 0;
    float scale;
    for (Index j = 0; j < n; j++) { /* integers order as the magnitudes do, NaN last */
        int32_t size = NAME(bits)(x[j]) & 0x7FFFFFFF;
        largest = size > largest ? size : largest;
    }
    if (largest >= 0x7F800000) {
        memset(out, 0, (size_t)n);
        return NAME(from_bits)(0x7FC00000);
    }
    scale = NAME(from_bits)(largest) / 127.0f;
    scale = scale < SMALLEST_SCALE ? SMALLEST_SCALE : scale > LARGEST_SCALE ? LARGEST_SCALE : scale;
    /* 1.5 * 2^23: rounds to an integer in the low bits */
    LOOPS(out[j] = (int8_t)(NAME(bits)(x[j] / scale + 12582912.0f) - 0x4B400000))
    return scale;
}

/* Where the numbers and the scale of the tile at element `at` of `n` lie */
static inline uint8_t *NAME(place)(int kind, uint8_t *data, Index at, Index n, uint8_t **scale)
{
    *scale = data + at / WIRE_TILE * 4;
    return kind == INT8 ? data + (n + WIRE_TILE - 1) / WIRE_TILE * 4 + at : data + 2 * at;
}

static void NAME(narrow)(int kind, const float *x, uint8_t *data, uint8_t *scale_place, Index n)
{
    uint16_t *halves = (uint16_t *)data;
    float scale;
    switch (kind) {
    case BF16: LOOPS(halves[j] = NAME(to_bf16)(x[j])) break;
    case FLOAT16: NAME(halves_of)(x, halves, n); break;
    case INT8:
        scale = NAME(bytes_of)(x, (int8_t *)data, n);
        memcpy(scale_place, &scale, 4);
        break;
    }
}

static void NAME(widen)(int kind, const uint8_t *data, const uint8_t *scale_place, float *x, Index n)
{
    const uint16_t *halves = (const uint16_t *)data;
    const int8_t *bytes = (const int8_t *)data;
    float scale;
    switch (kind) {
    case BF16: LOOPS(x[j] = NAME(from_bits)((int32_t)((uint32_t)halves[j] << 16))) break;
    case FLOAT16: NAME(of_halves)(halves, x, n); break;
    case INT8:
        memcpy(&scale, scale_place, 4);
        LOOPS(x[j] = (float)bytes[j] * scale)
        break;
    }
}

/* own += rest; data = own; rest = what data leaves of it, without what is not finite or below the normal numbers */
static void NAME(round_tile)(int kind, float *own, float *rest, uint8_t *data, uint8_t *scale, Index n)
{
    float decoded[WIRE_TILE];
    LOOPS(own[j] += rest[j])
    NAME(narrow)(kind, own, data, scale, n);
    NAME(widen)(kind, data, scale, decoded, n);
    LOOPS(float left = own[j] - decoded[j]; int32_t size = NAME(bits)(left) & 0x7FFFFFFF;
          rest[j] = (size >= 0x00800000) & (size < 0x7F800000) ? left : 0.0f)
}

/* data = own - replica; then own = replica + data, and replica = what own was */
static void NAME(towards_tile)(int kind, float *own, float *replica, uint8_t *data, uint8_t *scale, Index n)
{
    float moved[WIRE_TILE];
    LOOPS(moved[j] = own[j] - replica[j])
    NAME(narrow)(kind, moved, data, scale, n);
    NAME(widen)(kind, data, scale, moved, n);
    LOOPS(float master = own[j]; own[j] = replica[j] + moved[j]; replica[j] = master)
}

static void NAME(wire)(int action, int kind, uint8_t *data, float *values, float *other, Index size)
{
    float decoded[WIRE_TILE];
    for (Index at = 0; at < size; at += WIRE_TILE) {
        Index n = size - at < WIRE_TILE ? size - at : WIRE_TILE;
        uint8_t *scale, *numbers = NAME(place)(kind, data, at, size, &scale);
        float *x = values + at;
        switch (action) {
        case ENCODE: NAME(narrow)(kind, x, numbers, scale, n); break;
        case DECODE: NAME(widen)(kind, numbers, scale, x, n); break;
        case ROUND: NAME(round_tile)(kind, x, other + at, numbers, scale, n); break;
        case TOWARDS: NAME(towards_tile)(kind, x, other + at, numbers, scale, n); break;
        case ADD:
            NAME(widen)(kind, numbers, scale, decoded, n);
            LOOPS(x[j] += decoded[j])
            break;
        }
    }
}
