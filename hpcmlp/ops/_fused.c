/* The float32 operations of ops/host.py as single passes over their arrays, called with any buffers of the right type;
   what the ranks of a node do in their shared memory is in _fused_node.h.

   Each argument is checked (element type, shape, row stride, alignment), so that a wrong call raises and never writes
   astray. The kernels are compiled once for the baseline and, on x86-64, once for AVX2 with FMA and F16C; the choice is
   made when the module loads. While they run, but for those of messages, denormal results are flushed to zero: moments
   that decay towards zero would otherwise slow some processors a hundredfold. The GIL is released around long loops
   only. */

#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#endif
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_AVX2 1
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__SSE__) || defined(__x86_64__)
#include <xmmintrin.h>
#define FLUSH_DENORMALS unsigned int control = _mm_getcsr(); _mm_setcsr(control | 0x8040);
#define RESTORE_DENORMALS _mm_setcsr(control);
#else
#define FLUSH_DENORMALS
#define RESTORE_DENORMALS
#endif

#if defined(__clang__)
#define VECTOR _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define VECTOR _Pragma("GCC ivdep")
#else
#define VECTOR
#endif
#define LOOPS(...) { VECTOR for (Index j = 0; j < n; j++) { __VA_ARGS__; } }

#define TILE 2048      /* elements between two passes that must find them in the first cache */
#define TILE_ROWS 64
#define STRIP 512      /* columns whose sums are kept at once */
#define BLOCK_ROWS 64  /* rows summed in float before they are added in double */
#define LONG 32768     /* elements from which the GIL is released */
#define WIRE_TILE 256  /* numbers that share a scale in comm/wire.py */
#define SMALLEST_SCALE 0x1p-126f            /* where neither x / scale nor 127 * scale can leave float32 */
#define LARGEST_SCALE 0x1.020406p+121f      /* the float32 before its largest number / 127 */
#define SQRT_HALF 0.70710678f
#define INV_SQRT_2PI 0.39894228f
#define SELU_SCALE 1.05070099f
#define SELU_ALPHA 1.67326324f

typedef Py_ssize_t Index;
enum { IDENTITY, RELU, LEAKY_RELU, GELU, SILU, ELU, SELU, TANH, SIGMOID, SOFTPLUS, ACTIVATIONS };
enum { BINARY_CROSS_ENTROPY, MEAN_SQUARED, MEAN_ABSOLUTE, HUBER, MEAN_LOSSES };
enum { BF16, FLOAT16, INT8, WIRES };
enum { ENCODE, DECODE, ROUND, ADD, TOWARDS, WIRE_ACTIONS };

typedef struct {
    float *data;
    Index rows, cols, ld; /* ld: elements from one row to the next */
} Matrix;

typedef struct {
    char *data;
    Index rows, cols, ld, size;
    Py_buffer view;
} Array;

typedef struct {
    void (*bias_activation)(int, Matrix, const float *, Matrix);
    void (*activation_backward)(int, Matrix, Matrix, Matrix, float *);
    void (*cross_entropy)(Matrix, const int32_t *, const float *, Matrix, float, const float *, double *, double *);
    void (*mean_loss)(int, Matrix, Matrix, const float *, Matrix, float, double *, double *);
    void (*layer_norm)(Matrix, const float *, const float *, Matrix, float *, float *, double);
    void (*layer_norm_backward)(Matrix, Matrix, const float *, const float *, const float *, Matrix, float *, float *);
    void (*dropout_mask)(uint8_t *, Index, Index, Index, uint32_t, uint64_t, uint64_t);
    void (*dropout)(const float *, const uint8_t *, float, float *, Index);
    void (*gather_u8)(const uint8_t *, const float *, const float *, float *, Index);
    void (*gather_f32)(const float *, const float *, const float *, float *, Index);
    void (*add_scaled)(float *, const float *, float, Index);
    double (*sum_squares)(const float *, Index);
    int (*finite)(const uint32_t *, Index);
    uint64_t (*checksum)(const uint32_t *, Index);
    void (*sgd)(float *, const float *, float *, Index, float, float, float, int, float, float);
    void (*adam)(float *, const float *, float *, float *, Index, const float *);
    void (*adam_direction)(const float *, const float *, float *, float *, float *, Index, const float *);
    void (*rmsprop)(float *, const float *, float *, float *, Index, float, float, float, float, float, float, float);
    void (*adagrad)(float *, const float *, float *, Index, float, float, float, float);
    void (*ema)(float *, const float *, float, Index);
    void (*wire)(int, int, uint8_t *, float *, float *, Index);
    void (*sum_float)(const Array *, int, const Array *, int);
    void (*sum_double)(const Array *, int, const Array *, int);
} Kernels;

