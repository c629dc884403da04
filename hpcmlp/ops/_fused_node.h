/* What the ranks of a node do in their shared memory, for comm/shared.py: the sum over their arrays, and meeting. */

#if !defined(__STDC_NO_ATOMICS__) && defined(__unix__)
#define HAVE_MEET 1
#include <sched.h>
#include <stdatomic.h>
#include <time.h>
#endif

/* Arrays of several ranks. Denormal numbers are kept here: the NumPy path must give the same bits. */

/* Take the buffers of a tuple of 1-D contiguous arrays; return how many were taken */
static int take_all(Array *arrays, PyObject *tuple, Py_ssize_t count, int flags)
{
    const char *wrong;
    for (Py_ssize_t k = 0; k < count; k++) {
        Py_buffer *view = &arrays[k].view;
        if (PyObject_GetBuffer(PyTuple_GetItem(tuple, k), view, PyBUF_STRIDES | PyBUF_FORMAT | flags))
            return (int)k;
        wrong = measure(&arrays[k], "fd", 1);
        if (wrong) {
            PyErr_Format(PyExc_ValueError, "sum_arrays: array %zd %s", k + 1, wrong);
            PyBuffer_Release(view);
            return (int)k;
        }
    }
    return (int)count;
}

/* sum_arrays(targets, sources): tuples of arrays; every target becomes the sum of the sources, added in their order */
METHOD(sum_arrays)
{
    (void)self;
    if (nargs != 2 || !PyTuple_Check(args[0]) || !PyTuple_Check(args[1]) || !PyTuple_Size(args[1])) {
        PyErr_SetString(PyExc_TypeError, "sum_arrays takes two tuples of arrays, of which the second is not empty");
        return NULL;
    }
    Py_ssize_t targets = PyTuple_Size(args[0]), sources = PyTuple_Size(args[1]), all = targets + sources;
    Array *array = PyMem_Malloc((size_t)all * sizeof(Array));
    int taken, fits = 0;
    if (!array)
        return PyErr_NoMemory();
    taken = take_all(array, args[0], targets, PyBUF_WRITABLE);
    if (taken == targets)
        taken += take_all(array + targets, args[1], sources, 0);
    if (taken == all) {
        const Array *first = array + targets;
        fits = 1;
        for (Py_ssize_t k = 0; k < all; k++)
            fits &= array[k].size == first->size && array[k].view.itemsize == first->view.itemsize;
        if (!fits)
            PyErr_SetString(PyExc_ValueError, "sum_arrays: lengths or element types do not agree");
    }
    if (fits && array[targets].size) {
        PyThreadState *state = array[targets].size * all > LONG ? PyEval_SaveThread() : NULL;
        (array[targets].view.itemsize == 4 ? kernels->sum_float : kernels->sum_double)(array, (int)targets,
                                                                                      array + targets, (int)sources);
        if (state)
            PyEval_RestoreThread(state);
    }
    while (taken)
        PyBuffer_Release(&array[--taken].view);
    PyMem_Free(array);
    if (!fits)
        return NULL;
    Py_RETURN_NONE;
}

#ifdef HAVE_MEET
/* The meeting of the ranks of a node, by counters in their shared memory: every rank raises its own and looks until all
   others have come as far. So the last to come lets all go on at once, and where ranks outnumber cores each needs its
   core once a meeting; rounds among pairs of ranks, and sleeping until a neighbour wakes one, took 2 and 10 times as
   long (3 to 8 ranks on 2 cores). A row of the table is a cache line and belongs to one rank, which alone writes it. A
   counter only grows, modulo 2^32, so a call that gives up may be repeated with the same turn.

   Order of memory: what a rank wrote before the meeting is seen by every rank after it, because the store of a counter
   releases and the load that sees it acquires. */
typedef struct {
    _Atomic uint32_t turn;
    uint32_t line[15];
} Mark;

#define SPINS 300         /* looks in a row while the GIL is held: about 5 us */
#define YIELD_NS 200000   /* how long a rank goes on looking, giving the core away each time, before Python has a turn */

enum { ALONE, CROWDED, LATE };

static inline int arrived(Mark *mark, uint32_t turn)
{
    return (int32_t)(atomic_load_explicit(&mark->turn, memory_order_acquire) - turn) >= 0;
}

static inline void relax(void)
{
#if defined(__SSE__) || defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
    __asm__ volatile("yield");
#endif
}

static inline int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static int await(Mark *mark, uint32_t turn, int how)
{
    const struct timespec nap = {0, YIELD_NS / 4};
    for (int64_t end = nanoseconds() + YIELD_NS; !arrived(mark, turn);) {
        if (nanoseconds() > end)
            return 0;
        if (how == LATE)
            nanosleep(&nap, NULL);
        else
            sched_yield();
    }
    return 1;
}

/* meet(table, rank, turn, how) -> bool: True when all ranks have called it with this turn; False after a short while, so
   that the caller may do something else and call again. `table` (size, 16) uint32 lies in shared memory, in whole cache
   lines. `how`: ALONE on its core a rank keeps it for a while, CROWDED it gives it away at once, LATE it naps. */
METHOD(meet)
{
    BEGIN("meet", 4)
    Array *table = take(&all, args[0], "I", 2, WRITE);
    uint64_t rank = word(&all, args[1]), turn = word(&all, args[2]);
    int how = code(&all, args[3], LATE + 1), done = 1;
    Index size = table->rows;
    if (!all.failed && (rank >= (uint64_t)size || table->cols != 16 || table->ld != 16))
        refuse(&all, "no such rank, or a table of another width");
    if (!all.failed) {
        PyThreadState *state = NULL;
        Mark *marks = (Mark *)table->data;
        atomic_store_explicit(&marks[rank].turn, (uint32_t)turn, memory_order_release);
        for (Index step = 1; done && step < size; step++) {
            Mark *other = marks + ((Index)rank + step) % size;
            for (int k = how == ALONE ? 0 : SPINS - 1; k < SPINS && !arrived(other, (uint32_t)turn); k++)
                relax();
            if (arrived(other, (uint32_t)turn))
                continue;
            if (!state)
                state = PyEval_SaveThread();
            done = await(other, (uint32_t)turn, how);
        }
        if (state)
            PyEval_RestoreThread(state);
    }
    release(&all);
    return all.failed ? NULL : PyBool_FromLong(done);
}
#endif
