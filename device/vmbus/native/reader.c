/* The reading end of a ring: the native twin of vmbus.ring.pure.RingReader. */

#include "core.h"

#include <structmember.h>

int reader_available(Reader *reader, Py_ssize_t *available)
{
    Ring *ring = &reader->ring;
    Py_ssize_t write;
    if (ring_load_index(ring, WRITE_INDEX, "write index", &write) < 0)
        return -1;
    Py_ssize_t fresh = ring_distance(ring, ring->index, write);
    if (ring_distance(ring, ring->index, ring->peer) > fresh)
        return ring_corrupt("write index went back from 0x%zx to 0x%zx", (size_t)ring->peer, (size_t)write);
    ring->peer = write;
    *available = fresh;
    return 0;
}

/* A private copy of the next `length` bytes, kept as `batch`. */
static int copy(Reader *reader, Py_ssize_t length)
{
    Ring *ring = &reader->ring;
    PyObject *batch = PyBytes_FromStringAndSize(NULL, length);
    if (batch == NULL)
        return -1;
    uint8_t *to = (uint8_t *)PyBytes_AsString(batch);
    Py_ssize_t first = ring->size - ring->index;
    if (first > length)
        first = length;
    if (span_read(&ring->data, ring->index, to, first) < 0 ||
        (length > first && span_read(&ring->data, 0, to + first, length - first) < 0)) {
        drop(batch);
        return -1;
    }
    PyObject *old = reader->batch;
    reader->batch = batch;
    drop(old);
    return 0;
}

/* The packets in `batch`. It is held meanwhile: whoever runs by way of an allocation may fetch the next one. */
static PyObject *parse(Reader *reader, Py_ssize_t *claimed, PyObject **error)
{
    PyObject *batch = ref(reader->batch);
    const uint8_t *data = (const uint8_t *)PyBytes_AsString(batch);
    Py_ssize_t size = PyBytes_Size(batch);
    *claimed = packet_first_size(data, size);
    PyObject *packets = packets_split(data, size, error);
    drop(batch);
    return packets;
}

/* What the next packet claims to be long, its trailer included; -1 with an exception. Only a hint for how much to copy: it
   may change before that. Its words never wrap: indices and sizes of rings are multiples of 8. */
static Py_ssize_t hinted_size(Reader *reader)
{
    uint8_t head[8];
    if (span_read(&reader->ring.data, reader->ring.index, head, sizeof head) < 0)
        return -1;
    return (Py_ssize_t)(head[4] | head[5] << 8) * 8 + 8;
}

PyObject *reader_fetch(Reader *reader, Py_ssize_t limit, PyObject **error)
{
    Py_ssize_t available, wanted, again;
    *error = NULL;
    if (reader_available(reader, &available) < 0)
        return NULL;
    if (available == 0)
        return PyList_New(0);
    if (limit < 0)
        limit = 0;
    Py_ssize_t length = available < limit ? available : limit;
    if (available > limit) {
        Py_ssize_t hint = hinted_size(reader);
        if (hint < 0)
            return NULL;
        if (hint > length && hint <= available)
            length = hint; /* a packet longer than the limit is copied and parsed once, too */
    }
    if (copy(reader, length) < 0)
        return NULL;
    PyObject *packets = parse(reader, &wanted, error);
    if (packets == NULL || PyList_Size(packets) > 0 || *error != NULL)
        return packets;
    /* It became longer since it was looked at. Copy again, and believe only the new copy. */
    if (wanted < limit)
        wanted = limit;
    if (wanted <= available) {
        drop(packets);
        if (copy(reader, wanted) < 0)
            return NULL;
        packets = parse(reader, &again, error);
    }
    if (packets != NULL && PyList_Size(packets) == 0 && *error == NULL) {
        *error = PyUnicode_FromFormat("a packet claims %zd bytes and %zd were written", wanted, available);
        if (*error == NULL)
            CLEAR(packets);
    }
    return packets;
}

int reader_advance(Reader *reader, Py_ssize_t consumed)
{
    Ring *ring = &reader->ring;
    if (consumed < 0 || consumed > ring->size) {
        PyErr_Format(core.usage_error, "%zd bytes cannot be consumed from a ring of %zd", consumed, ring->size);
        return -1;
    }
    Py_ssize_t index = ring->index + consumed;
    ring->index = index = index >= ring->size ? index - ring->size : index;
    if (span_store32(&ring->header, READ_INDEX, (uint32_t)index) < 0)
        return -1;
    ring->batches++;
    uint32_t pending;
    if (core_fence() < 0 || span_load32(&ring->header, PENDING_SEND_SIZE, &pending) < 0)
        return -1;
    pending &= ~(uint32_t)7;
    if (pending == 0)
        return 0;
    Py_ssize_t available;
    if (reader_available(reader, &available) < 0)
        return -1;
    Py_ssize_t room = ring->size - 8 - available;
    if (!(room - consumed < (Py_ssize_t)pending && (Py_ssize_t)pending <= room))
        return 0;
    ring->signals++;
    return 1;
}

