/* Guest memory as windows lend it: the only place of the native core that touches it. */

#include "core.h"

#include <stdatomic.h>
#include <string.h>

typedef struct {
    Py_buffer buffer;
    unsigned long long iova;
    Py_ssize_t start; /* of the piece in its window */
} Piece;

struct Pieces {
    PyObject_HEAD
    PyObject *memory; /* for its dirty log */
    Py_ssize_t count; /* 0 after `release` */
    Py_ssize_t size;
    bool words; /* every piece can be accessed by aligned words */
    Piece *pieces;
};

/* ---- the object -------------------------------------------------------------------------------------------------- */

static void let_go(Pieces *self)
{
    Piece *pieces = self->pieces;
    Py_ssize_t count = self->count;
    self->pieces = NULL;
    self->count = 0;
    for (Py_ssize_t i = 0; i < count; i++)
        PyBuffer_Release(&pieces[i].buffer);
    PyMem_Free(pieces);
}

static int pieces_clear(PyObject *object)
{
    Pieces *self = (Pieces *)object;
    let_go(self);
    CLEAR(self->memory);
    return 0;
}

static int pieces_traverse(PyObject *object, visitproc visit, void *arg)
{
    Pieces *self = (Pieces *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->memory);
    /* Not the views behind the buffers: the collector would take them apart while they are lent, and Python's memoryview
       does not survive that. They lead to memory and to nothing else, so they are part of no cycle. */
    return 0;
}

static void pieces_free(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    pieces_clear(object);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    drop(type);
}