static inline uint64_t splitmix64(uint64_t key)
{
    key += 0x9E3779B97F4A7C15u;
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9u;
    key = (key ^ (key >> 27)) * 0x94D049BB133111EBu;
    return key ^ (key >> 31);
}

#define NAME(x) baseline_##x
#include "_fused_kernels.h"
#undef NAME
#undef LOOP
#undef PAIR
#undef ROW_SUM
#undef GATHER_ROW

#ifdef HAVE_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define NAME(x) avx2_##x
#define USE_F16C
#include "_fused_kernels.h"
#undef NAME
#undef USE_F16C
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

static const Kernels *kernels = &baseline_kernels; /* set once, when the module loads */

/* Arguments */

#define MAX_ARRAYS 8
typedef struct {
    const char *function;
    Array a[MAX_ARRAYS];
    int count;
    int failed;
} Arrays;

enum { READ = 0, WRITE = 1, OPTIONAL = 2 };

static void release(Arrays *arrays)
{
    for (int i = 0; i < arrays->count; i++)
        PyBuffer_Release(&arrays->a[i].view);
}

/* Put into `array` the shape of its buffer, or say what is wrong with it */
static const char *measure(Array *array, const char *formats, int ndim)
{
    const Py_buffer *view = &array->view;
    const char *format = view->format ? view->format : "B";
    Index item = view->itemsize;
    if (!strchr(formats, format[0]) || format[1] != '\0')
        return "has the wrong element type";
    if (view->ndim != ndim)
        return "has the wrong number of dimensions";
    if ((uintptr_t)view->buf % (uintptr_t)item)
        return "is not aligned to its elements";
    array->data = view->buf;
    array->rows = ndim == 2 ? view->shape[0] : 1;
    array->cols = view->shape[ndim - 1];
    array->size = array->rows * array->cols;
    array->ld = array->cols;
    if (array->size == 0)
        return NULL;
    if (array->cols > 1 && view->strides[ndim - 1] != item)
        return "is not contiguous along its rows";
    if (array->rows > 1) {
        array->ld = view->strides[0] / item;
        if (view->strides[0] % item || array->ld < array->cols)
            return "has rows that overlap or do not fall on elements";
    }
    return NULL;
}

/* Take the next argument as an array of `ndim` dimensions whose format letter is in `formats`. None gives data == NULL
   where it is allowed. After a failure every further call returns an empty array. */
static Array *take(Arrays *arrays, PyObject *object, const char *formats, int ndim, int how)
{
    static Array nothing; /* never written */
    Array *array = &arrays->a[arrays->count];
    const char *wrong;
    if (arrays->failed || (object == Py_None && how & OPTIONAL))
        return &nothing;
    if (PyObject_GetBuffer(object, &array->view, PyBUF_STRIDES | PyBUF_FORMAT | (how & WRITE ? PyBUF_WRITABLE : 0))) {
        arrays->failed = 1;
        return &nothing;
    }
    wrong = measure(array, formats, ndim);
    arrays->count++;
    if (!wrong)
        return array;
    PyErr_Format(PyExc_ValueError, "%s: array %d %s", arrays->function, arrays->count, wrong);
    arrays->failed = 1;
    return &nothing;
}

static int refuse(Arrays *arrays, const char *text)
{
    if (!arrays->failed)
        PyErr_Format(PyExc_ValueError, "%s: %s", arrays->function, text);
    return arrays->failed = 1;
}

static int same_shape(Arrays *arrays, const Array *a, const Array *b)
{
    if (arrays->failed)
        return 0;
    if (a->rows == b->rows && a->cols == b->cols)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s: shapes (%zd, %zd) and (%zd, %zd) do not agree", arrays->function, a->rows,
                 a->cols, b->rows, b->cols);
    arrays->failed = 1;
    return 0;
}

