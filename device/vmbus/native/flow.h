/* What flow.c and completion.c share: the native twins of the classes in vmbus.kmcl.flow_pure, where every member is
   described. */

#ifndef VMBUS_FLOW_H
#define VMBUS_FLOW_H

#include "core.h"

typedef struct {
    PyObject_HEAD
    PyObject *channel, *packets, *outstanding, *sent, *process_packet, *delivering, *writer;
    Py_ssize_t at, taken, waiting, held_bytes, most, most_bytes, cork, largest, largest_reply, context_size;
    long long next_transaction;
    unsigned long long sends, received, answered, completed;
    unsigned long thread;
    double began;
    char active, attention, blocked, direct, finishing, pending, lends; /* truth values */
} Flow;

typedef struct {
    PyObject_HEAD
    Flow *flow;
    PyObject *channel, *transaction, *context, *body, *payload, *grant;
    Py_ssize_t size;
    int kind;
    char wanted, deferred, done;
} Completion;

/* What is Python's and wanted for each packet; fetched once, since those modules import this one. */
typedef struct {
    PyTypeObject *completion; /* vmbus.kmcl.completion.Completion */
    PyObject *idle, *sent;    /* members of PacketState */
    PyObject *success;        /* Status.SUCCESS */
    PyObject *inband, *two, *zero, *one, *nothing;
    /* names */
    PyObject *state, *routine, *transaction, *kind, *offset8, *flags, *since, *outgoing, *incoming;
} Names;

extern Names names;
int names_ready(void);

/* Of a packet as `split_packets` makes it. */
Completion *completion_new(Flow *flow, int kind, PyObject *packet);

/* The ring that completions may go into at once; NULL, without an exception: there is none, or it is not a native one. */
Writer *flow_writer(const Flow *flow);

/* An exception that was raised becomes an argument: `target.method(*before, error, *after)`; -1 with an exception when
   that raises. `before` and `after` may be NULL. What is no Exception (KeyboardInterrupt) stays raised. */
int tell_error(PyObject *target, const char *method, const char *before, PyObject *after);

/* Call a method of `target`'s attribute with up to two arguments, for what it does. */
int call(PyObject *target, PyObject *attribute, const char *method, PyObject *first, PyObject *second);

extern PyType_Spec flow_spec, completion_spec;

#endif
