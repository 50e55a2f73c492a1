/* The writing end of a ring: the native twin of vmbus.ring.pure.RingWriter. */

#include "core.h"

#include <structmember.h>

enum { KEPT_ROOM = 16384 }; /* bytes of the staging buffer that stay after a commit */

int writer_free(Writer *writer, Py_ssize_t *room)
{
    Ring *ring = &writer->ring;
    Py_ssize_t read;
    if (ring_load_index(ring, READ_INDEX, "read index", &read) < 0)
        return -1;
    if (ring_distance(ring, ring->peer, read) > ring_distance(ring, ring->peer, writer->published))
        return ring_corrupt("read index went from 0x%zx to 0x%zx, past what was written", (size_t)ring->peer,
                            (size_t)read);
    ring->peer = read;
    *room = writer->free = ring->size - 8 - ring_distance(ring, read, ring->index);
    return 0;
}

static int reserve(Writer *writer, Py_ssize_t total)
{
    Py_ssize_t needed = writer->staged_size + total, room = writer->staged_room > 0 ? writer->staged_room : 1024;
    while (room < needed)
        room *= 2;
    if (room == writer->staged_room)
        return 0;
    uint8_t *grown = PyMem_Realloc(writer->staged, (size_t)room);
    if (grown == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    writer->staged = grown;
    writer->staged_room = room;
    return 0;
}

int writer_put(Writer *writer, const Descriptor *descriptor, const uint8_t *body, Py_ssize_t length)
{
    Ring *ring = &writer->ring;
    Py_ssize_t padded = (length + 7) & ~(Py_ssize_t)7, total = padded + OVERHEAD, room;
    if (total > writer->free) {
        if (writer_free(writer, &room) < 0)
            return -1;
        if (total > room)
            return 0;
    }
    Descriptor whole = *descriptor;
    whole.len8 = (uint16_t)((padded + DESCRIPTOR_SIZE) >> 3);
    if (total > MAX_PACKET_SIZE + TRAILER_SIZE) {
        PyErr_Format(core.struct_error, "a packet of %zd bytes is longer than its descriptor can say", total);
        return -1;
    }
    if (reserve(writer, total) < 0)
        return -1;
    packet_pack(writer->staged + writer->staged_size, &whole, body, length, padded, (uint32_t)ring->index);
    writer->staged_size += total;
    writer->free -= total;
    Py_ssize_t index = ring->index + total;
    ring->index = index >= ring->size ? index - ring->size : index;
    return 1;
}

/* Copy what was staged into the ring and publish it. */
static int publish(Writer *writer, const uint8_t *data, Py_ssize_t size)
{
    Ring *ring = &writer->ring;
    Py_ssize_t old = writer->published, first = ring->size - old;
    if (first > size)
        first = size;
    if (span_write(&ring->data, old, data, first) < 0 ||
        (size > first && span_write(&ring->data, 0, data + first, size - first) < 0) ||
        span_store32(&ring->header, WRITE_INDEX, (uint32_t)ring->index) < 0)
        return -1;
    writer->published = ring->index;
    ring->batches++;
    uint32_t masked, read;
    if (core_fence() < 0 || span_load32(&ring->header, INTERRUPT_MASK, &masked) < 0)
        return -1;
    if (masked)
        return 0;
    if (span_load32(&ring->header, READ_INDEX, &read) < 0)
        return -1;
    if ((Py_ssize_t)read != old)
        return 0;
    ring->signals++;
    return 1;
}

int writer_commit(Writer *writer)
{
    uint8_t *data = writer->staged;
    Py_ssize_t size = writer->staged_size, room = writer->staged_room;
    if (size == 0)
        return 0;
    /* Out of reach while it is copied: marking pages in the log is Python, which may do anything. */
    writer->staged = NULL;
    writer->staged_size = writer->staged_room = 0;
    int outcome = publish(writer, data, size);
    if (writer->staged == NULL && room <= KEPT_ROOM) {
        writer->staged = data;
        writer->staged_room = room;
    } else {
        PyMem_Free(data);
    }
    return outcome;
}

int writer_cancel_request(Writer *writer)
{
    if (!writer->requested)
        return 0;
    if (span_store32(&writer->ring.header, PENDING_SEND_SIZE, 0) < 0)
        return -1;
    writer->requested = false;
    return 0;
}

int writer_request_space(Writer *writer, Py_ssize_t total)
{
    /* A little more than one packet is asked for, so that a nearly full ring is not signalled for every packet. */
    Py_ssize_t wanted = (writer->ring.size - 8) / 4, room;
    if (wanted < total)
        wanted = total;
    if (wanted > writer->largest)
        wanted = writer->largest;
    if (span_store32(&writer->ring.header, PENDING_SEND_SIZE, (uint32_t)wanted & ~(uint32_t)7) < 0)
        return -1;
    writer->requested = true;
    if (core_fence() < 0 || writer_free(writer, &room) < 0)
        return -1;
    if (room < total)
        return 0;
    return writer_cancel_request(writer) < 0 ? -1 : 1;
}

/* ---- for Python -------------------------------------------------------------------------------------------------- */

static int clear(PyObject *self)
{
    return ring_clear((Ring *)self);
}

static int traverse(PyObject *self, visitproc visit, void *arg)
{
    return ring_traverse((Ring *)self, visit, arg);
}

static void dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    clear(self);
    PyMem_Free(((Writer *)self)->staged);
    ring_free(self);
}