static int has_length(Arrays *arrays, const Array *a, Index length)
{
    return arrays->failed || !a->data || a->size == length ? !arrays->failed : !refuse(arrays, "lengths do not agree");
}

static Matrix matrix(const Array *a) { return (Matrix){(float *)a->data, a->rows, a->cols, a->ld}; }

static double number(Arrays *arrays, PyObject *object)
{
    double value = arrays->failed ? 0.0 : PyFloat_AsDouble(object);
    if (value == -1.0 && !arrays->failed && PyErr_Occurred())
        arrays->failed = 1;
    return value;
}

static int code(Arrays *arrays, PyObject *object, int limit)
{
    long value = arrays->failed ? 0 : PyLong_AsLong(object);
    if (!arrays->failed && (value < 0 || value >= limit)) {
        PyErr_Clear();
        refuse(arrays, "no such kind");
    }
    return (int)value;
}

static uint64_t word(Arrays *arrays, PyObject *object)
{
    uint64_t value = arrays->failed ? 0 : PyLong_AsUnsignedLongLong(object);
    if (value == UINT64_MAX && !arrays->failed && PyErr_Occurred())
        arrays->failed = 1;
    return value;
}

/* Every function below: take the arguments, check how they fit, RUN the kernel, return. */
#define BEGIN(name, wanted) \
    Arrays all = {.function = name, .count = 0, .failed = 0}; \
    (void)self; \
    if (nargs != wanted) { \
        PyErr_Format(PyExc_TypeError, "%s takes %d arguments, not %zd", name, wanted, nargs); \
        return NULL; \
    }
#define RUN(elements, call) \
    if (!all.failed) { \
        PyThreadState *state = (elements) > LONG ? PyEval_SaveThread() : NULL; \
        FLUSH_DENORMALS \
        call; \
        RESTORE_DENORMALS \
        if (state) \
            PyEval_RestoreThread(state); \
    } \
    release(&all); \
    if (all.failed) \
        return NULL;
#define METHOD(name) static PyObject *py_##name(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
#define VECTORS(name, wanted) BEGIN(name, wanted) Array *p = take(&all, args[0], "f", 1, WRITE);

/* bias_activation(kind, z, b, out) */
METHOD(bias_activation)
{
    BEGIN("bias_activation", 4)
    int kind = code(&all, args[0], ACTIVATIONS);
    Array *z = take(&all, args[1], "f", 2, WRITE), *b = take(&all, args[2], "f", 1, OPTIONAL);
    Array *out = take(&all, args[3], "f", 2, WRITE);
    if (same_shape(&all, z, out))
        has_length(&all, b, z->cols);
    RUN(z->size, if (z->size) kernels->bias_activation(kind, matrix(z), (float *)b->data, matrix(out)))
    Py_RETURN_NONE;
}

/* activation_backward(kind, da, y, dz, db); y is the output, or the input for the kinds that need it */
METHOD(activation_backward)
{
    BEGIN("activation_backward", 5)
    int kind = code(&all, args[0], ACTIVATIONS);
    Array *da = take(&all, args[1], "f", 2, READ), *y = take(&all, args[2], "f", 2, READ);
    Array *dz = take(&all, args[3], "f", 2, WRITE), *db = take(&all, args[4], "f", 1, WRITE | OPTIONAL);
    if (same_shape(&all, da, dz) && same_shape(&all, y, dz))
        has_length(&all, db, dz->cols);
    RUN(dz->size, kernels->activation_backward(kind, matrix(da), matrix(y), matrix(dz), (float *)db->data))
    Py_RETURN_NONE;
}

/* column_sum(dz, db) */
METHOD(column_sum)
{
    BEGIN("column_sum", 2)
    Array *dz = take(&all, args[0], "f", 2, READ), *db = take(&all, args[1], "f", 1, WRITE);
    Matrix none = {NULL, 0, 0, 0};
    has_length(&all, db, dz->cols);
    RUN(dz->size, kernels->activation_backward(IDENTITY, matrix(dz), none, matrix(dz), (float *)db->data))
    Py_RETURN_NONE;
}

