// SPDX-License-Identifier: GPL-2.0-only
/*
 * The registers of the function, and the two pages that it writes (docs/device-abi.md).
 *
 * Both pages belong to us and to nobody else in the kernel. What the host writes there is copied once, checked, and
 * only then handed on: Linux's own pages are never within the host's reach. (A message of the type that a timer has
 * would make vmbus_isr() jump to where no timer is, for instance.)
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/dma-mapping.h>
#include <linux/hyperv.h>
#include <linux/io.h>
#include <linux/gfp.h>
#include <linux/pci.h>
#include <linux/rcupdate.h>
#include <asm/mshyperv.h>

#include "vmbus_pci.h"

enum {
	REG_MAGIC = 0x000,
	REG_ABI_VERSION = 0x004,
	REG_EVENT_FLAGS = 0x00c,
	REG_CONTROL = 0x010,
	REG_STATUS = 0x014,
	REG_MESSAGE_PAGE = 0x020,
	REG_EVENT_PAGE = 0x028,
	REG_EOM = 0x030,
	REG_SIGNAL_EVENT = 0x034,
	REG_POST_ADDRESS = 0x040,
	REG_POST_MESSAGE = 0x048,
	REG_POST_STATUS = 0x04c,
};

#define MAGIC 0x53424d56
#define ABI_MAJOR 1
#define CONTROL_ENABLE BIT(0)
#define CONTROL_RESET BIT(1)
#define STATUS_ENABLED BIT(0)
#define GONE U32_MAX /* what a read gives where no function is any more */
#define PAGE_IS_VALID 1
#define FLAG_PENDING BIT(0)
#define TYPE_CHANNEL_MESSAGE 1
#define VMBUS_MESSAGE_CONNECTION 1

/* A host that fills the slot with rubbish as fast as it is emptied does not keep a processor. */
#define MOST_MESSAGES 16

/* As the function lays it out at VMBUS_PCI_SLOT in its message page. */
struct slot {
	u32 type;
	u8 size;
	u8 flags;
	u16 reserved;
	u64 sender;
	u8 payload[VMBUS_PCI_MESSAGE_MAX];
};

static void __iomem *bar;	/* NULL while the function is away */
static DEFINE_RAW_SPINLOCK(post_lock);
static u32 last_relid;	/* the highest that was offered: a look at all 2048 flags would be most of an interrupt */

/*
 * The message page, the event page, and our own post block. Never freed: Linux's drivers may look at any time, and the
 * function may be away meanwhile.
 */
static void *pages;
static phys_addr_t pages_address;

#define EVENTS PAGE_SIZE
#define BLOCK (2 * PAGE_SIZE)
#define PAGES_SIZE (3 * PAGE_SIZE)

struct block {
	u32 connection;
	u32 reserved;
	u32 type;
	u32 size;
	u8 payload[VMBUS_PCI_MESSAGE_MAX];
};

static struct slot *slot(void)
{
	return pages + VMBUS_PCI_SLOT;
}

static u8 *flags(void)
{
	return pages + EVENTS;
}

static void write64(u64 value, void __iomem *at)
{
	iowrite32(lower_32_bits(value), at);
	iowrite32(upper_32_bits(value), at + 4);
}

/* Read once: it may become NULL meanwhile, and stays mapped as long as the caller is in an RCU read-side section. */
static void __iomem *registers(void)
{
	return READ_ONCE(bar);
}

static int map_pages(struct pci_dev *pdev)
{
	dma_addr_t address;

	if (!pages)
		pages = alloc_pages_exact(PAGES_SIZE, GFP_KERNEL | __GFP_ZERO);
	if (!pages)
		return -ENOMEM;
	pages_address = virt_to_phys(pages);
	address = dma_map_single(&pdev->dev, pages, PAGES_SIZE, DMA_BIDIRECTIONAL);
	if (dma_mapping_error(&pdev->dev, address))
		return -ENOMEM;
	if (address == pages_address)
		return 0;
	/* Linux's VMBus drivers tell the host physical addresses, so nothing may translate the function's. */
	dma_unmap_single(&pdev->dev, address, PAGES_SIZE, DMA_BIDIRECTIONAL);
	pci_err(pdev, "an IOMMU translates this function's addresses: boot with iommu=pt, or without an IOMMU\n");
	return -ENODEV;
}

