// SPDX-License-Identifier: GPL-2.0-only
/*
 * The PCI driver. One function serves Linux's own VMBus drivers; others are left to VFIO.
 *
 * Once Linux's drivers may have been told that there is a hypervisor, the module stays: hv_vmbus asks once.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/hyperv.h>
#include <linux/dma-mapping.h>
#include <linux/interrupt.h>
#include <linux/kconfig.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/version.h>
#include <linux/workqueue.h>
#include <asm/hypervisor.h>
#include <asm/mshyperv.h>

#include "vmbus_pci.h"

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 12, 0) || LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
#error "Written for Linux 6.12: others reach the hypervisor in ways that this module does not know."
#endif
#if !IS_MODULE(CONFIG_HYPERV)
#error "This kernel has hv_vmbus built in: it has given up before any module can help it."
#endif

#define VENDOR_ID 0x5642
#define DEVICE_ID 0x4d56

static char *function;
module_param(function, charp, 0444);
MODULE_PARM_DESC(function, "PCI address of the function to use, such as 0000:00:05.0 (default: the first one)");

static struct pci_dev *ours;
static bool is_platform; /* for good */

/* What mshyperv.c would have made on Hyper-V. Never freed: once there, Linux's drivers may use them at any time. */
static int make_platform_variables(void)
{
	u32 *indexes = kcalloc(nr_cpu_ids, sizeof(*indexes), GFP_KERNEL);
	void * __percpu *inputs = alloc_percpu(void *);
	int cpu;

	if (!indexes || !inputs)
		goto out_of_memory;
	for_each_possible_cpu(cpu) {
		*per_cpu_ptr(inputs, cpu) = (void *)get_zeroed_page(GFP_KERNEL);
		if (!*per_cpu_ptr(inputs, cpu))
			goto out_of_memory;
		indexes[cpu] = cpu;
	}
	hv_vp_index = indexes;
	hv_max_vp_index = nr_cpu_ids - 1;
	hyperv_pcpu_input_arg = inputs;
	hv_hypercall_pg = vmbus_pci_hypercall;
	return 0;

out_of_memory:
	if (inputs)
		for_each_possible_cpu(cpu)
			free_page((unsigned long)*per_cpu_ptr(inputs, cpu));
	free_percpu(inputs);
	kfree(indexes);
	return -ENOMEM;
}

static int become_the_platform(void)
{
	int ret;

	if (is_platform)
		return 0;
	ret = synic_prepare();
	if (ret)
		return ret;
	ret = make_platform_variables();
	if (ret)
		goto forget;
	ret = redirect_all();
	if (ret)
		goto forget;
	ret = acpi_announce();
	if (ret) {
		redirect_none();
		goto forget;
	}
	__module_get(THIS_MODULE);
	is_platform = true;
	return 0;

forget:
	hv_hypercall_pg = NULL;
	synic_forget();
	return ret;
}

/* The interrupt's processor is changed where one may sleep, and seldom: each time writes to the configuration space. */
#define MOVE_AT_MOST_EVERY HZ

static unsigned int interrupt_cpu;
static int interrupt_number;	/* 0: there is none */
static void move_interrupt(struct work_struct *unused);
static DECLARE_WORK(moving, move_interrupt);

static void move_interrupt(struct work_struct *unused)
{
	unsigned int cpu = READ_ONCE(interrupt_cpu);

	if (interrupt_number && !irq_set_affinity(interrupt_number, cpumask_of(cpu)))
		count_up(moves);
}

/* In an interrupt. */
void vmbus_pci_move_interrupt(unsigned int cpu)
{
	static unsigned long next = INITIAL_JIFFIES;

	if (time_before(jiffies, next))
		return;
	next = jiffies + MOVE_AT_MOST_EVERY;
	WRITE_ONCE(interrupt_cpu, cpu);
	schedule_work(&moving);
}

/* It is not moved any more when this returns. May sleep. */
static void forget_interrupt(void)
{
	interrupt_number = 0;
	cancel_work_sync(&moving);
}