int reader_mask(Reader *reader)
{
    return span_store32(&reader->ring.header, INTERRUPT_MASK, 1);
}

int reader_unmask(Reader *reader)
{
    Py_ssize_t available;
    if (span_store32(&reader->ring.header, INTERRUPT_MASK, 0) < 0 || core_fence() < 0 ||
        reader_available(reader, &available) < 0)
        return -1;
    if (available == 0)
        return 1;
    return reader_mask(reader) < 0 ? -1 : 0;
}

/* ---- for Python -------------------------------------------------------------------------------------------------- */

static int clear(PyObject *self)
{
    CLEAR(((Reader *)self)->batch);
    return ring_clear((Ring *)self);
}

static int traverse(PyObject *self, visitproc visit, void *arg)
{
    return ring_traverse((Ring *)self, visit, arg); /* bytes hold nothing */
}

static void dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    clear(self);
    ring_free(self);
}

static PyObject *new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"header", "data", "own", NULL};
    PyObject *header, *data, *own = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|$O:RingReader", names, &header, &data, &own))
        return NULL;
    Reader *self = (Reader *)PyType_GenericAlloc(type, 0);
    if (self == NULL)
        return NULL;
    Ring *ring = &self->ring;
    self->batch = PyBytes_FromStringAndSize("", 0);
    if (self->batch == NULL || ring_init(ring, header, data) < 0 ||
        ring_own_index(ring, READ_INDEX, "read index", own, &ring->index) < 0 ||
        ring_load_index(ring, WRITE_INDEX, "write index", &ring->peer) < 0)
        CLEAR(self);
    return (PyObject *)self;
}

static PyObject *own_index(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromSsize_t(((Ring *)self)->index);
}

static PyObject *batch(PyObject *self, void *unused)
{
    (void)unused;
    return ref(((Reader *)self)->batch);
}

static PyObject *available(PyObject *self, PyObject *unused)
{
    (void)unused;
    Py_ssize_t bytes;
    return reader_available((Reader *)self, &bytes) < 0 ? NULL : PyLong_FromSsize_t(bytes);
}

static PyObject *fetch(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Py_ssize_t limit = DEFAULT_BATCH;
    if (count > 1) {
        PyErr_SetString(PyExc_TypeError, "fetch() takes at most one argument");
        return NULL;
    }
    if (count == 1) {
        limit = PyLong_AsSsize_t(args[0]);
        if (limit == -1 && PyErr_Occurred())
            return NULL;
    }
    PyObject *error, *packets = reader_fetch((Reader *)self, limit, &error);
    if (packets == NULL)
        return NULL;
    PyObject *both = PyTuple_New(2);
    if (both == NULL) {
        drop(packets);
        drop(error);
        return NULL;
    }
    PyTuple_SetItem(both, 0, packets);
    PyTuple_SetItem(both, 1, error != NULL ? error : ref(Py_None));
    return both;
}

static PyObject *advance(PyObject *self, PyObject *number)
{
    Py_ssize_t consumed = PyLong_AsSsize_t(number);
    return consumed == -1 && PyErr_Occurred() ? NULL : truth(reader_advance((Reader *)self, consumed));
}

static PyObject *mask(PyObject *self, PyObject *unused)
{
    (void)unused;
    return reader_mask((Reader *)self) < 0 ? NULL : ref(Py_None);
}

static PyObject *unmask(PyObject *self, PyObject *unused)
{
    (void)unused;
    return truth(reader_unmask((Reader *)self));
}

static PyMethodDef methods[] = {
    {"available", available, METH_NOARGS, NULL},
    {"fetch", (PyCFunction)(void (*)(void))fetch, METH_FASTCALL, NULL},
    {"advance", advance, METH_O, NULL},
    {"mask", mask, METH_NOARGS, NULL},
    {"unmask", unmask, METH_NOARGS, NULL},
    {"close", ring_close, METH_NOARGS, NULL},
    {"describe", ring_describe, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"header", ring_get_header, NULL, NULL, NULL},
    {"data", ring_get_data, NULL, NULL, NULL},
    {"own_index", own_index, NULL, NULL, NULL},
    {"batch", batch, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef members[] = {
    {"size", T_PYSSIZET, offsetof(Ring, size), READONLY, NULL},
    {"batches", T_ULONGLONG, offsetof(Ring, batches), 0, NULL},
    {"signals", T_ULONGLONG, offsetof(Ring, signals), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "See vmbus.ring.pure.RingReader."},
    {Py_tp_new, new},
    {Py_tp_dealloc, dealloc},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {Py_tp_members, members},
    {0, NULL},
};

PyType_Spec reader_spec = {
    .name = "vmbus.native._core.RingReader",
    .basicsize = sizeof(Reader),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};
