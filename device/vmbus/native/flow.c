/* The part of a channel that is touched for every packet: the native twin of vmbus.kmcl.flow_pure.Flow.

   Callbacks of an owner may do anything to the channel, also close it. So what is needed after one is held by a
   reference of its own, and everything else is looked at again. */

#include "flow.h"

#include <structmember.h>
#include <time.h>

Names names;

static PyObject *member(const char *module, const char *type, const char *name)
{
    PyObject *owner = core_import(module, type), *found = owner == NULL ? NULL : PyObject_GetAttrString(owner, name);
    drop(owner);
    return found;
}

int names_ready(void)
{
    if (names.completion != NULL)
        return 0;
    struct {
        PyObject **slot;
        PyObject *value;
    } all[] = {
        {&names.idle, member("vmbus.kmcl.packet", "PacketState", "IDLE")},
        {&names.sent, member("vmbus.kmcl.packet", "PacketState", "SENT")},
        {&names.success, member("vmbus.kmcl.status", "Status", "SUCCESS")},
        {&names.inband, PyLong_FromLong(INBAND)},
        {&names.two, PyLong_FromLong(2)},
        {&names.zero, PyLong_FromLong(0)},
        {&names.one, PyLong_FromLong(1)},
        {&names.nothing, PyBytes_FromStringAndSize("", 0)},
        {&names.state, PyUnicode_InternFromString("state")},
        {&names.routine, PyUnicode_InternFromString("completion_routine")},
        {&names.transaction, PyUnicode_InternFromString("transaction")},
        {&names.kind, PyUnicode_InternFromString("kind")},
        {&names.offset8, PyUnicode_InternFromString("offset8")},
        {&names.flags, PyUnicode_InternFromString("flags")},
        {&names.since, PyUnicode_InternFromString("since")},
        {&names.outgoing, PyUnicode_InternFromString("outgoing")},
        {&names.incoming, PyUnicode_InternFromString("incoming")},
    };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        if (all[i].value == NULL)
            return -1;
        *all[i].slot = all[i].value;
    }
    PyObject *type = core_import("vmbus.kmcl.completion", "Completion");
    if (type == NULL)
        return -1;
    if (!PyType_Check(type) || !PyType_IsSubtype((PyTypeObject *)type, core.completion_base)) {
        PyErr_SetString(PyExc_TypeError, "vmbus.kmcl.completion.Completion is no CompletionBase");
        drop(type);
        return -1;
    }
    names.completion = (PyTypeObject *)type;
    return core_ready();
}

Writer *flow_writer(const Flow *flow)
{
    PyObject *writer = flow->writer;
    return writer != NULL && Py_TYPE(writer) == core.writer_type ? (Writer *)writer : NULL;
}

int call(PyObject *target, PyObject *attribute, const char *method, PyObject *first, PyObject *second)
{
    PyObject *object = attribute == NULL ? ref(target) : PyObject_GetAttr(target, attribute);
    PyObject *bound = object == NULL ? NULL : PyObject_GetAttrString(object, method);
    PyObject *outcome = bound == NULL ? NULL : PyObject_CallFunctionObjArgs(bound, first, first == NULL ? NULL : second, NULL);
    drop(object);
    drop(bound);
    drop(outcome);
    return outcome == NULL ? -1 : 0;
}

int tell_error(PyObject *target, const char *method, const char *before, PyObject *after)
{
    if (!PyErr_ExceptionMatches(PyExc_Exception))
        return -1;
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    if (traceback != NULL)
        PyException_SetTraceback(error, traceback);
    PyObject *outcome = before == NULL ? PyObject_CallMethod(target, method, "O", error)
                                       : PyObject_CallMethod(target, method, "sOO", before, error, after);
    drop(type);
    drop(error);
    drop(traceback);
    drop(outcome);
    return outcome == NULL ? -1 : 0;
}

/* A callback of the owner raised on a packet. */
static int owner_failed(Flow *flow, const char *callback, PyObject *transaction)
{
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyObject *where = PyUnicode_FromFormat("packet %S", transaction);
    if (where == NULL) {
        drop(type);
        drop(error);
        drop(traceback);
        return -1;
    }
    PyErr_Restore(type, error, traceback);
    int outcome = tell_error(flow->channel, "owner_failed", callback, where);
    drop(where);
    return outcome;
}

