// SPDX-License-Identifier: GPL-2.0-only
/*
 * Functions of the kernel that ask for, or speak to, a hypervisor: calls of them come here instead.
 *
 * Only exported ones, by ftrace's own means for live patching. The redirects are permanent: without that flag,
 * `sysctl kernel.ftrace_enabled=0` would silently take them away from under hv_vmbus.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/ftrace.h>
#include <linux/kernel.h>
#include <asm/mshyperv.h>

#include "vmbus_pci.h"

static bool is_initialized(void)
{
	return true;
}

static u64 get_register(unsigned int reg)
{
	u64 value = 0;

	if (!synic_get(reg, &value)) {
		count_up(bad_registers);
		pr_warn_ratelimited("no register %#x here\n", reg);
	}
	return value;
}

static void set_register(unsigned int reg, u64 value)
{
	if (!synic_set(reg, value)) {
		count_up(bad_registers);
		pr_warn_ratelimited("no register %#x here\n", reg);
	}
}

static void setup_handler(void (*handler)(void))
{
	synic_set_handler(handler);
}

static void remove_handler(void)
{
	synic_set_handler(NULL);
}

struct redirect {
	void *from;
	void *to;
	struct ftrace_ops ops;
};

static struct redirect redirects[] = {
	{ .from = hv_is_hyperv_initialized, .to = is_initialized },
	{ .from = hv_get_msr, .to = get_register },
	{ .from = hv_set_msr, .to = set_register },
	{ .from = hv_setup_vmbus_handler, .to = setup_handler },
	{ .from = hv_remove_vmbus_handler, .to = remove_handler },
};

static void notrace go_elsewhere(unsigned long ip, unsigned long parent_ip, struct ftrace_ops *ops,
				 struct ftrace_regs *regs)
{
	const struct redirect *redirect = container_of(ops, struct redirect, ops);

	ftrace_regs_set_instruction_pointer(regs, (unsigned long)redirect->to);
}

static void remove_first(int count)
{
	while (count--) {
		struct redirect *redirect = &redirects[count];

		unregister_ftrace_function(&redirect->ops);
		ftrace_set_filter_ip(&redirect->ops, (unsigned long)redirect->from, 1, 0);
	}
}

int redirect_all(void)
{
	int i, ret;

	for (i = 0; i < ARRAY_SIZE(redirects); i++) {
		struct redirect *redirect = &redirects[i];

		redirect->ops.func = go_elsewhere;
		redirect->ops.flags = FTRACE_OPS_FL_IPMODIFY | FTRACE_OPS_FL_DYNAMIC | FTRACE_OPS_FL_PERMANENT;
		ret = ftrace_set_filter_ip(&redirect->ops, (unsigned long)redirect->from, 0, 0);
		if (ret)
			break;
		ret = register_ftrace_function(&redirect->ops);
		if (ret) {
			ftrace_set_filter_ip(&redirect->ops, (unsigned long)redirect->from, 1, 0);
			break;
		}
	}
	if (i == ARRAY_SIZE(redirects))
		return 0;
	pr_err("%ps cannot be redirected (%d): is it traced or patched already?\n", redirects[i].from, ret);
	remove_first(i);
	return ret;
}

void redirect_none(void)
{
	remove_first(ARRAY_SIZE(redirects));
}
