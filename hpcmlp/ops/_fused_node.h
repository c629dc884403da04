/* What the ranks of a node do in their shared memory, for comm/shared.py: the sum over their arrays, and meeting. */

#if !defined(__STDC_NO_ATOMICS__) && defined(__unix__)
#define HAVE_MEET 1
#include <sched.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>
#endif
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
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
/* The meeting of the ranks of a node, by counters in their shared memory. In round k rank r tells that it has come so
   far and waits for rank r - 2^k; after ceil(log2 size) rounds it knows of all. (D. Hensgen, R. Finkel, U. Manber, "Two
   algorithms for barrier synchronization", Int. J. Parallel Program. 17 (1988).) A row of the table belongs to one rank,
   which alone writes it (but for `asleep`), and has cache lines of its own. A counter only grows, modulo 2^32, so a
   call that gives up may be repeated with the same turn.

   Order of memory: what a rank wrote before the meeting is seen by every rank after it; each store of a counter
   releases, each load that ends a wait acquires, and both are sequentially consistent, so that no sleeper is missed. */
typedef struct {
    _Atomic uint32_t turn, asleep;
} Mark;

#define ROUNDS 16         /* enough for 65,536 ranks */
#define SPINS 300         /* looks in a row while the GIL is held: about 5 us */
#define YIELD_NS 200000   /* how long a rank goes on looking, giving the core away each time, before Python has a turn */
#define SLEEP_NS 1000000  /* how long a rank sleeps before Python has a turn */

static inline int arrived(Mark *mark, uint32_t turn) { return (int32_t)(atomic_load(&mark->turn) - turn) >= 0; }

static inline void relax(void)
{
#if defined(__SSE__) || defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
    __asm__ volatile("yield");
#endif
}

static void tell(Mark *mark, uint32_t turn)
{
    atomic_store(&mark->turn, turn);
#ifdef __linux__
    if (atomic_exchange(&mark->asleep, 0))
        syscall(SYS_futex, &mark->turn, FUTEX_WAKE, 1, NULL, NULL, 0);
#endif
}

static inline int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static int await(Mark *mark, uint32_t turn, int sleep)
{
#ifdef __linux__
    if (sleep) {
        struct timespec limit = {0, SLEEP_NS};
        uint32_t seen = atomic_load(&mark->turn);
        atomic_store(&mark->asleep, 1);
        if ((int32_t)(seen - turn) < 0)
            syscall(SYS_futex, &mark->turn, FUTEX_WAIT, seen, &limit, NULL, 0);
        return arrived(mark, turn);
    }
#endif
    (void)sleep;
    for (int64_t end = nanoseconds() + YIELD_NS; !arrived(mark, turn); sched_yield())
        if (nanoseconds() > end)
            return 0;
    return 1;
}

/* meet(table, rank, turn, sleep) -> bool: True when all ranks have called it with this turn; False after a short while,
   so that the caller may do something else and call again. `table` (size, 32) uint32 lies in shared memory; `sleep`
   gives the core away at once, for ranks that have none of their own. */
METHOD(meet)
{
    BEGIN("meet", 4)
    Array *table = take(&all, args[0], "I", 2, WRITE);
    uint64_t rank = word(&all, args[1]), turn = word(&all, args[2]);
    int sleep = code(&all, args[3], 2), done = 1;
    Index size = table->rows;
    if (!all.failed && ((Index)rank >= size || table->cols != 2 * ROUNDS || table->ld != 2 * ROUNDS))
        refuse(&all, "no such rank, or a table of another width");
    if (!all.failed) {
        PyThreadState *state = NULL;
        Mark *marks = (Mark *)table->data;
        int round = 0;
        for (Index step = 1; done && step < size; step *= 2, round++) {
            Mark *other = marks + ((Index)rank + size - step) % size * ROUNDS + round;
            tell(marks + (Index)rank * ROUNDS + round, (uint32_t)turn);
            for (int k = sleep ? SPINS - 10 : 0; k < SPINS && !arrived(other, (uint32_t)turn); k++)
                relax();
            if (arrived(other, (uint32_t)turn))
                continue;
            if (!state)
                state = PyEval_SaveThread();
            done = await(other, (uint32_t)turn, sleep);
        }
        if (state)
            PyEval_RestoreThread(state);
    }
    release(&all);
    return all.failed ? NULL : PyBool_FromLong(done);
}
#endif
