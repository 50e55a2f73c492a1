// SPDX-License-Identifier: GPL-2.0-only
/*
 * Each processor's synthetic interrupt controller, as Linux sees it: registers, a message page and a page of event
 * flags in Linux's own memory. Messages go to processor 0, a channel's events to the processor that the guest has asked
 * for when it opened or modified the channel.
 *
 * With one processor present Linux patches its `lock` prefixes away, but the host is another one: what has to be a
 * fence against the host is virt_mb() or one of the sync_ operations.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/hyperv.h>
#include <linux/irq_work.h>
#include <linux/kernel.h>
#include <linux/ktime.h>
#include <linux/panic_notifier.h>
#include <linux/smp.h>
#include <asm/mshyperv.h>
#include <asm/sync_bitops.h>

#include "vmbus_pci.h"

#define MESSAGE_CPU 0
#define REGISTER_IS_ON 1
#define CHANNEL_MESSAGE 1
#define FLAGS_OFFSET (VMBUS_PCI_SINT * VMBUS_PCI_FLAGS / 8)

struct synic {
	u64 control;
	u64 message_page;
	u64 event_page;
	u64 sources[HV_SYNIC_SINT_COUNT];
	call_single_data_t call;
};

static DEFINE_PER_CPU(struct synic, synics);
DEFINE_PER_CPU(struct vmbus_pci_counters, vmbus_pci_counters);

/* Guards which pages there are, and what is put into them. */
static DEFINE_RAW_SPINLOCK(synic_lock);
static u16 targets[VMBUS_PCI_FLAGS];
static void (*handler)(void);
bool vmbus_pci_panicking;

static void *page_of(u64 value)
{
	return value & REGISTER_IS_ON ? phys_to_virt(value & PAGE_MASK) : NULL;
}

static struct synic *synic_of(int cpu)
{
	return per_cpu_ptr(&synics, cpu);
}

static void call_handler(void)
{
	void (*function)(void) = READ_ONCE(handler);

	if (function)
		function();
}

static void called(void *unused)
{
	call_handler();
}

static void worked(struct irq_work *unused)
{
	call_handler();
}

static struct irq_work again = IRQ_WORK_INIT_HARD(worked);

/* Puts a message into Linux's empty slot, as one behind which others wait: so Linux says when it has taken it. */
void synic_fill(struct hv_message *to, const void *message, u32 size)
{
	memset(to, 0, sizeof(*to));
	memcpy(to->u.payload, message, size);
	to->header.payload_size = size;
	to->header.message_flags.msg_pending = 1;
	smp_store_release(&to->header.message_type, CHANNEL_MESSAGE);
}

/* What Linux has to be told in the host's place. */
static bool take_ours(struct hv_message *to)
{
	u64 message[VMBUS_PCI_MESSAGE_MAX / sizeof(u64)] = {};
	u32 size = rejoin_tells(message);

	if (!size)
		return false;
	synic_fill(to, message, size);
	return true;
}

/* Whether there is a message for Linux in its slot now. */
static bool fill_message_slot(void)
{
	void *page = page_of(synic_of(MESSAGE_CPU)->message_page);
	struct hv_message *to;

	if (!page || READ_ONCE(vmbus_pci_panicking))
		return false;
	to = (struct hv_message *)page + VMBUS_PCI_SINT;
	return READ_ONCE(to->header.message_type) != HVMSG_NONE || take_ours(to) || device_take_message(to);
}

/* Linux has emptied its slot: the next one. */
static void take_next_message(void)
{
	unsigned long flags;
	bool any;

	if (READ_ONCE(vmbus_pci_panicking)) {
		device_eom();
		return;
	}
	raw_spin_lock_irqsave(&synic_lock, flags);
	any = fill_message_slot();
	if (any && smp_processor_id() != MESSAGE_CPU)
		smp_call_function_single_async(MESSAGE_CPU, &synic_of(MESSAGE_CPU)->call);
	else if (any)
		irq_work_queue(&again);
	raw_spin_unlock_irqrestore(&synic_lock, flags);
}

