/* Packets as they lie in a ring: the native twin of vmbus.wire.packet.pure_split_packets, and packing. */

#include "core.h"

#include <string.h>

static inline Descriptor descriptor_at(const uint8_t *data)
{
    Descriptor descriptor;
    _Static_assert(sizeof descriptor == DESCRIPTOR_SIZE, "a descriptor is laid out as on the wire");
    memcpy(&descriptor, data, sizeof descriptor);
    return descriptor;
}

Py_ssize_t packet_first_size(const uint8_t *data, Py_ssize_t size)
{
    return size < DESCRIPTOR_SIZE ? 0 : descriptor_at(data).len8 * 8 + TRAILER_SIZE;
}

void packet_pack(uint8_t *to, const Descriptor *descriptor, const uint8_t *body, Py_ssize_t length, Py_ssize_t padded,
                 uint32_t start)
{
    uint64_t trailer = (uint64_t)start << 32;
    memcpy(to, descriptor, DESCRIPTOR_SIZE);
    to += DESCRIPTOR_SIZE;
    if (length > 0)
        memcpy(to, body, (size_t)length);
    memset(to + length, 0, (size_t)(padded - length));
    memcpy(to + padded, &trailer, TRAILER_SIZE);
}

/* Put a new reference into a tuple; false, with an exception, when there is none. */
static bool set(PyObject *tuple, Py_ssize_t position, PyObject *item)
{
    return item != NULL && PyTuple_SetItem(tuple, position, item) == 0;
}

static PyObject *raw_packet(const Descriptor *descriptor, const uint8_t *data, Py_ssize_t start, Py_ssize_t payload,
                            Py_ssize_t stop)
{
    /* What RawPacket(...) comes to, without a call of Python for each packet. */
    PyObject *packet = PyType_GenericAlloc(core.raw_packet, 6);
    if (packet == NULL)
        return NULL;
    const char *text = (const char *)data;
    if (set(packet, 0, PyLong_FromLong(descriptor->kind)) && set(packet, 1, PyLong_FromLong(descriptor->flags)) &&
        set(packet, 2, PyLong_FromUnsignedLongLong(descriptor->transaction)) &&
        set(packet, 3, PyBytes_FromStringAndSize(text + start + DESCRIPTOR_SIZE, payload - start - DESCRIPTOR_SIZE)) &&
        set(packet, 4, PyBytes_FromStringAndSize(text + payload, stop - payload)) &&
        set(packet, 5, PyLong_FromSsize_t(stop + TRAILER_SIZE)))
        return packet;
    drop(packet);
    return NULL;
}

PyObject *packets_split(const uint8_t *data, Py_ssize_t size, PyObject **error)
{
    *error = NULL;
    PyObject *packets = PyList_New(0);
    if (packets == NULL || core_ready() < 0)
        goto failed;
    for (Py_ssize_t start = 0; start + DESCRIPTOR_SIZE <= size;) {
        Descriptor found = descriptor_at(data + start);
        Py_ssize_t payload = start + found.offset8 * 8, stop = start + found.len8 * 8, end = stop + TRAILER_SIZE;
        bool wrong;
        if (found.kind == INBAND || found.kind == COMPLETION) {
            wrong = found.offset8 != 2;
        } else if (found.kind == GPA_DIRECT || found.kind == TRANSFER_PAGES) {
            wrong = found.offset8 < 3;
        } else {
            *error = PyUnicode_FromFormat("packet type %d at offset %zd of the batch is not served", found.kind, start);
            if (*error == NULL)
                goto failed;
            break;
        }
        if (wrong || found.len8 < found.offset8 || (found.flags & ~FLAG_COMPLETION_REQUESTED)) {
            *error = PyUnicode_FromFormat("descriptor type=%d offset8=%d len8=%d flags=0x%x is malformed", found.kind,
                                          found.offset8, found.len8, found.flags);
            if (*error == NULL)
                goto failed;
            break;
        }
        if (end > size)
            break;
        PyObject *packet = raw_packet(&found, data, start, payload, stop);
        if (packet == NULL)
            goto failed;
        int appended = PyList_Append(packets, packet);
        drop(packet);
        if (appended < 0)
            goto failed;
        start = end;
    }
    return packets;
failed:
    drop(packets);
    return NULL;
}