static int vmbus_pci_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	int irq, ret;

	if (function && strcmp(function, pci_name(pdev)))
		return -ENODEV;
	if (ours) {
		pci_info(pdev, "%s serves Linux's VMBus drivers: this one is for others\n", pci_name(ours));
		return -ENODEV;
	}
	ret = pcim_enable_device(pdev);
	if (ret)
		return ret;
	pci_set_master(pdev);
	ret = dma_set_mask_and_coherent(&pdev->dev, DMA_BIT_MASK(64));
	if (ret)
		return ret;
	ret = device_open(pdev);
	if (ret)
		return ret;
	ret = pci_alloc_irq_vectors(pdev, 1, 1, PCI_IRQ_MSI);
	if (ret < 0)
		goto close;
	irq = pci_irq_vector(pdev, 0);
	ret = request_irq(irq, synic_interrupt, IRQF_NOBALANCING | IRQF_NO_THREAD, KBUILD_MODNAME, pdev);
	if (ret)
		goto free_vectors;
	irq_set_affinity(irq, cpumask_of(0));
	interrupt_number = irq;
	ret = become_the_platform();
	if (ret)
		goto free_interrupt;
	ours = pdev;
	rejoin_suspect();
	pci_info(pdev, "at the service of Linux's VMBus drivers\n");
	return 0;

free_interrupt:
	forget_interrupt();
	free_irq(irq, pdev);
free_vectors:
	pci_free_irq_vectors(pdev);
close:
	device_close(pdev);
	return ret;
}

static void vmbus_pci_remove(struct pci_dev *pdev)
{
	/* Linux's drivers are told that their channels are gone, and get them anew if the function comes back. */
	ours = NULL;
	device_close(pdev);
	forget_interrupt();
	free_irq(pci_irq_vector(pdev, 0), pdev);
	pci_free_irq_vectors(pdev);
	rejoin_suspect();
}

/* A kernel that is started by this one must not find its memory written to. Linux's own devices are shut down already. */
static void vmbus_pci_shutdown(struct pci_dev *pdev)
{
	rejoin_begin();
	device_disable();
}

#define X(name)									\
static ssize_t name##_show(struct device *dev, struct device_attribute *attr, char *buf)	\
{										\
	u64 sum = 0;								\
	int cpu;								\
										\
	for_each_possible_cpu(cpu)						\
		sum += READ_ONCE(per_cpu(vmbus_pci_counters, cpu).name);	\
	return sysfs_emit(buf, "%llu\n", sum);					\
}										\
static DEVICE_ATTR_RO(name);
VMBUS_PCI_COUNTERS(X)
#undef X

static struct attribute *vmbus_attrs[] = {
#define X(name) &dev_attr_##name.attr,
	VMBUS_PCI_COUNTERS(X)
#undef X
	NULL
};

static const struct attribute_group vmbus_group = { .name = "vmbus", .attrs = vmbus_attrs };
static const struct attribute_group *vmbus_groups[] = { &vmbus_group, NULL };

static const struct pci_device_id vmbus_pci_ids[] = { { PCI_DEVICE(VENDOR_ID, DEVICE_ID) }, {} };
MODULE_DEVICE_TABLE(pci, vmbus_pci_ids);

static struct pci_driver vmbus_pci_driver = {
	.name = KBUILD_MODNAME,
	.id_table = vmbus_pci_ids,
	.probe = vmbus_pci_probe,
	.remove = vmbus_pci_remove,
	.shutdown = vmbus_pci_shutdown,
	.dev_groups = vmbus_groups,
	.driver.suppress_bind_attrs = true,
};

static int __init vmbus_pci_init(void)
{
	if (x86_hyper_type == X86_HYPER_MS_HYPERV || hv_hypercall_pg) {
		pr_info("this machine has a hypervisor with a VMBus of its own: nothing to do\n");
		return -ENODEV;
	}
	return pci_register_driver(&vmbus_pci_driver);
}
module_init(vmbus_pci_init);

static void __exit vmbus_pci_exit(void)
{
	pci_unregister_driver(&vmbus_pci_driver);
}
module_exit(vmbus_pci_exit);

MODULE_DESCRIPTION("The VMBus PCI function as the platform of Linux's own VMBus drivers");
MODULE_LICENSE("GPL");