static int fail(Flow *flow, const char *reason, PyObject *transaction)
{
    PyObject *text = PyUnicode_FromFormat(reason, transaction);
    int outcome = text == NULL ? -1 : call(flow->channel, NULL, "fail", text, NULL);
    drop(text);
    return outcome;
}

/* One of the owner's packets is complete, and its own again. 1, 0: failed and told; -1 */
static int completed(Flow *flow, PyObject *transaction, PyObject *payload)
{
    PyObject *packet = PyDict_GetItemWithError(flow->sent, transaction);
    if (packet == NULL)
        return PyErr_Occurred() || fail(flow, "a completion for transaction %S, which is not waiting for one", transaction) < 0
                   ? -1
                   : 0;
    ref(packet);
    int outcome = -1;
    if (PyDict_DelItem(flow->sent, transaction) < 0)
        goto done;
    if (flow->finishing) {
        outcome = call(flow->channel, names.outgoing, "finish_later", packet, payload);
        goto done;
    }
    if (PyObject_SetAttr(packet, names.state, names.idle) < 0)
        goto done;
    PyObject *routine = PyObject_GetAttr(packet, names.routine);
    if (routine == NULL)
        goto done;
    flow->finishing = 1;
    flow->completed++;
    PyObject *result = PyObject_CallFunctionObjArgs(routine, packet, names.success, payload, NULL);
    outcome = result != NULL ? 0 : owner_failed(flow, "the completion routine", transaction);
    flow->finishing = 0;
    drop(result);
    drop(routine);
    if (outcome == 0 && flow->pending)
        outcome = call(flow->channel, names.outgoing, "run_routines", NULL, NULL);
done:
    drop(packet);
    return outcome < 0 ? -1 : 1;
}

/* Hand one packet to the owner. 1; 0: failed and told; -1 */
static int hand(Flow *flow, int kind, PyObject *packet)
{
    PyObject *transaction = PyTuple_GetItem(packet, 2), *payload = PyTuple_GetItem(packet, 4);
    PyObject *process = flow->process_packet;
    Completion *completion = completion_new(flow, kind, packet);
    PyObject *began = PyFloat_FromDouble(flow->began);
    if (completion == NULL || began == NULL || PyDict_SetItem(flow->outstanding, (PyObject *)completion, began) < 0) {
        drop(completion);
        drop(began);
        return -1;
    }
    drop(began);
    flow->held_bytes += completion->size;
    flow->received++;
    ref(process);
    PyObject *before = flow->delivering;
    flow->delivering = ref((PyObject *)completion);
    PyObject *result = PyObject_CallFunctionObjArgs(process, flow->channel, (PyObject *)completion, payload, NULL);
    drop(process);
    CLEAR(flow->delivering);
    drop(before);
    int outcome = result != NULL;
    if (result == NULL)
        outcome = owner_failed(flow, "process_packet", transaction) < 0 ? -1 : 0;
    else if (completion->deferred &&
             call(flow->channel, names.incoming, "put_off", (PyObject *)completion, payload) < 0)
        outcome = -1;
    drop(result);
    drop(completion);
    return outcome;
}