int device_open(struct pci_dev *pdev)
{
	void __iomem *mapped;
	u32 magic, version, count;
	int ret;

	mapped = pcim_iomap_region(pdev, 0, KBUILD_MODNAME);
	if (IS_ERR(mapped))
		return PTR_ERR(mapped);
	magic = ioread32(mapped + REG_MAGIC);
	version = ioread32(mapped + REG_ABI_VERSION);
	count = ioread32(mapped + REG_EVENT_FLAGS);
	if (magic != MAGIC || version >> 16 != ABI_MAJOR || count != VMBUS_PCI_FLAGS) {
		pci_err(pdev, "magic %#x, ABI %u.%u, %u event flags: not a function that this driver knows\n", magic,
			version >> 16, version & 0xffff, count);
		return -ENODEV;
	}
	ret = map_pages(pdev);
	if (ret)
		return ret;
	/* What another driver has left there ends now. */
	iowrite32(CONTROL_RESET, mapped + REG_CONTROL);
	WRITE_ONCE(bar, mapped);
	return 0;
}

/* The function goes: it is left as after power-on, and nobody touches it any more when this returns. May sleep. */
void device_close(struct pci_dev *pdev)
{
	void __iomem *mapped = bar;

	WRITE_ONCE(bar, NULL);
	synchronize_rcu();
	if (mapped)
		iowrite32(CONTROL_RESET, mapped + REG_CONTROL);
	dma_unmap_single(&pdev->dev, pages_address, PAGES_SIZE, DMA_BIDIRECTIONAL);
}

bool device_present(void)
{
	return READ_ONCE(bar);
}

/* Whether the function is there, and has our pages. A read of a register: it goes all the way to the host. */
bool device_enabled(void)
{
	void __iomem *regs;
	u32 status;

	guard(rcu)();

	regs = registers();
	if (!regs)
		return false;
	status = ioread32(regs + REG_STATUS);
	return status != GONE && (status & STATUS_ENABLED);
}

/* Begin anew: every channel and connection of before is gone. Returns whether it works. */
bool device_enable(void)
{
	void __iomem *regs;
	u32 status;

	guard(rcu)();

	regs = registers();
	if (!regs)
		return false;
	iowrite32(CONTROL_RESET, regs + REG_CONTROL);
	ioread32(regs + REG_STATUS); /* only now the write has arrived for certain */
	memset(pages, 0, BLOCK);
	write64(pages_address | PAGE_IS_VALID, regs + REG_MESSAGE_PAGE);
	write64((pages_address + EVENTS) | PAGE_IS_VALID, regs + REG_EVENT_PAGE);
	iowrite32(CONTROL_ENABLE, regs + REG_CONTROL);
	status = ioread32(regs + REG_STATUS);
	if (status != GONE && (status & STATUS_ENABLED))
		return true;
	pr_err("the function does not take its pages (status %#x)\n", status);
	return false;
}

static void write_register(u32 value, unsigned int offset)
{
	void __iomem *regs;

	guard(rcu)();

	regs = registers();
	if (regs)
		iowrite32(value, regs + offset);
}

void device_disable(void)
{
	write_register(CONTROL_RESET, REG_CONTROL);
}

void device_eom(void)
{
	write_register(1, REG_EOM);
}

void device_signal(u32 connection)
{
	write_register(connection, REG_SIGNAL_EVENT);
}

/* From now on messages go to that page and to nobody else's: for a kernel that panics, where nobody copies them. */
void device_write_messages_to(phys_addr_t page)
{
	void __iomem *regs = registers();

	if (!regs)
		return;
	iowrite32(0, regs + REG_CONTROL);
	write64(page | PAGE_IS_VALID, regs + REG_MESSAGE_PAGE);
	iowrite32(CONTROL_ENABLE, regs + REG_CONTROL);
}