/* cross_entropy(z, targets, weights, dz, smoothing, class_weights) -> (loss, weight) */
METHOD(cross_entropy)
{
    BEGIN("cross_entropy", 6)
    double loss = 0.0, weight_sum = 0.0;
    Array *z = take(&all, args[0], "f", 2, READ), *targets = take(&all, args[1], "il", 1, READ);
    Array *weights = take(&all, args[2], "f", 1, OPTIONAL), *dz = take(&all, args[3], "f", 2, WRITE);
    double smoothing = number(&all, args[4]);
    Array *cw = take(&all, args[5], "f", 1, OPTIONAL);
    const int32_t *label = (const int32_t *)targets->data;
    if (same_shape(&all, z, dz) && has_length(&all, weights, z->rows) && has_length(&all, cw, z->cols) &&
        (targets->size != z->rows || targets->view.itemsize != 4))
        refuse(&all, "targets must be one int32 per row");
    for (Index i = 0; !all.failed && i < z->rows; i++)
        if (label[i] < 0 || label[i] >= z->cols) {
            PyErr_Format(PyExc_IndexError, "label %d of row %zd is outside 0..%zd", (int)label[i], i, z->cols - 1);
            all.failed = 1;
        }
    RUN(z->size, kernels->cross_entropy(matrix(z), label, (float *)weights->data, matrix(dz), (float)smoothing,
                                        (float *)cw->data, &loss, &weight_sum))
    return Py_BuildValue("dd", loss, weight_sum);
}

/* mean_loss(kind, z, targets, weights, dz, delta) -> (loss, weight) */
METHOD(mean_loss)
{
    BEGIN("mean_loss", 6)
    double loss = 0.0, weight_sum = 0.0;
    int kind = code(&all, args[0], MEAN_LOSSES);
    Array *z = take(&all, args[1], "f", 2, READ), *targets = take(&all, args[2], "f", 2, READ);
    Array *weights = take(&all, args[3], "f", 1, OPTIONAL), *dz = take(&all, args[4], "f", 2, WRITE);
    double delta = number(&all, args[5]);
    if (same_shape(&all, z, dz) && same_shape(&all, targets, z) && has_length(&all, weights, z->rows) &&
        (z->ld != z->cols || dz->ld != z->cols || targets->ld != z->cols))
        refuse(&all, "arrays must be contiguous");
    RUN(z->size, kernels->mean_loss(kind, matrix(z), matrix(targets), (float *)weights->data, matrix(dz), (float)delta,
                                    &loss, &weight_sum))
    return Py_BuildValue("dd", loss, weight_sum);
}

/* layer_norm(x, gamma, beta, out, mean, rstd, eps) */
METHOD(layer_norm)
{
    BEGIN("layer_norm", 7)
    Array *x = take(&all, args[0], "f", 2, READ), *gamma = take(&all, args[1], "f", 1, READ);
    Array *beta = take(&all, args[2], "f", 1, READ), *out = take(&all, args[3], "f", 2, WRITE);
    Array *mean = take(&all, args[4], "f", 1, WRITE), *rstd = take(&all, args[5], "f", 1, WRITE);
    double eps = number(&all, args[6]);
    if (same_shape(&all, x, out) && has_length(&all, gamma, x->cols) && has_length(&all, beta, x->cols) &&
        has_length(&all, mean, x->rows))
        has_length(&all, rstd, x->rows);
    RUN(x->size, kernels->layer_norm(matrix(x), (float *)gamma->data, (float *)beta->data, matrix(out),
                                     (float *)mean->data, (float *)rstd->data, eps))
    Py_RETURN_NONE;
}

/* layer_norm_backward(dout, x, gamma, mean, rstd, dx, dgamma, dbeta) */
METHOD(layer_norm_backward)
{
    BEGIN("layer_norm_backward", 8)
    Array *dout = take(&all, args[0], "f", 2, READ), *x = take(&all, args[1], "f", 2, READ);
    Array *gamma = take(&all, args[2], "f", 1, READ), *mean = take(&all, args[3], "f", 1, READ);
    Array *rstd = take(&all, args[4], "f", 1, READ), *dx = take(&all, args[5], "f", 2, WRITE);
    Array *dgamma = take(&all, args[6], "f", 1, WRITE), *dbeta = take(&all, args[7], "f", 1, WRITE);
    if (same_shape(&all, dout, x) && same_shape(&all, dx, x) && has_length(&all, gamma, x->cols) &&
        has_length(&all, mean, x->rows) && has_length(&all, rstd, x->rows) && has_length(&all, dgamma, x->cols))
        has_length(&all, dbeta, x->cols);
    RUN(x->size, kernels->layer_norm_backward(matrix(dout), matrix(x), (float *)gamma->data, (float *)mean->data,
                                              (float *)rstd->data, matrix(dx), (float *)dgamma->data,
                                              (float *)dbeta->data))
    Py_RETURN_NONE;
}