/* Pieces(memory, [(iova, view), ...]) */
static PyObject *pieces_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *memory, *list;
    if (kwargs != NULL && PyDict_Size(kwargs) != 0) {
        PyErr_SetString(PyExc_TypeError, "Pieces() takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "OO!:Pieces", &memory, &PyList_Type, &list))
        return NULL;
    Pieces *self = (Pieces *)PyType_GenericAlloc(type, 0);
    if (self == NULL)
        return NULL;
    self->memory = ref(memory);
    self->words = true;
    Py_ssize_t wanted = PyList_Size(list);
    self->pieces = PyMem_Calloc(wanted > 0 ? (size_t)wanted : 1, sizeof(Piece));
    if (self->pieces == NULL) {
        PyErr_NoMemory();
        goto failed;
    }
    for (Py_ssize_t i = 0; i < wanted; i++) {
        Piece *piece = &self->pieces[i];
        PyObject *view, *pair = PyList_GetItem(list, i);
        if (pair == NULL || !PyArg_ParseTuple(pair, "KO", &piece->iova, &view))
            goto failed;
        if (PyObject_GetBuffer(view, &piece->buffer, PyBUF_WRITABLE) < 0)
            goto failed;
        self->count = i + 1;
        piece->start = self->size;
        self->size += piece->buffer.len;
        if ((uintptr_t)piece->buffer.buf % sizeof(uint32_t) || piece->buffer.len % (Py_ssize_t)sizeof(uint32_t))
            self->words = false;
    }
    return (PyObject *)self;
failed:
    drop(self);
    return NULL;
}

static PyObject *pieces_release(PyObject *self, PyObject *unused)
{
    (void)unused;
    let_go((Pieces *)self);
    return ref(Py_None);
}

static PyMethodDef pieces_methods[] = {
    {"release", pieces_release, METH_NOARGS,
     "release()\n--\n\nGive the memory back: it is never touched again. Harmless when repeated."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot pieces_slots[] = {
    {Py_tp_doc, "Pieces(memory, pieces, /)\n--\n\nA window's memory, lent to the native core: see vmbus.memory.Window.lend."},
    {Py_tp_new, pieces_new},
    {Py_tp_dealloc, pieces_free},
    {Py_tp_traverse, pieces_traverse},
    {Py_tp_clear, pieces_clear},
    {Py_tp_methods, pieces_methods},
    {0, NULL},
};

PyType_Spec pieces_spec = {
    .name = "vmbus.native._core.Pieces",
    .basicsize = sizeof(Pieces),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = pieces_slots,
};

/* ---- access ------------------------------------------------------------------------------------------------------ */

static Py_ssize_t locate(const Pieces *self, Py_ssize_t offset)
{
    Py_ssize_t low = 0, high = self->count;
    while (high - low > 1) {
        Py_ssize_t middle = low + (high - low) / 2;
        if (self->pieces[middle].start <= offset)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static inline bool lent(const Span *span)
{
    return span->pieces != NULL && span->pieces->count > 0;
}

static inline uint8_t *address(const Pieces *self, Py_ssize_t index, Py_ssize_t offset)
{
    const Piece *piece = &self->pieces[index];
    return (uint8_t *)piece->buffer.buf + (offset - piece->start);
}

static inline Py_ssize_t part(const Pieces *self, Py_ssize_t index, Py_ssize_t offset, Py_ssize_t length)
{
    const Piece *piece = &self->pieces[index];
    Py_ssize_t left = piece->start + piece->buffer.len - offset;
    return length < left ? length : left;
}

/* Tell the log, if one is running, of a store. It is looked up each time: a migration starts one at any moment. */
static int mark(Pieces *self, Py_ssize_t offset, Py_ssize_t length)
{
    PyObject *log = PyObject_GetAttr(self->memory, core.log);
    if (log == NULL)
        return -1;
    drop(log);
    if (log == Py_None)
        return 0;
    /* `mark` is Python: the window may be gone after it, and then so is what was to be marked. */
    while (length > 0 && self->count > 0) {
        Py_ssize_t index = locate(self, offset), done = part(self, index, offset, length);
        unsigned long long iova = self->pieces[index].iova + (unsigned long long)(offset - self->pieces[index].start);
        PyObject *first = PyLong_FromUnsignedLongLong(iova), *count = PyLong_FromSsize_t(done), *marked = NULL;
        if (first != NULL && count != NULL)
            marked = PyObject_CallMethodObjArgs(self->memory, core.mark, first, count, NULL);
        drop(first);
        drop(count);
        if (marked == NULL)
            return -1;
        drop(marked);
        offset += done;
        length -= done;
    }
    return 0;
}

int span_load32(const Span *span, Py_ssize_t offset, uint32_t *value)
{
    if (lent(span)) {
        const _Atomic uint32_t *word = (const void *)address(span->pieces, locate(span->pieces, offset), offset);
        *value = atomic_load_explicit(word, memory_order_acquire);
        return 0;
    }
    PyObject *word = PyObject_CallMethod(span->window, "load32", "n", offset);
    if (word == NULL)
        return -1;
    *value = (uint32_t)PyLong_AsUnsignedLongMask(word);
    drop(word);
    return PyErr_Occurred() ? -1 : 0;
}

int span_store32(const Span *span, Py_ssize_t offset, uint32_t value)
{
    if (lent(span)) {
        _Atomic uint32_t *word = (void *)address(span->pieces, locate(span->pieces, offset), offset);
        atomic_store_explicit(word, value, memory_order_release);
        return mark(span->pieces, offset, sizeof value);
    }
    PyObject *done = PyObject_CallMethod(span->window, "store32", "nI", offset, (unsigned int)value);
    drop(done);
    return done == NULL ? -1 : 0;
}

int span_read(const Span *span, Py_ssize_t offset, uint8_t *to, Py_ssize_t length)
{
    if (lent(span)) {
        for (Py_ssize_t index = locate(span->pieces, offset), done; length > 0; index++) {
            done = part(span->pieces, index, offset, length);
            memcpy(to, address(span->pieces, index, offset), (size_t)done);
            to += done;
            offset += done;
            length -= done;
        }
        return 0;
    }
    PyObject *copy = PyObject_CallMethod(span->window, "read", "nn", offset, length);
    char *bytes;
    Py_ssize_t size;
    if (copy == NULL)
        return -1;
    if (PyBytes_AsStringAndSize(copy, &bytes, &size) < 0)
        goto failed;
    if (size != length) {
        PyErr_Format(PyExc_ValueError, "a window gave %zd bytes instead of %zd", size, length);
        goto failed;
    }
    memcpy(to, bytes, (size_t)length);
    drop(copy);
    return 0;
failed:
    drop(copy);
    return -1;
}

int span_write(const Span *span, Py_ssize_t offset, const uint8_t *from, Py_ssize_t length)
{
    if (lent(span)) {
        Py_ssize_t at = offset, left = length;
        for (Py_ssize_t index = locate(span->pieces, at), done; left > 0; index++) {
            done = part(span->pieces, index, at, left);
            memcpy(address(span->pieces, index, at), from, (size_t)done);
            from += done;
            at += done;
            left -= done;
        }
        return mark(span->pieces, offset, length);
    }
    PyObject *done = PyObject_CallMethod(span->window, "write", "ny#", offset, (const char *)from, length);
    drop(done);
    return done == NULL ? -1 : 0;
}

/* ---- opening ----------------------------------------------------------------------------------------------------- */

int span_open(Span *span, PyObject *window, Py_ssize_t size)
{
    span->window = ref(window);
    span->pieces = NULL;
    PyObject *method = PyObject_GetAttr(window, core.lend);
    if (method == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError))
            return -1;
        PyErr_Clear();
        return 0;
    }
    PyObject *loan = PyObject_CallFunctionObjArgs(method, (PyObject *)core.pieces_type, NULL);
    drop(method);
    if (loan == NULL)
        return -1;
    if (!PyObject_TypeCheck(loan, core.pieces_type)) {
        drop(loan); /* it lends nothing, or to somebody else */
        return 0;
    }
    span->pieces = (Pieces *)loan;
    if (lent(span) && (!span->pieces->words || span->pieces->size != size))
        CLEAR(span->pieces);
    return 0;
}

void span_clear(Span *span)
{
    CLEAR(span->pieces);
    CLEAR(span->window);
}

int span_traverse(const Span *span, visitproc visit, void *arg)
{
    Py_VISIT(span->window);
    Py_VISIT((PyObject *)span->pieces);
    return 0;
}
