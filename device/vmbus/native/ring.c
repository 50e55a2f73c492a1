/* What both ends of a ring share. The protocol is described in vmbus.ring; vmbus.ring.pure is the twin in Python. */

#include "core.h"

#include <stdarg.h>
#include <stdio.h>

int ring_corrupt(const char *format, ...)
{
    char text[200];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    PyErr_SetString(core.ring_corrupt, text);
    return -1;
}

static int window_size(PyObject *window, Py_ssize_t *size)
{
    PyObject *number = PyObject_GetAttr(window, core.size);
    if (number == NULL)
        return -1;
    *size = PyLong_AsSsize_t(number);
    drop(number);
    return *size == -1 && PyErr_Occurred() ? -1 : 0;
}

int ring_init(Ring *ring, PyObject *header, PyObject *data)
{
    Py_ssize_t header_size, data_size;
    if (core_ready() < 0 || window_size(header, &header_size) < 0 || window_size(data, &data_size) < 0)
        return -1;
    if (header_size != PAGE_BYTES || data_size < PAGE_BYTES || data_size % PAGE_BYTES)
        return ring_corrupt("a ring of %zd header bytes and %zd data bytes", header_size, data_size);
    ring->size = data_size;
    if (span_open(&ring->header, header, header_size) < 0)
        return -1;
    return span_open(&ring->data, data, data_size);
}

static int check_index(const Ring *ring, uint32_t word, const char *what, Py_ssize_t *index)
{
    if ((Py_ssize_t)word >= ring->size || word & 7)
        return ring_corrupt("%s is 0x%x in a ring of 0x%zx bytes", what, (unsigned int)word, (size_t)ring->size);
    *index = word;
    return 0;
}

int ring_load_index(const Ring *ring, Py_ssize_t word, const char *what, Py_ssize_t *index)
{
    uint32_t value;
    return span_load32(&ring->header, word, &value) < 0 ? -1 : check_index(ring, value, what, index);
}

int ring_own_index(const Ring *ring, Py_ssize_t word, const char *what, PyObject *own, Py_ssize_t *index)
{
    uint32_t value;
    if (span_load32(&ring->header, word, &value) < 0)
        return -1;
    if (own != NULL && own != Py_None) {
        PyObject *found = PyLong_FromUnsignedLong(value);
        int same = found == NULL ? -1 : PyObject_RichCompareBool(found, own, Py_EQ);
        drop(found);
        if (same < 0)
            return -1;
        if (!same) {
            PyObject *saved = PyNumber_ToBase(own, 16);
            if (saved != NULL)
                PyErr_Format(core.ring_corrupt, "%s is 0x%x in the ring and %U in what was saved: it was overwritten",
                             what, (unsigned int)value, saved);
            drop(saved);
            return -1;
        }
    }
    return check_index(ring, value, what, index);
}

int ring_clear(Ring *ring)
{
    span_clear(&ring->header);
    span_clear(&ring->data);
    return 0;
}

int ring_traverse(Ring *ring, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE((PyObject *)ring));
    int seen = span_traverse(&ring->header, visit, arg);
    return seen ? seen : span_traverse(&ring->data, visit, arg);
}

/* The end of every `tp_dealloc`, after the type's own `tp_clear`. */
void ring_free(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    drop(type);
}

PyObject *ring_get_header(PyObject *self, void *unused)
{
    (void)unused;
    return ref(((Ring *)self)->header.window);
}

PyObject *ring_get_data(PyObject *self, void *unused)
{
    (void)unused;
    return ref(((Ring *)self)->data.window);
}

PyObject *ring_close(PyObject *self, PyObject *unused)
{
    (void)unused;
    PyObject *closed = PyObject_CallMethod(((Ring *)self)->header.window, "close", NULL);
    if (closed == NULL)
        return NULL;
    drop(closed);
    return PyObject_CallMethod(((Ring *)self)->data.window, "close", NULL);
}

PyObject *ring_describe(PyObject *self, PyObject *unused)
{
    (void)unused;
    Ring *ring = (Ring *)self;
    static const Py_ssize_t offsets[] = {WRITE_INDEX, READ_INDEX, INTERRUPT_MASK, PENDING_SEND_SIZE, FEATURE_BITS};
    uint32_t words[5];
    for (size_t i = 0; i < 5; i++)
        if (span_load32(&ring->header, offsets[i], &words[i]) < 0)
            return NULL;
    return Py_BuildValue("{s:n,s:I,s:I,s:I,s:I,s:I}", "size", ring->size, "write_index", words[0], "read_index", words[1],
                         "interrupt_mask", words[2], "pending_send_size", words[3], "feature_bits", words[4]);
}