static PyObject *hand_over(PyObject *self, PyObject *number)
{
    Flow *flow = (Flow *)self;
    Py_ssize_t most = PyLong_AsSsize_t(number), first = flow->at;
    if ((most == -1 && PyErr_Occurred()) || names_ready() < 0)
        return NULL;
    PyObject *packets = ref(flow->packets);
    ref(self);
    Py_ssize_t at = first, stop = PyList_Size(packets);
    if (most < stop - at)
        stop = at + most;
    int outcome = 1;
    while (at < stop && outcome > 0) {
        PyObject *packet = PyList_GetItem(packets, at);
        int kind = (int)PyLong_AsLong(PyTuple_GetItem(packet, 0));
        bool is_completion = kind == COMPLETION;
        if (!is_completion) {
            if (PyDict_Size(flow->outstanding) + flow->waiting >= flow->most || flow->held_bytes >= flow->most_bytes) {
                flow->blocked = flow->attention = 1;
                break;
            }
            if (kind == TRANSFER_PAGES && !flow->lends) {
                outcome = fail(flow, "packet %S is over transfer pages, and none were lent", PyTuple_GetItem(packet, 2));
                break;
            }
            if (flow->process_packet == NULL || flow->process_packet == Py_None) {
                outcome = call(flow->channel, NULL, "nobody_takes_packets", NULL, NULL);
                break;
            }
        } else {
            int known = PyDict_Contains(flow->sent, PyTuple_GetItem(packet, 2));
            if (known <= 0) {
                outcome = known < 0 ? -1 : completed(flow, PyTuple_GetItem(packet, 2), NULL);
                break;
            }
        }
        ref(packet);
        flow->at = ++at;
        flow->taken = PyLong_AsSsize_t(PyTuple_GetItem(packet, 5));
        outcome = is_completion ? completed(flow, PyTuple_GetItem(packet, 2), PyTuple_GetItem(packet, 4)) : hand(flow, kind, packet);
        drop(packet);
        if (!flow->active)
            break;
    }
    drop(packets);
    drop(self);
    return outcome < 0 ? NULL : PyLong_FromSsize_t(at - first);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static int set_number(PyObject *packet, PyObject *name, PyObject *number)
{
    int outcome = number == NULL ? -1 : PyObject_SetAttr(packet, name, number);
    drop(number);
    return outcome;
}

/* send(packet, payload, wait) */
static PyObject *send(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Flow *flow = (Flow *)self;
    if (count != 3 || names_ready() < 0) {
        if (count != 3)
            PyErr_SetString(PyExc_TypeError, "send() takes packet, payload and wait");
        return NULL;
    }
    PyObject *packet = args[0], *payload = args[1];
    int wait = PyObject_IsTrue(args[2]);
    Writer *writer = flow_writer(flow);
    if (wait < 0)
        return NULL;
    if (!flow->active || !flow->direct || writer == NULL || !PyBytes_Check(payload) || PyBytes_Size(payload) > flow->largest)
        return PyBool_FromLong(0);
    Descriptor descriptor = {.kind = INBAND, .offset8 = 2, .flags = wait ? FLAG_COMPLETION_REQUESTED : 0};
    descriptor.transaction = (uint64_t)flow->next_transaction;
    PyObject *transaction = PyLong_FromLongLong(flow->next_transaction);
    if (transaction == NULL)
        return NULL;
    int placed = writer_put(writer, &descriptor, (const uint8_t *)PyBytes_AsString(payload), PyBytes_Size(payload));
    if (placed <= 0) {
        drop(transaction);
        if (placed < 0) {
            if (!PyErr_ExceptionMatches(core.peer_error))
                return NULL;
            PyErr_Clear(); /* the long way meets it again, and says so */
        }
        return PyBool_FromLong(0);
    }
    flow->next_transaction++;
    flow->sends++;
    int outcome = PyObject_SetAttr(packet, names.transaction, transaction);
    if (outcome == 0)
        outcome = PyObject_SetAttr(packet, names.kind, names.inband);
    if (outcome == 0)
        outcome = PyObject_SetAttr(packet, names.offset8, names.two);
    if (outcome == 0)
        outcome = PyObject_SetAttr(packet, names.flags, wait ? names.one : names.zero);
    if (outcome == 0)
        outcome = set_number(packet, names.since, PyFloat_FromDouble(flow->began != 0.0 ? flow->began : now()));
    if (outcome == 0 && wait) {
        outcome = PyObject_SetAttr(packet, names.state, names.sent);
        if (outcome == 0)
            outcome = PyDict_SetItem(flow->sent, transaction, packet);
        if (outcome == 0 && flow->cork == 0)
            outcome = call(flow->channel, names.outgoing, "publish", NULL, NULL);
    } else if (outcome == 0) {
        outcome = call(flow->channel, names.outgoing, "in_ring_for_good", packet, NULL);
    }
    drop(transaction);
    return outcome < 0 ? NULL : PyBool_FromLong(1);
}

/* ---- for Python -------------------------------------------------------------------------------------------------- */

static int clear(PyObject *self)
{
    Flow *flow = (Flow *)self;
    CLEAR(flow->channel);
    CLEAR(flow->packets);
    CLEAR(flow->outstanding);
    CLEAR(flow->sent);
    CLEAR(flow->process_packet);
    CLEAR(flow->delivering);
    CLEAR(flow->writer);
    return 0;
}

static int traverse(PyObject *self, visitproc visit, void *arg)
{
    Flow *flow = (Flow *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(flow->channel);
    Py_VISIT(flow->packets);
    Py_VISIT(flow->outstanding);
    Py_VISIT(flow->sent);
    Py_VISIT(flow->process_packet);
    Py_VISIT(flow->delivering);
    Py_VISIT(flow->writer);
    return 0;
}

static void dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    clear(self);
    ring_free(self);
}

static PyObject *new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"channel", NULL};
    PyObject *channel;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:Flow", keywords, &channel))
        return NULL;
    Flow *flow = (Flow *)PyType_GenericAlloc(type, 0);
    if (flow == NULL)
        return NULL;
    flow->channel = ref(channel);
    flow->packets = PyList_New(0);
    flow->outstanding = PyDict_New();
    flow->sent = PyDict_New();
    flow->most = flow->most_bytes = (Py_ssize_t)1 << 62;
    flow->next_transaction = 1;
    flow->thread = PyThread_get_thread_ident();
    if (flow->packets == NULL || flow->outstanding == NULL || flow->sent == NULL)
        CLEAR(flow);
    return (PyObject *)flow;
}