static int attach(Writer *writer, PyObject *header, PyObject *data, PyObject *own)
{
    Ring *ring = &writer->ring;
    uint32_t word;
    if (ring_init(ring, header, data) < 0)
        return -1;
    writer->largest = ring->size - 16 < MAX_PACKET_SIZE ? ring->size - 16 : MAX_PACKET_SIZE;
    if (ring_own_index(ring, WRITE_INDEX, "write index", own, &ring->index) < 0 ||
        ring_load_index(ring, READ_INDEX, "read index", &ring->peer) < 0 ||
        span_load32(&ring->header, PENDING_SEND_SIZE, &word) < 0)
        return -1;
    writer->published = ring->index;
    writer->free = ring->size - 8 - ring_distance(ring, ring->peer, ring->index);
    writer->requested = word != 0;
    if (span_load32(&ring->header, FEATURE_BITS, &word) < 0)
        return -1;
    return span_store32(&ring->header, FEATURE_BITS, word | FEATURE_PENDING_SEND_SIZE);
}

static PyObject *new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"header", "data", "own", NULL};
    PyObject *header, *data, *own = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|$O:RingWriter", names, &header, &data, &own))
        return NULL;
    Writer *self = (Writer *)PyType_GenericAlloc(type, 0);
    if (self != NULL && attach(self, header, data, own) < 0)
        CLEAR(self);
    return (PyObject *)self;
}

static PyObject *own_index(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromSsize_t(((Writer *)self)->published);
}

static PyObject *empty(PyObject *self, void *unused)
{
    (void)unused;
    uint32_t read;
    if (span_load32(&((Ring *)self)->header, READ_INDEX, &read) < 0)
        return NULL;
    return PyBool_FromLong((Py_ssize_t)read == ((Writer *)self)->published);
}

static PyObject *staged(PyObject *self, void *unused)
{
    (void)unused;
    Writer *writer = (Writer *)self;
    return PyBytes_FromStringAndSize(writer->staged_size ? (const char *)writer->staged : "", writer->staged_size);
}

static PyObject *free_bytes(PyObject *self, PyObject *unused)
{
    (void)unused;
    Py_ssize_t room;
    return writer_free((Writer *)self, &room) < 0 ? NULL : PyLong_FromSsize_t(room);
}

/* A number for a 16-bit field; false with an exception when it is none. */
static bool field16(PyObject *number, uint16_t *value)
{
    unsigned long found = PyLong_AsUnsignedLong(number);
    if (found <= 0xFFFF) {
        *value = (uint16_t)found;
        return true;
    }
    if (!PyErr_Occurred() || PyErr_ExceptionMatches(PyExc_OverflowError))
        PyErr_Format(core.struct_error, "%S does not fit into 16 bits", number);
    return false;
}

/* put(kind, flags, transaction, body, offset8=2, /) */
static PyObject *put(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Descriptor descriptor = {.offset8 = 2};
    if (count < 4 || count > 5) {
        PyErr_SetString(PyExc_TypeError, "put() takes kind, flags, transaction, body and perhaps offset8");
        return NULL;
    }
    if (!field16(args[0], &descriptor.kind) || !field16(args[1], &descriptor.flags) ||
        (count == 5 && !field16(args[4], &descriptor.offset8)))
        return NULL;
    unsigned long long transaction = PyLong_AsUnsignedLongLong(args[2]);
    if (transaction == (unsigned long long)-1 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_OverflowError))
            PyErr_Format(core.struct_error, "%S does not fit into 64 bits", args[2]);
        return NULL;
    }
    descriptor.transaction = transaction;
    Py_buffer body;
    if (PyObject_GetBuffer(args[3], &body, PyBUF_SIMPLE) < 0)
        return NULL;
    int placed = writer_put((Writer *)self, &descriptor, body.buf, body.len);
    PyBuffer_Release(&body);
    return truth(placed);
}

static PyObject *commit(PyObject *self, PyObject *unused)
{
    (void)unused;
    return truth(writer_commit((Writer *)self));
}

static PyObject *request_space(PyObject *self, PyObject *number)
{
    Py_ssize_t total = PyLong_AsSsize_t(number);
    return total == -1 && PyErr_Occurred() ? NULL : truth(writer_request_space((Writer *)self, total));
}

static PyObject *cancel_request(PyObject *self, PyObject *unused)
{
    (void)unused;
    return writer_cancel_request((Writer *)self) < 0 ? NULL : ref(Py_None);
}

static PyMethodDef methods[] = {
    {"free", free_bytes, METH_NOARGS, NULL},
    {"put", (PyCFunction)(void (*)(void))put, METH_FASTCALL, NULL},
    {"commit", commit, METH_NOARGS, NULL},
    {"request_space", request_space, METH_O, NULL},
    {"cancel_request", cancel_request, METH_NOARGS, NULL},
    {"close", ring_close, METH_NOARGS, NULL},
    {"describe", ring_describe, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"header", ring_get_header, NULL, NULL, NULL},
    {"data", ring_get_data, NULL, NULL, NULL},
    {"own_index", own_index, NULL, NULL, NULL},
    {"empty", empty, NULL, NULL, NULL},
    {"staged", staged, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef members[] = {
    {"size", T_PYSSIZET, offsetof(Ring, size), READONLY, NULL},
    {"largest", T_PYSSIZET, offsetof(Writer, largest), READONLY, NULL},
    {"batches", T_ULONGLONG, offsetof(Ring, batches), 0, NULL},
    {"signals", T_ULONGLONG, offsetof(Ring, signals), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "See vmbus.ring.pure.RingWriter."},
    {Py_tp_new, new},
    {Py_tp_dealloc, dealloc},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {Py_tp_members, members},
    {0, NULL},
};

PyType_Spec writer_spec = {
    .name = "vmbus.native._core.RingWriter",
    .basicsize = sizeof(Writer),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};