/* There may be a message for Linux. */
void synic_look(void)
{
	take_next_message();
}

/* An event of the channel for a processor that has pages; adds that to the set @context. */
static void deliver(u32 relid, void *context)
{
	int cpu = READ_ONCE(targets[relid]);
	void *page = cpu < nr_cpu_ids && cpu_online(cpu) ? page_of(synic_of(cpu)->event_page) : NULL;

	if (!page) {
		cpu = MESSAGE_CPU;
		page = page_of(synic_of(cpu)->event_page);
	}
	if (!page) {
		virt_mb();
		count_up(lost_events);
		return;
	}
	/* Always a locked operation: it is the fence between the host's flag and the look at the rings, too. */
	sync_set_bit(relid, page + FLAGS_OFFSET);
	cpumask_set_cpu(cpu, context);
	count_up(events);
}

/* The caller has the lock; returns whether this processor is one of them. */
static bool wake(const struct cpumask *cpus)
{
	int cpu, here = smp_processor_id();

	for_each_cpu(cpu, cpus) {
		if (cpu == here)
			continue;
		/* If such a call is on its way already, it has not looked at the flags yet. */
		smp_call_function_single_async(cpu, &synic_of(cpu)->call);
		count_up(wakes);
	}
	return cpumask_test_cpu(here, cpus);
}

/*
 * Where the interrupt goes: to the processor whose events it brings, if they are one processor's alone. Waking that one
 * from here costs about as much as all the rest of an interrupt does. With events for several there is no better place.
 */
#define MOVE_AFTER 64		/* interrupts in a row, all for one other processor, */
#define MOVE_WITHIN HZ		/* that come within so long; and no sooner after the last move */

static void note_target(const struct cpumask *cpus)
{
	static unsigned long since;
	static unsigned int count, before = NR_CPUS;
	unsigned int cpu = cpumask_first(cpus);

	if (cpu >= nr_cpu_ids)
		return;
	if (cpu == smp_processor_id() || cpu != before || cpumask_weight(cpus) != 1) {
		before = cpu;
		count = 0;
		return;
	}
	if (!count++)
		since = jiffies;
	if (count < MOVE_AFTER)
		return;
	if (time_before(jiffies, since + MOVE_WITHIN))
		vmbus_pci_move_interrupt(cpu);
	count = 0;
}

irqreturn_t synic_interrupt(int irq, void *data)
{
	static struct cpumask cpus; /* the lock's; too large for a stack */
	bool here;

	count_up(interrupts);
	raw_spin_lock(&synic_lock);
	cpumask_clear(&cpus);
	if (fill_message_slot())
		cpumask_set_cpu(MESSAGE_CPU, &cpus);
	device_take_events(deliver, &cpus);
	note_target(&cpus);
	here = wake(&cpus);
	raw_spin_unlock(&synic_lock);
	if (here)
		call_handler();
	return IRQ_HANDLED;
}

/* The events of a processor whose controller is switched off are for another one. */
static void move_events(struct synic *from)
{
	static struct cpumask cpus;
	unsigned long *bits = page_of(from->event_page) + FLAGS_OFFSET;
	u32 relid;

	from->event_page = 0;
	cpumask_clear(&cpus);
	for_each_set_bit(relid, bits, VMBUS_PCI_FLAGS)
		if (sync_test_and_clear_bit(relid, bits))
			deliver(relid, &cpus);
	if (wake(&cpus))
		irq_work_queue(&again);
}

static void set_event_page(struct synic *synic, u64 value)
{
	unsigned long flags;

	raw_spin_lock_irqsave(&synic_lock, flags);
	if (page_of(synic->event_page) && !(value & REGISTER_IS_ON))
		move_events(synic);
	synic->event_page = value;
	raw_spin_unlock_irqrestore(&synic_lock, flags);
}