/* Returns a hypervisor's status code: those of POST_STATUS are the same. */
u64 device_post(phys_addr_t block)
{
	/* In a panic whoever has the lock may never let go of it, and nobody else runs. */
	bool alone = READ_ONCE(vmbus_pci_panicking);
	unsigned long irq_flags;
	void __iomem *regs;
	u32 status;

	guard(rcu)();

	regs = registers();
	if (!regs)
		return HV_STATUS_INVALID_PARAMETER;
	local_irq_save(irq_flags);
	if (!alone)
		raw_spin_lock(&post_lock);
	write64(block, regs + REG_POST_ADDRESS);
	iowrite32(1, regs + REG_POST_MESSAGE);
	status = ioread32(regs + REG_POST_STATUS);
	if (!alone)
		raw_spin_unlock(&post_lock);
	local_irq_restore(irq_flags);
	count_up(posts);
	if (status != HV_STATUS_SUCCESS)
		count_up(refused_posts);
	return status == GONE ? HV_STATUS_INVALID_PARAMETER : status;
}

/* Posts a message of our own. */
u64 device_say(const void *message, u32 size)
{
	struct block *block = pages + BLOCK;

	/* One at a time: there is one connection, and each of these waits for the answer to the one before. */
	memset(block, 0, sizeof(*block));
	block->connection = VMBUS_MESSAGE_CONNECTION;
	block->type = TYPE_CHANNEL_MESSAGE;
	block->size = min_t(u32, size, sizeof(block->payload));
	memcpy(block->payload, message, block->size);
	return device_post(pages_address + BLOCK);
}

static void empty_slot(void)
{
	WRITE_ONCE(slot()->type, 0);
	virt_mb();
	if (READ_ONCE(slot()->flags) & FLAG_PENDING) {
		WRITE_ONCE(slot()->flags, 0);
		device_eom();
		count_up(eoms);
	}
}

/*
 * Moves one message from the host into @to, which is empty; returns whether there was one. The caller has the lock of
 * the synthetic interrupt controllers.
 */
bool device_take_message(struct hv_message *to)
{
	u64 message[VMBUS_PCI_MESSAGE_MAX / sizeof(u64)];
	int tries;

	for (tries = 0; pages && tries < MOST_MESSAGES; tries++) {
		u32 type = READ_ONCE(slot()->type);
		u8 size = READ_ONCE(slot()->size);
		bool good;

		if (!type)
			return false;
		virt_rmb();
		good = type == TYPE_CHANNEL_MESSAGE && size >= VMBUS_PCI_MESSAGE_MIN && size <= VMBUS_PCI_MESSAGE_MAX;
		/* Copied once, and only the copy is looked at: the host may write on. */
		memset(message, 0, sizeof(message));
		if (good)
			memcpy(message, slot()->payload, size);
		empty_slot();
		if (!good || !check_message(message, size)) {
			count_up(bad_messages);
			pr_warn_ratelimited("the host's message of type %u, %u bytes, number %u: left out\n", type, size,
					    lower_32_bits(message[0]));
			continue;
		}
		count_up(messages);
		if (rejoin_hears(message))
			continue;
		synic_fill(to, message, size);
		return true;
	}
	return false;
}

/* The host has offered a channel: it may have events. */
void device_expect(u32 relid)
{
	if (relid < VMBUS_PCI_FLAGS && relid > READ_ONCE(last_relid))
		WRITE_ONCE(last_relid, relid);
}

/*
 * Takes back the event flags that the host has set for channels that it has offered; others are not looked at. @deliver
 * has to begin with a full memory fence.
 */
void device_take_events(void (*deliver)(u32 relid, void *context), void *context)
{
	const u64 *words = (const u64 *)flags();
	u32 relid, i, last = READ_ONCE(last_relid);

	for (i = 0; i <= last / sizeof(u64); i++) {
		if (!READ_ONCE(words[i]))
			continue;
		for (relid = i * sizeof(u64); relid < (i + 1) * sizeof(u64) && relid <= last; relid++) {
			if (!READ_ONCE(flags()[relid]))
				continue;
			WRITE_ONCE(flags()[relid], 0);
			deliver(relid, context);
		}
	}
}
