/* Guest memory by its own addresses, and what the kernel moves between it and a file: `Reach`, of vmbus.memory.

   Nothing is touched here: addresses are looked up, and given to preadv2 or pwritev2. The regions' buffers are held until
   `release`, which only the thread does that calls `move`; so they stay while the kernel works without the GIL. */

#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <string.h>
#include <sys/uio.h>

enum {
    MOST_REGIONS = 64,
    MOST_PIECES = 1024, /* IOV_MAX */
    BODY_HEADER = 16,   /* u32 0, u32 ranges; u32 bytes, u32 offset; then a u64 for each page */
};
static const uint64_t MAX_PFN = (1ull << 52) - 1;

typedef struct {
    Py_buffer buffer;
    uint64_t start, end;
} Region;

typedef struct {
    PyObject_HEAD
    Py_ssize_t count; /* 0 after `release` */
    Region regions[MOST_REGIONS];
} Reach;

static void let_go(Reach *self)
{
    while (self->count > 0)
        PyBuffer_Release(&self->regions[--self->count].buffer);
}

static void reach_free(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    let_go((Reach *)object);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    drop(type);
}

/* Reach([(iova, view), ...]) */
static PyObject *reach_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *list;
    if (kwargs != NULL && PyDict_Size(kwargs) != 0) {
        PyErr_SetString(PyExc_TypeError, "Reach() takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "O!:Reach", &PyList_Type, &list))
        return NULL;
    if (PyList_Size(list) > MOST_REGIONS) {
        PyErr_Format(PyExc_ValueError, "%zd regions; at most %d", PyList_Size(list), MOST_REGIONS);
        return NULL;
    }
    Reach *self = (Reach *)PyType_GenericAlloc(type, 0);
    if (self == NULL)
        return NULL;
    for (Py_ssize_t i = 0; i < PyList_Size(list); i++) {
        unsigned long long iova;
        PyObject *view, *pair = PyList_GetItem(list, i);
        Region *region = &self->regions[i];
        if (!PyArg_ParseTuple(pair, "KO", &iova, &view) || PyObject_GetBuffer(view, &region->buffer, PyBUF_SIMPLE) < 0) {
            drop(self);
            return NULL;
        }
        self->count = i + 1;
        region->start = iova;
        region->end = iova + (uint64_t)region->buffer.len;
    }
    return (PyObject *)self;
}

static PyObject *reach_release(PyObject *self, PyObject *unused)
{
    (void)unused;
    let_go((Reach *)self);
    return ref(Py_None);
}

static const Region *find(const Reach *self, uint64_t address)
{
    for (Py_ssize_t i = 0; i < self->count; i++)
        if (self->regions[i].start <= address && address < self->regions[i].end)
            return &self->regions[i];
    return NULL;
}

/* The pieces of our address space that one range of exactly `length` bytes describes; how many, 0: it is not as simple
   as that. `written`: they are to be written to. */
static int describe(const Reach *self, const uint8_t *body, Py_ssize_t size, uint32_t length, bool written,
                    struct iovec *pieces)
{
    uint32_t ranges, bytes, offset;
    if (size < BODY_HEADER)
        return 0;
    memcpy(&ranges, body + 4, 4);
    memcpy(&bytes, body + 8, 4);
    memcpy(&offset, body + 12, 4);
    if (ranges != 1 || bytes != length || length == 0 || offset >= PAGE_BYTES)
        return 0;
    uint64_t pages = ((uint64_t)offset + length + PAGE_BYTES - 1) / PAGE_BYTES;
    if (pages > MOST_PIECES || (uint64_t)(size - BODY_HEADER) / 8 < pages)
        return 0;
    const Region *region = NULL;
    int count = 0;
    for (uint64_t i = 0, pfn; i < pages; i++) {
        memcpy(&pfn, body + BODY_HEADER + 8 * i, 8);
        if (pfn > MAX_PFN)
            return 0;
        uint64_t address = pfn * PAGE_BYTES + offset, part = PAGE_BYTES - offset;
        if (part > length)
            part = length;
        if (region == NULL || address < region->start || address >= region->end)
            region = find(self, address);
        if (region == NULL || part > region->end - address || (written && region->buffer.readonly))
            return 0;
        uint8_t *at = (uint8_t *)region->buffer.buf + (address - region->start);
        if (count > 0 && (uint8_t *)pieces[count - 1].iov_base + pieces[count - 1].iov_len == at)
            pieces[count - 1].iov_len += part;
        else
            pieces[count++] = (struct iovec){.iov_base = at, .iov_len = part};
        length -= (uint32_t)part;
        offset = 0;
    }
    return count;
}

/* move(body, length, fd, offset, write, flags) */
static PyObject *reach_move(PyObject *object, PyObject *args)
{
    const char *body;
    Py_ssize_t size;
    unsigned int length;
    long long offset;
    int fd, write, flags;
    if (!PyArg_ParseTuple(args, "y#IiLpi:move", &body, &size, &length, &fd, &offset, &write, &flags))
        return NULL;
    struct iovec pieces[MOST_PIECES];
    int count = describe((Reach *)object, (const uint8_t *)body, size, length, !write, pieces);
    if (count == 0)
        return ref(Py_None);
    PyThreadState *state = PyEval_SaveThread();
    ssize_t moved = write ? pwritev2(fd, pieces, count, offset, flags) : preadv2(fd, pieces, count, offset, flags);
    int error = errno;
    PyEval_RestoreThread(state);
    return PyLong_FromSsize_t(moved < 0 ? -error : moved);
}

static PyMethodDef methods[] = {
    {"release", reach_release, METH_NOARGS,
     "release()\n--\n\nGive the memory back: nothing is within reach any more. Harmless when repeated."},
    {"move", reach_move, METH_VARARGS,
     "move(body, length, fd, offset, write, flags, /)\n--\n\n"
     "Move bytes between a file and the memory that a GPA-direct packet describes: see vmbus.kmcl.Completion.move."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Reach(regions, /)\n--\n\nGuest memory by (I/O address, view), in the native core: see vmbus.memory."},
    {Py_tp_new, reach_new},
    {Py_tp_dealloc, reach_free},
    {Py_tp_methods, methods},
    {0, NULL},
};

PyType_Spec reach_spec = {
    .name = "vmbus.native._core.Reach",
    .basicsize = sizeof(Reach),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};