static void set_message_page(struct synic *synic, u64 value)
{
	unsigned long flags;

	raw_spin_lock_irqsave(&synic_lock, flags);
	synic->message_page = value;
	raw_spin_unlock_irqrestore(&synic_lock, flags);
}

static void set_control(struct synic *synic, u64 value)
{
	bool changes = (synic->control ^ value) & REGISTER_IS_ON;

	synic->control = value;
	/* The others' are Linux's affair: the function has one place for messages. */
	if (!changes || synic != synic_of(MESSAGE_CPU))
		return;
	rejoin_begin();
	if (value & REGISTER_IS_ON)
		device_enable();
	else
		device_disable();
}

/*
 * What a read of the register gives on this processor; false if there is no such register. Where it matters which one
 * it is, Linux stays there.
 */
bool synic_get(unsigned int reg, u64 *value)
{
	const struct synic *synic = raw_cpu_ptr(&synics);

	switch (reg) {
	case HV_MSR_SCONTROL:
		*value = synic->control;
		return true;
	case HV_MSR_SIMP:
		*value = synic->message_page;
		return true;
	case HV_MSR_SIEFP:
		*value = synic->event_page;
		return true;
	case HV_MSR_SINT0 ... HV_MSR_SINT0 + HV_SYNIC_SINT_COUNT - 1:
		*value = synic->sources[reg - HV_MSR_SINT0];
		return true;
	case HV_MSR_VP_INDEX:
		*value = raw_smp_processor_id();
		return true;
	case HV_MSR_TIME_REF_COUNT:
		*value = div_u64(ktime_get_ns(), 100);
		return true;
	}
	return false;
}

bool synic_set(unsigned int reg, u64 value)
{
	struct synic *synic = raw_cpu_ptr(&synics);

	switch (reg) {
	case HV_MSR_SCONTROL:
		set_control(synic, value);
		return true;
	case HV_MSR_SIMP:
		set_message_page(synic, value);
		return true;
	case HV_MSR_SIEFP:
		set_event_page(synic, value);
		return true;
	case HV_MSR_EOM:
		take_next_message();
		return true;
	case HV_MSR_SINT0 ... HV_MSR_SINT0 + HV_SYNIC_SINT_COUNT - 1:
		synic->sources[reg - HV_MSR_SINT0] = value;
		return true;
	}
	return false;
}

/* Linux's interrupt handler, or NULL; when this returns, the one of before does not run any more. May sleep. */
void synic_set_handler(void (*function)(void))
{
	int cpu;

	WRITE_ONCE(handler, function);
	if (function)
		return;
	irq_work_sync(&again);
	/* Calls that are on their way, or interrupts that are being handled: they run with interrupts off. */
	for_each_online_cpu(cpu)
		smp_call_function_single(cpu, called, NULL, true);
}

/* The guest wants the channel's events on that processor. */
void synic_channel_target(u32 relid, u32 vp)
{
	if (relid < VMBUS_PCI_FLAGS && vp < nr_cpu_ids)
		WRITE_ONCE(targets[relid], vp);
}

/* Nobody copies messages in a panic, and Linux polls for the answer to its last one. */
static int panicked(struct notifier_block *block, unsigned long event, void *data)
{
	u64 page = synic_of(MESSAGE_CPU)->message_page;

	WRITE_ONCE(vmbus_pci_panicking, true);
	if (page & REGISTER_IS_ON)
		device_write_messages_to(page & PAGE_MASK);
	return NOTIFY_DONE;
}

static struct notifier_block panic_block = {
	.notifier_call = panicked,
	.priority = INT_MAX, /* before hv_vmbus, which is last and does not come back */
};

int synic_prepare(void)
{
	int cpu;

	for_each_possible_cpu(cpu)
		INIT_CSD(&synic_of(cpu)->call, called, NULL);
	return atomic_notifier_chain_register(&panic_notifier_list, &panic_block);
}

void synic_forget(void)
{
	atomic_notifier_chain_unregister(&panic_notifier_list, &panic_block);
}
