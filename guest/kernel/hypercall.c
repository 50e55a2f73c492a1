// SPDX-License-Identifier: GPL-2.0-only
/* The two hypercalls that VMBus is made of: post a message, signal an event. */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/hyperv.h>
#include <linux/io.h>
#include <linux/linkage.h>
#include <linux/printk.h>
#include <asm/linkage.h>
#include <asm/mshyperv.h>

#include "vmbus_pci.h"

#define CALL_CODE GENMASK_ULL(15, 0)
/* In the input of a post; the function's post block has the same layout. */
#define POST_SIZE 12
#define POST_PAYLOAD 16

/* What a hypervisor does by itself: it sends a channel's events to the processor that the guest names. */
static void learn_target(const void *message)
{
	const struct vmbus_channel_message_header *header = message;
	const struct vmbus_channel_modifychannel *modify = message;
	const struct vmbus_channel_open_channel *open = message;

	if (header->msgtype == CHANNELMSG_OPENCHANNEL)
		synic_channel_target(open->child_relid, open->target_vp);
	else if (header->msgtype == CHANNELMSG_MODIFYCHANNEL)
		synic_channel_target(modify->child_relid, modify->target_vp);
}

static u64 post(u64 block)
{
	const u8 *input = phys_to_virt(block);
	u64 status;

	learn_target(input + POST_PAYLOAD);
	if (rejoin_says(input + POST_PAYLOAD, *(const u32 *)(input + POST_SIZE)))
		return HV_STATUS_SUCCESS;
	status = device_post(block);
	if (status == HV_STATUS_INVALID_PARAMETER)
		rejoin_suspect();
	return status;
}

/* Called by the code below only, which is in no header. */
u64 vmbus_pci_do_hypercall(u64 control, u64 input, u64 output);

__visible u64 vmbus_pci_do_hypercall(u64 control, u64 input, u64 output)
{
	switch (control & CALL_CODE) {
	case HVCALL_POST_MESSAGE:
		return post(input);
	case HVCALL_SIGNAL_EVENT:
		if (!(control & HV_HYPERCALL_FAST_BIT))
			input = *(const u64 *)phys_to_virt(input);
		count_up(signals);
		device_signal(lower_32_bits(input));
		return HV_STATUS_SUCCESS;
	}
	count_up(bad_calls);
	pr_warn_ratelimited("no hypercall %#llx here\n", control);
	return HV_STATUS_INVALID_HYPERCALL_CODE;
}

/*
 * Linux calls this as the hypercall page: control, input and output in rcx, rdx and r8, the status in rax. It counts on
 * losing rcx, rdx and r8 to r11 only.
 */
asm(".pushsection .text\n"
    ".balign 16\n"
    ".globl vmbus_pci_hypercall\n"
    ".type vmbus_pci_hypercall, @function\n"
    "vmbus_pci_hypercall:\n\t"
    ASM_ENDBR
    "push %rbp\n\t"
    "mov %rsp, %rbp\n\t"
    "push %rdi\n\t"
    "push %rsi\n\t"
    "mov %rcx, %rdi\n\t"
    "mov %rdx, %rsi\n\t"
    "mov %r8, %rdx\n\t"
    "call vmbus_pci_do_hypercall\n\t"
    "pop %rsi\n\t"
    "pop %rdi\n\t"
    "pop %rbp\n\t"
    ASM_RET
    ".size vmbus_pci_hypercall, . - vmbus_pci_hypercall\n"
    ".popsection\n");