/* dropout_mask(mask, threshold, key of (seed, step, layer), first) */
METHOD(dropout_mask)
{
    BEGIN("dropout_mask", 4)
    Array *mask = take(&all, args[0], "B?", 2, WRITE);
    uint64_t threshold = word(&all, args[1]), base = word(&all, args[2]), first = word(&all, args[3]);
    RUN(mask->size, kernels->dropout_mask((uint8_t *)mask->data, mask->rows, mask->cols, mask->ld, (uint32_t)threshold,
                                          base, first))
    Py_RETURN_NONE;
}

/* dropout(a, mask, factor, out) */
METHOD(dropout)
{
    BEGIN("dropout", 4)
    Array *a = take(&all, args[0], "f", 2, READ), *mask = take(&all, args[1], "B?", 2, READ);
    double factor = number(&all, args[2]);
    Array *out = take(&all, args[3], "f", 2, WRITE);
    if (same_shape(&all, a, out))
        same_shape(&all, mask, a);
    RUN(a->size, for (Index i = 0; i < a->rows; i++)
                     kernels->dropout((float *)a->data + i * a->ld, (uint8_t *)mask->data + i * mask->ld, (float)factor,
                                      (float *)out->data + i * out->ld, a->cols))
    Py_RETURN_NONE;
}

static void gather_rows(const Array *source, const int64_t *row, const float *shift, const float *scale,
                        const Array *out)
{
    int bytes = source->view.itemsize == 1;
    Index step = source->ld * source->view.itemsize, length = source->cols * source->view.itemsize;
    for (Index i = 0; i < out->rows; i++) {
        const char *from = source->data + row[i] * step;
        float *to = (float *)out->data + i * out->ld;
#if defined(__GNUC__)
        if (i + 2 < out->rows) /* rows lie anywhere: ask for the row after the next one */
            for (Index at = 0; at < length; at += 64)
                __builtin_prefetch(source->data + row[i + 2] * step + at);
#endif
        if (bytes)
            kernels->gather_u8((const uint8_t *)from, shift, scale, to, out->cols);
        else
            kernels->gather_f32((const float *)from, shift, scale, to, out->cols);
    }
    (void)length;
}

/* gather(source, rows, out, shift, scale) */
METHOD(gather)
{
    BEGIN("gather", 5)
    Array *source = take(&all, args[0], "Bf", 2, READ), *rows = take(&all, args[1], "lq", 1, READ);
    Array *out = take(&all, args[2], "f", 2, WRITE), *shift = take(&all, args[3], "f", 1, OPTIONAL);
    Array *scale = take(&all, args[4], "f", 1, OPTIONAL);
    const int64_t *row = (const int64_t *)rows->data;
    if (has_length(&all, shift, out->cols) && has_length(&all, scale, out->cols) &&
        (rows->view.itemsize != 8 || rows->size != out->rows || source->cols != out->cols))
        refuse(&all, "rows must be one int64 per row of out, and source as wide as out");
    for (Index i = 0; !all.failed && i < rows->size; i++)
        if (row[i] < 0 || row[i] >= source->rows) {
            PyErr_Format(PyExc_IndexError, "row %lld is outside 0..%zd", (long long)row[i], source->rows - 1);
            all.failed = 1;
        }
    RUN(out->size, gather_rows(source, row, (float *)shift->data, (float *)scale->data, out))
    Py_RETURN_NONE;
}

/* add_scaled(p, u, factor) */
METHOD(add_scaled)
{
    VECTORS("add_scaled", 3)
    Array *u = take(&all, args[1], "f", 1, READ);
    double factor = number(&all, args[2]);
    same_shape(&all, p, u);
    RUN(p->size, kernels->add_scaled((float *)p->data, (float *)u->data, (float)factor, p->size))
    Py_RETURN_NONE;
}

