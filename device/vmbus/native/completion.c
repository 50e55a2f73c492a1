/* An incoming packet: the native twin of vmbus.kmcl.flow_pure.CompletionBase. */

#include "flow.h"

#include <pythread.h>
#include <string.h>
#include <structmember.h>

Completion *completion_new(Flow *flow, int kind, PyObject *packet)
{
    Completion *self = (Completion *)PyType_GenericAlloc(names.completion, 0);
    if (self == NULL)
        return NULL;
    self->flow = (Flow *)ref((PyObject *)flow);
    self->channel = ref(flow->channel);
    self->transaction = ref(PyTuple_GetItem(packet, 2));
    self->body = ref(PyTuple_GetItem(packet, 3));
    self->payload = ref(PyTuple_GetItem(packet, 4));
    self->size = PyBytes_Size(self->body) + PyBytes_Size(self->payload);
    self->kind = kind;
    self->wanted = PyLong_AsLong(PyTuple_GetItem(packet, 1)) != 0;
    if (flow->context_size > 0) {
        self->context = PyByteArray_FromStringAndSize(NULL, flow->context_size);
        if (self->context == NULL) {
            drop(self);
            return NULL;
        }
        memset(PyByteArray_AsString(self->context), 0, (size_t)flow->context_size);
    }
    return self;
}

/* The rest of `Flow.complete`, in which an answer goes straight into the ring. */
static int answer(Flow *flow, Completion *self, PyObject *reply)
{
    Writer *writer = flow_writer(flow);
    if (writer == NULL || !flow->direct || flow->cork <= 0)
        return call(flow->channel, names.outgoing, "reply", self->transaction, reply);
    flow->answered++;
    Descriptor descriptor = {.kind = COMPLETION, .offset8 = 2};
    descriptor.transaction = PyLong_AsUnsignedLongLong(self->transaction);
    int placed = writer_put(writer, &descriptor, (const uint8_t *)PyBytes_AsString(reply), PyBytes_Size(reply));
    if (placed < 0)
        return tell_error(flow->channel, "ring_failed", NULL, NULL);
    if (!placed)
        return call(flow->channel, names.outgoing, "reply_waits", self->transaction, reply);
    return 0;
}

/* `Flow.complete`. */
static PyObject *finish(Flow *flow, Completion *self, PyObject *reply)
{
    if (PyDict_DelItem(flow->outstanding, (PyObject *)self) < 0) {
        if (!PyErr_ExceptionMatches(PyExc_KeyError))
            return NULL;
        PyErr_Clear(); /* it was orphaned */
        return ref(Py_None);
    }
    flow->held_bytes -= self->size;
    ref((PyObject *)flow);
    int outcome = self->wanted ? answer(flow, self, reply) : 0;
    if (outcome == 0 && flow->attention)
        outcome = call(flow->channel, NULL, "completed_one", NULL, NULL);
    drop(flow);
    return outcome < 0 ? NULL : ref(Py_None);
}

PyObject *flow_complete(PyObject *flow, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2 || !PyObject_TypeCheck(args[0], names.completion) || !PyBytes_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "complete() takes a Completion and bytes");
        return NULL;
    }
    return finish((Flow *)flow, (Completion *)args[0], args[1]);
}

/* complete(reply=b"") */
static PyObject *complete(PyObject *object, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    Completion *self = (Completion *)object;
    Flow *flow = self->flow;
    Py_ssize_t named = keywords == NULL ? 0 : PyTuple_Size(keywords);
    if (count + named > 1 || (named == 1 && PyUnicode_CompareWithASCIIString(PyTuple_GetItem(keywords, 0), "reply"))) {
        PyErr_SetString(PyExc_TypeError, "complete() takes one argument, reply");
        return NULL;
    }
    PyObject *reply = count + named == 1 ? args[0] : names.nothing;
    if (flow == NULL || self->done || self->grant != NULL || !PyBytes_Check(reply) ||
        PyBytes_Size(reply) > flow->largest_reply || PyThread_get_thread_ident() != flow->thread)
        return PyObject_CallMethod(object, "complete_otherwise", "O", reply);
    self->done = 1;
    return finish(flow, self, reply);
}

/* ---- for Python -------------------------------------------------------------------------------------------------- */

static int clear(PyObject *object)
{
    Completion *self = (Completion *)object;
    CLEAR(self->flow);
    CLEAR(self->channel);
    CLEAR(self->transaction);
    CLEAR(self->context);
    CLEAR(self->body);
    CLEAR(self->payload);
    CLEAR(self->grant);
    return 0;
}

static int traverse(PyObject *object, visitproc visit, void *arg)
{
    Completion *self = (Completion *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->flow);
    Py_VISIT(self->channel);
    Py_VISIT(self->context);
    Py_VISIT(self->grant);
    return 0;
}

static void dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    clear(object);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    drop(type);
}

static PyMethodDef methods[] = {
    {"complete", (PyCFunction)(void (*)(void))complete, METH_FASTCALL | METH_KEYWORDS,
     "complete($self, reply=b\"\")\n--\n\nFinish the packet (VmbChannelPacketComplete): see vmbus.kmcl.flow_pure."},
    {NULL, NULL, 0, NULL},
};

static PyObject *has_external_data(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(((Completion *)self)->kind == GPA_DIRECT);
}

static PyGetSetDef properties[] = {
    {"has_external_data", has_external_data, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef members[] = {
    {"flow", T_OBJECT, offsetof(Completion, flow), READONLY, NULL},
    {"channel", T_OBJECT, offsetof(Completion, channel), READONLY, NULL},
    {"transaction", T_OBJECT, offsetof(Completion, transaction), READONLY, NULL},
    {"context", T_OBJECT, offsetof(Completion, context), 0, NULL},
    {"_body", T_OBJECT, offsetof(Completion, body), READONLY, NULL},
    {"_payload", T_OBJECT, offsetof(Completion, payload), READONLY, NULL},
    {"_grant", T_OBJECT, offsetof(Completion, grant), 0, NULL},
    {"size", T_PYSSIZET, offsetof(Completion, size), READONLY, NULL},
    {"kind", T_INT, offsetof(Completion, kind), READONLY, NULL},
    {"wanted", T_BOOL, offsetof(Completion, wanted), READONLY, NULL},
    {"deferred", T_BOOL, offsetof(Completion, deferred), 0, NULL},
    {"done", T_BOOL, offsetof(Completion, done), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "See vmbus.kmcl.flow_pure.CompletionBase."},
    {Py_tp_dealloc, dealloc},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {Py_tp_members, members},
    {0, NULL},
};

PyType_Spec completion_spec = {
    .name = "vmbus.native._core.CompletionBase",
    .basicsize = sizeof(Completion),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    .slots = slots,
};