static PyObject *requests(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromSsize_t(PyDict_Size(((Flow *)self)->outstanding) + ((Flow *)self)->waiting);
}

extern PyObject *flow_complete(PyObject *flow, PyObject *const *args, Py_ssize_t count);

static PyMethodDef methods[] = {
    {"hand_over", hand_over, METH_O, NULL},
    {"complete", (PyCFunction)(void (*)(void))flow_complete, METH_FASTCALL, NULL},
    {"send", (PyCFunction)(void (*)(void))send, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"requests", requests, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

#define MEMBER(name, type, flags) {#name, type, offsetof(Flow, name), flags, NULL}

static PyMemberDef members[] = {
    MEMBER(channel, T_OBJECT, READONLY),
    MEMBER(packets, T_OBJECT, 0),
    MEMBER(outstanding, T_OBJECT, READONLY),
    MEMBER(sent, T_OBJECT, READONLY),
    MEMBER(process_packet, T_OBJECT, 0),
    MEMBER(delivering, T_OBJECT, 0),
    MEMBER(writer, T_OBJECT, 0),
    MEMBER(at, T_PYSSIZET, 0),
    MEMBER(taken, T_PYSSIZET, 0),
    MEMBER(waiting, T_PYSSIZET, 0),
    MEMBER(held_bytes, T_PYSSIZET, 0),
    MEMBER(most, T_PYSSIZET, 0),
    MEMBER(most_bytes, T_PYSSIZET, 0),
    MEMBER(cork, T_PYSSIZET, 0),
    MEMBER(largest, T_PYSSIZET, 0),
    MEMBER(largest_reply, T_PYSSIZET, 0),
    MEMBER(context_size, T_PYSSIZET, 0),
    MEMBER(next_transaction, T_LONGLONG, 0),
    MEMBER(sends, T_ULONGLONG, 0),
    MEMBER(received, T_ULONGLONG, 0),
    MEMBER(answered, T_ULONGLONG, 0),
    MEMBER(completed, T_ULONGLONG, 0),
    MEMBER(thread, T_ULONG, 0),
    MEMBER(began, T_DOUBLE, 0),
    MEMBER(active, T_BOOL, 0),
    MEMBER(attention, T_BOOL, 0),
    MEMBER(blocked, T_BOOL, 0),
    MEMBER(direct, T_BOOL, 0),
    MEMBER(finishing, T_BOOL, 0),
    MEMBER(pending, T_BOOL, 0),
    MEMBER(lends, T_BOOL, 0),
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "See vmbus.kmcl.flow_pure.Flow."},
    {Py_tp_new, new},
    {Py_tp_dealloc, dealloc},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {Py_tp_members, members},
    {0, NULL},
};

PyType_Spec flow_spec = {
    .name = "vmbus.native._core.Flow",
    .basicsize = sizeof(Flow),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};