/* sum_squares(g) -> float */
METHOD(sum_squares)
{
    BEGIN("sum_squares", 1)
    Array *g = take(&all, args[0], "f", 1, READ);
    double total = 0.0;
    RUN(g->size, total = kernels->sum_squares((float *)g->data, g->size))
    return PyFloat_FromDouble(total);
}

/* finite(g) -> bool */
METHOD(finite)
{
    BEGIN("finite", 1)
    Array *g = take(&all, args[0], "f", 1, READ);
    int yes = 1;
    RUN(g->size, yes = kernels->finite((uint32_t *)g->data, g->size))
    return PyBool_FromLong(yes);
}

/* checksum(p) -> the wrapping sum */
METHOD(checksum)
{
    BEGIN("checksum", 1)
    Array *p = take(&all, args[0], "fd", 1, READ);
    uint64_t total = 0;
    RUN(p->size, total = kernels->checksum((uint32_t *)p->data, p->size * (p->data ? p->view.itemsize / 4 : 1)))
    return PyLong_FromUnsignedLongLong(total);
}

/* sgd(p, g, buf, lr, momentum, keep, nesterov, decay, grad_scale) */
METHOD(sgd)
{
    VECTORS("sgd", 9)
    Array *g = take(&all, args[1], "f", 1, READ), *buf = take(&all, args[2], "f", 1, WRITE | OPTIONAL);
    double lr = number(&all, args[3]), momentum = number(&all, args[4]), keep = number(&all, args[5]);
    int nesterov = code(&all, args[6], 2);
    double decay = number(&all, args[7]), grad_scale = number(&all, args[8]);
    if (same_shape(&all, p, g))
        has_length(&all, buf, p->size);
    RUN(p->size, kernels->sgd((float *)p->data, (float *)g->data, (float *)buf->data, p->size, (float)lr,
                              (float)momentum, (float)keep, nesterov, (float)decay, (float)grad_scale))
    Py_RETURN_NONE;
}

/* adam(p, g, m, v, nine constants) */
METHOD(adam)
{
    VECTORS("adam", 13)
    Array *g = take(&all, args[1], "f", 1, READ), *m = take(&all, args[2], "f", 1, WRITE);
    Array *v = take(&all, args[3], "f", 1, WRITE);
    float k[9];
    for (int i = 0; i < 9; i++)
        k[i] = (float)number(&all, args[4 + i]);
    if (same_shape(&all, p, g) && same_shape(&all, p, m))
        same_shape(&all, p, v);
    RUN(p->size, kernels->adam((float *)p->data, (float *)g->data, (float *)m->data, (float *)v->data, p->size, k))
    Py_RETURN_NONE;
}

/* adam_direction(p, g, m, v, u, eight constants) */
METHOD(adam_direction)
{
    BEGIN("adam_direction", 13)
    Array *p = take(&all, args[0], "f", 1, READ), *g = take(&all, args[1], "f", 1, READ);
    Array *m = take(&all, args[2], "f", 1, WRITE), *v = take(&all, args[3], "f", 1, WRITE);
    Array *u = take(&all, args[4], "f", 1, WRITE);
    float k[8];
    for (int i = 0; i < 8; i++)
        k[i] = (float)number(&all, args[5 + i]);
    if (same_shape(&all, p, g) && same_shape(&all, p, m) && same_shape(&all, p, v))
        same_shape(&all, p, u);
    RUN(p->size, kernels->adam_direction((float *)p->data, (float *)g->data, (float *)m->data, (float *)v->data,
                                         (float *)u->data, p->size, k))
    Py_RETURN_NONE;
}

/* rmsprop(p, g, v, buf, lr, alpha, 1 - alpha, eps, momentum, decay, grad_scale) */
METHOD(rmsprop)
{
    VECTORS("rmsprop", 11)
    Array *g = take(&all, args[1], "f", 1, READ), *v = take(&all, args[2], "f", 1, WRITE);
    Array *buf = take(&all, args[3], "f", 1, WRITE | OPTIONAL);
    float k[7];
    for (int i = 0; i < 7; i++)
        k[i] = (float)number(&all, args[4 + i]);
    if (same_shape(&all, p, g) && same_shape(&all, p, v))
        has_length(&all, buf, p->size);
    RUN(p->size, kernels->rmsprop((float *)p->data, (float *)g->data, (float *)v->data, (float *)buf->data, p->size,
                                  k[0], k[1], k[2], k[3], k[4], k[5], k[6]))
    Py_RETURN_NONE;
}

