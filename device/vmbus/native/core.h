/* The native core: what its files share. See docs/native-core.md.

   One module in one interpreter, with the GIL held throughout, so its state is one static object. Memory that the guest
   shares is only touched in pieces.c; between looking whether a window is still there and touching it, nothing may run
   that could run Python (an allocation of a Python object can, by way of the garbage collector). */

#ifndef VMBUS_CORE_H
#define VMBUS_CORE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>

#if !defined(Py_LIMITED_API) || !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "this is for the stable ABI of Python, on little-endian machines"
#endif

/* The running interpreter's own counting of references. The inline one of the headers may be that of a Python which
   has no immortal objects, and would wear down those of a later one. */
static inline PyObject *ref(void *object)
{
    Py_IncRef((PyObject *)object);
    return (PyObject *)object;
}

static inline void drop(void *object)
{
    Py_DecRef((PyObject *)object);
}

/* Empty a slot first and let go of what was in it afterwards: letting go may run anything. */
#define CLEAR(slot)              \
    do {                         \
        void *held_ = (slot);    \
        (slot) = NULL;           \
        drop(held_);             \
    } while (0)

typedef struct {
    PyObject *ring_corrupt; /* vmbus.ring.pure.RingCorrupt; NULL until `core_ready` */
    PyObject *usage_error;
    PyObject *struct_error;
    PyTypeObject *raw_packet; /* vmbus.wire.packet.RawPacket, a tuple */
    PyObject *peer_error;
    PyTypeObject *pieces_type, *writer_type, *completion_base;
    PyObject *fence_watcher; /* for tests: called after each fence; NULL: nobody */
    PyObject *log, *mark, *lend, *size; /* names */
} Core;

extern Core core;

/* Fetch the Python types that are needed here; they are ours, and import this module. 0, or -1 with an exception. */
int core_ready(void);

/* A new reference to what a module has under a name, imported if need be; NULL with an exception. */
PyObject *core_import(const char *module, const char *name);

/* A full fence: every load and store before it is performed before any after it. 0, or -1 with an exception. */
int core_fence(void);

/* Functions that give back `int`: 0 (or a truth value, 1 or 0), or -1 with a Python exception set. */

/* ---- pieces.c: guest memory ------------------------------------------------------------------------------------- */

/* The pieces of one window, borrowed from it. The window calls `release` when it is revoked or closed. */
typedef struct Pieces Pieces;

/* A window as the rings use it. Without pieces (a window that lends none, or one that was revoked) its Python methods
   are called: they work, or say why not. */
typedef struct {
    PyObject *window;
    Pieces *pieces; /* or NULL */
} Span;

int span_open(Span *span, PyObject *window, Py_ssize_t size);
void span_clear(Span *span);
int span_traverse(const Span *span, visitproc visit, void *arg);

/* Offsets and lengths are the caller's to keep in range. Stores are in the dirty log afterwards, when one is running. */
int span_load32(const Span *span, Py_ssize_t offset, uint32_t *value);
int span_store32(const Span *span, Py_ssize_t offset, uint32_t value);
int span_read(const Span *span, Py_ssize_t offset, uint8_t *to, Py_ssize_t length);
int span_write(const Span *span, Py_ssize_t offset, const uint8_t *from, Py_ssize_t length);

extern PyType_Spec pieces_spec;
extern PyType_Spec reach_spec; /* reach.c */

/* ---- packets.c -------------------------------------------------------------------------------------------------- */

enum {
    DESCRIPTOR_SIZE = 16,
    TRAILER_SIZE = 8,
    OVERHEAD = DESCRIPTOR_SIZE + TRAILER_SIZE,
    MAX_PACKET_SIZE = 0xFFFF * 8,
    FLAG_COMPLETION_REQUESTED = 1,
    INBAND = 6,
    TRANSFER_PAGES = 7,
    GPA_DIRECT = 9,
    COMPLETION = 11,
};

typedef struct {
    uint16_t kind, offset8, len8, flags;
    uint64_t transaction;
} Descriptor;

/* The packets in a private copy, as a list of RawPacket; what is wrong behind them in `error` (NULL: nothing). */
PyObject *packets_split(const uint8_t *data, Py_ssize_t size, PyObject **error);

/* Ring bytes that the first packet claims, its trailer included; 0 without a descriptor. */
Py_ssize_t packet_first_size(const uint8_t *data, Py_ssize_t size);

/* Write one packet of `padded` + OVERHEAD bytes to `to`; `start`: where it will lie in the ring. */
void packet_pack(uint8_t *to, const Descriptor *descriptor, const uint8_t *body, Py_ssize_t length, Py_ssize_t padded,
                 uint32_t start);

/* ---- ring.c, reader.c, writer.c --------------------------------------------------------------------------------- */

enum {
    PAGE_BYTES = 4096,
    WRITE_INDEX = 0,
    READ_INDEX = 4,
    INTERRUPT_MASK = 8,
    PENDING_SEND_SIZE = 12,
    FEATURE_BITS = 64,
    FEATURE_PENDING_SEND_SIZE = 1,
    DEFAULT_BATCH = 16384,
};

typedef struct {
    PyObject_HEAD
    Span header, data;
    Py_ssize_t size;
    Py_ssize_t index; /* ours; what is staged is behind it already */
    Py_ssize_t peer;  /* the other end's, when it was last found to be right */
    unsigned long long batches, signals;
} Ring;

typedef struct {
    Ring ring;
    PyObject *batch;
} Reader;

typedef struct {
    Ring ring;
    Py_ssize_t largest, free, published;
    uint8_t *staged;
    Py_ssize_t staged_size, staged_room;
    bool requested;
} Writer;

static inline Py_ssize_t ring_distance(const Ring *ring, Py_ssize_t from, Py_ssize_t to)
{
    return to >= from ? to - from : to - from + ring->size;
}

int ring_init(Ring *ring, PyObject *header, PyObject *data);
int ring_load_index(const Ring *ring, Py_ssize_t word, const char *what, Py_ssize_t *index);
int ring_own_index(const Ring *ring, Py_ssize_t word, const char *what, PyObject *own, Py_ssize_t *index);
int ring_corrupt(const char *format, ...) __attribute__((format(printf, 1, 2)));
int ring_clear(Ring *ring);
int ring_traverse(Ring *ring, visitproc visit, void *arg);
PyObject *ring_close(PyObject *self, PyObject *unused);
PyObject *ring_describe(PyObject *self, PyObject *unused);
PyObject *ring_get_header(PyObject *self, void *unused);
PyObject *ring_get_data(PyObject *self, void *unused);
void ring_free(PyObject *self);

int reader_available(Reader *reader, Py_ssize_t *available);
PyObject *reader_fetch(Reader *reader, Py_ssize_t limit, PyObject **error); /* a list; `error` as packets_split */
int reader_advance(Reader *reader, Py_ssize_t consumed);                      /* 1: signal the writer */
int reader_mask(Reader *reader);
int reader_unmask(Reader *reader); /* 1: quiet */

int writer_free(Writer *writer, Py_ssize_t *room);
int writer_put(Writer *writer, const Descriptor *descriptor, const uint8_t *body, Py_ssize_t length); /* 0: no room */
int writer_commit(Writer *writer);                                                /* 1: signal the reader */
int writer_request_space(Writer *writer, Py_ssize_t total);                       /* 1: it is there already */
int writer_cancel_request(Writer *writer);

extern PyType_Spec reader_spec, writer_spec;

static inline PyObject *truth(int outcome)
{
    return outcome < 0 ? NULL : PyBool_FromLong(outcome);
}

#endif
