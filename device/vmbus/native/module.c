/* The module vmbus.native._core. */

#include "flow.h"

#include <stdatomic.h>

Core core;

PyObject *core_import(const char *module, const char *name)
{
    PyObject *imported = PyImport_ImportModule(module);
    PyObject *found = imported == NULL ? NULL : PyObject_GetAttrString(imported, name);
    drop(imported);
    return found;
}

int core_ready(void)
{
    if (core.raw_packet != NULL)
        return 0;
    PyObject *ring_corrupt = core_import("vmbus.ring.pure", "RingCorrupt");
    PyObject *usage_error = core_import("vmbus.errors", "UsageError");
    PyObject *peer_error = core_import("vmbus.errors", "PeerError");
    PyObject *struct_error = core_import("struct", "error");
    PyObject *raw_packet = core_import("vmbus.wire.packet", "RawPacket");
    if (raw_packet != NULL && !(PyType_Check(raw_packet) && PyType_IsSubtype((PyTypeObject *)raw_packet, &PyTuple_Type))) {
        PyErr_SetString(PyExc_TypeError, "vmbus.wire.packet.RawPacket is no tuple");
        CLEAR(raw_packet);
    }
    if (ring_corrupt == NULL || usage_error == NULL || peer_error == NULL || struct_error == NULL || raw_packet == NULL) {
        drop(ring_corrupt);
        drop(usage_error);
        drop(peer_error);
        drop(struct_error);
        drop(raw_packet);
        return -1;
    }
    core.ring_corrupt = ring_corrupt;
    core.usage_error = usage_error;
    core.peer_error = peer_error;
    core.struct_error = struct_error;
    core.raw_packet = (PyTypeObject *)raw_packet;
    return 0;
}

int core_fence(void)
{
    atomic_thread_fence(memory_order_seq_cst);
    if (core.fence_watcher == NULL)
        return 0;
    PyObject *watcher = ref(core.fence_watcher), *seen = PyObject_CallFunctionObjArgs(watcher, NULL);
    drop(watcher);
    drop(seen);
    return seen == NULL ? -1 : 0;
}

static PyObject *full_fence(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    atomic_thread_fence(memory_order_seq_cst);
    return ref(Py_None);
}

static PyObject *watch_fences(PyObject *module, PyObject *watcher)
{
    (void)module;
    PyObject *old = core.fence_watcher;
    core.fence_watcher = watcher == Py_None ? NULL : ref(watcher);
    return old != NULL ? old : ref(Py_None);
}

static PyObject *split_packets(PyObject *module, PyObject *data)
{
    (void)module;
    Py_buffer bytes;
    if (PyObject_GetBuffer(data, &bytes, PyBUF_SIMPLE) < 0)
        return NULL;
    PyObject *error, *packets = packets_split(bytes.buf, bytes.len, &error);
    PyBuffer_Release(&bytes);
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

static PyMethodDef functions[] = {
    {"full_fence", full_fence, METH_NOARGS,
     "full_fence()\n--\n\nEvery load and store before this call is performed before any load or store after it."},
    {"split_packets", split_packets, METH_O, "split_packets(data, /)\n--\n\nSee vmbus.wire.packet."},
    {"watch_fences", watch_fences, METH_O,
     "watch_fences(call, /)\n--\n\nFor tests: `call` is called after each fence of a ring; None: nobody. Returns who was."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "vmbus.native._core",
    .m_doc = "Rings and packets in C; see docs/native-core.md.",
    .m_size = -1,
    .m_methods = functions,
};

static int add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **kept)
{
    PyObject *type = PyType_FromSpec(spec);
    if (type == NULL)
        return -1;
    int added = PyModule_AddType(module, (PyTypeObject *)type);
    if (kept != NULL && added == 0)
        *kept = (PyTypeObject *)type;
    else
        drop(type);
    return added;
}

PyMODINIT_FUNC PyInit__core(void)
{
    core.log = PyUnicode_InternFromString("log");
    core.mark = PyUnicode_InternFromString("mark");
    core.lend = PyUnicode_InternFromString("lend");
    core.size = PyUnicode_InternFromString("size");
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL || core.log == NULL || core.mark == NULL || core.lend == NULL || core.size == NULL ||
        add_type(module, &pieces_spec, &core.pieces_type) < 0 || add_type(module, &reach_spec, NULL) < 0 || add_type(module, &reader_spec, NULL) < 0 ||
        add_type(module, &writer_spec, &core.writer_type) < 0 || add_type(module, &flow_spec, NULL) < 0 ||
        add_type(module, &completion_spec, &core.completion_base) < 0)
        CLEAR(module);
    return module;
}