/* adagrad(p, g, s, rate, eps, decay, grad_scale) */
METHOD(adagrad)
{
    VECTORS("adagrad", 7)
    Array *g = take(&all, args[1], "f", 1, READ), *s = take(&all, args[2], "f", 1, WRITE);
    double rate = number(&all, args[3]), eps = number(&all, args[4]), decay = number(&all, args[5]);
    double grad_scale = number(&all, args[6]);
    if (same_shape(&all, p, g))
        same_shape(&all, p, s);
    RUN(p->size, kernels->adagrad((float *)p->data, (float *)g->data, (float *)s->data, p->size, (float)rate, (float)eps,
                                  (float)decay, (float)grad_scale))
    Py_RETURN_NONE;
}

/* ema(e, p, 1 - decay) */
METHOD(ema)
{
    VECTORS("ema", 3)
    Array *q = take(&all, args[1], "f", 1, READ);
    double gain = number(&all, args[2]);
    same_shape(&all, p, q);
    RUN(p->size, kernels->ema((float *)p->data, (float *)q->data, (float)gain, p->size))
    Py_RETURN_NONE;
}

static Index wire_bytes(int kind, Index n) { return kind == INT8 ? (n + WIRE_TILE - 1) / WIRE_TILE * 4 + n : 2 * n; }

/* wire(action, kind, data, values, other): ROUND and TOWARDS need other, the rest or the replica of each value */
METHOD(wire)
{
    BEGIN("wire", 5)
    int action = code(&all, args[0], WIRE_ACTIONS), kind = code(&all, args[1], WIRES);
    int reads = action == DECODE || action == ADD, two = action == ROUND || action == TOWARDS;
    Array *data = take(&all, args[2], "B", 1, reads ? READ : WRITE);
    Array *values = take(&all, args[3], "f", 1, action == ENCODE ? READ : WRITE);
    Array *other = take(&all, args[4], "f", 1, two ? WRITE : OPTIONAL);
    if (!all.failed && (data->size != wire_bytes(kind, values->size) || (uintptr_t)data->data % 2))
        refuse(&all, "data must lie at an even address and hold exactly the bytes of the values");
    if (!all.failed && (two != (other->data != NULL) || (two && other->size != values->size)))
        refuse(&all, "rests or replicas must be as many as the values");
    if (!all.failed) {
        PyThreadState *state = values->size > LONG ? PyEval_SaveThread() : NULL;
        kernels->wire(action, kind, (uint8_t *)data->data, (float *)values->data, (float *)other->data, values->size);
        if (state)
            PyEval_RestoreThread(state);
    }
    release(&all);
    if (all.failed)
        return NULL;
    Py_RETURN_NONE;
}

#include "_fused_node.h"

#define ENTRY(name) {#name, (PyCFunction)(void (*)(void))py_##name, METH_FASTCALL, NULL}
static PyMethodDef methods[] = {
    ENTRY(bias_activation), ENTRY(activation_backward), ENTRY(column_sum), ENTRY(cross_entropy), ENTRY(mean_loss),
    ENTRY(layer_norm), ENTRY(layer_norm_backward), ENTRY(dropout_mask), ENTRY(dropout), ENTRY(gather),
    ENTRY(add_scaled), ENTRY(sum_squares), ENTRY(finite), ENTRY(checksum), ENTRY(sgd), ENTRY(adam),
    ENTRY(adam_direction), ENTRY(rmsprop), ENTRY(adagrad), ENTRY(ema), ENTRY(wire), ENTRY(sum_arrays),
#ifdef HAVE_MEET
    ENTRY(meet),
#endif
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "hpcmlp.ops._fused", "Single-pass float32 operations for hpcmlp.ops.host.", -1, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__fused(void)
{
    PyObject *module = PyModule_Create(&definition);
    const char *target = "baseline";
#ifdef HAVE_AVX2
    unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
    __get_cpuid(1, &eax, &ebx, &ecx, &edx); /* not every compiler's __builtin_cpu_supports knows "f16c" */
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && ecx & bit_F16C) {
        kernels = &avx2_kernels;
        target = "avx2";
    }
#endif
    if (module && PyModule_AddStringConstant(module, "target", target)) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
