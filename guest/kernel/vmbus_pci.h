/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The VMBus PCI function as the platform that Linux's own hv_vmbus expects.
 *
 * main.c       the PCI driver: probe, removal, counters in sysfs
 * device.c     the function's registers: enable, reset, post, signal, and the two pages that it writes
 * synic.c      each processor's synthetic interrupt controller, and how messages and events get there
 * check.c      which of the host's messages Linux gets to see
 * rejoin.c     what happens when the function was reset behind Linux's back
 * hypercall.c  what hv_hypercall_pg points to
 * redirect.c   functions of the kernel that are replaced
 * acpi.c       the ACPI device that hv_vmbus binds to
 */
#ifndef VMBUS_PCI_H
#define VMBUS_PCI_H

#include <linux/cpumask.h>
#include <linux/interrupt.h>
#include <linux/percpu.h>
#include <linux/types.h>

#define VMBUS_PCI_FLAGS 2048

/* The interrupt source of VMBus, and its message in a page of messages. */
#define VMBUS_PCI_SINT 2
#define VMBUS_PCI_SLOT 512
#define VMBUS_PCI_MESSAGE_MIN 8
#define VMBUS_PCI_MESSAGE_MAX 240

#define VMBUS_PCI_COUNTERS(X)	\
	X(interrupts)		\
	X(messages)		\
	X(bad_messages)		\
	X(eoms)			\
	X(events)		\
	X(lost_events)		\
	X(wakes)		\
	X(moves)		\
	X(posts)		\
	X(refused_posts)	\
	X(signals)		\
	X(bad_calls)		\
	X(bad_registers)	\
	X(faults)

struct vmbus_pci_counters {
#define X(name) u64 name;
	VMBUS_PCI_COUNTERS(X)
#undef X
};

DECLARE_PER_CPU(struct vmbus_pci_counters, vmbus_pci_counters);
#define count_up(name) this_cpu_inc(vmbus_pci_counters.name)

struct hv_message;
struct pci_dev;

/* main.c */
void vmbus_pci_move_interrupt(unsigned int cpu);

/* device.c */
int device_open(struct pci_dev *pdev);
void device_close(struct pci_dev *pdev);
bool device_present(void);
bool device_enable(void);
bool device_enabled(void);
void device_disable(void);
void device_eom(void);
void device_signal(u32 connection);
u64 device_post(phys_addr_t block);
u64 device_say(const void *message, u32 size);
bool device_take_message(struct hv_message *to);
void device_expect(u32 relid);
void device_take_events(void (*deliver)(u32 relid, void *context), void *context);
void device_write_messages_to(phys_addr_t page);

/* synic.c */
extern bool vmbus_pci_panicking;
int synic_prepare(void);
void synic_forget(void);
bool synic_get(unsigned int reg, u64 *value);
bool synic_set(unsigned int reg, u64 value);
void synic_set_handler(void (*handler)(void));
void synic_channel_target(u32 relid, u32 vp);
void synic_look(void);
void synic_fill(struct hv_message *to, const void *message, u32 size);
irqreturn_t synic_interrupt(int irq, void *data);

/* check.c */
bool check_message(const void *message, u32 size);

/* rejoin.c */
bool rejoin_knows(u32 relid);
void rejoin_begin(void);
void rejoin_suspect(void);
bool rejoin_hears(const void *message);
bool rejoin_says(const void *message, u32 size);
u32 rejoin_tells(void *message);

/* hypercall.c */
void vmbus_pci_hypercall(void);

/* redirect.c */
int redirect_all(void);
void redirect_none(void);

/* acpi.c */
int acpi_announce(void);

#endif
