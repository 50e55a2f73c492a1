// SPDX-License-Identifier: GPL-2.0-only
/*
 * When the function forgets everything behind Linux's back: because it was reset, because its pages were taken away, or
 * because it was unplugged and plugged in again.
 *
 * Linux waits without a limit for what its host has forgotten. So we say in the host's place that all channels are
 * gone; when Linux's drivers have let go of them, we agree on the version of before once more and ask for offers, and
 * Linux's drivers find their devices as for the first time.
 *
 * Not all drivers let go: hv_storvsc waits for ever for the end of a request that it can send to nobody. After a while
 * the others come back without it. What it says of its channel later is for us, and an offer with that number is kept
 * from Linux (check.c).
 *
 *	OFF	Linux has no connection
 *	CALLED	Linux has asked for one, and the host has not answered yet
 *	JOINED	Linux speaks with the host, and we only listen
 *	LOST	the host knows of nothing: Linux hears that its channels are gone, and what it says is for us
 *	ASKING	the host was asked for the version of before; its answer is for us
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/bitmap.h>
#include <linux/hyperv.h>
#include <linux/jiffies.h>
#include <linux/kernel.h>
#include <linux/moduleparam.h>
#include <linux/workqueue.h>
#include <asm/mshyperv.h>

#include "vmbus_pci.h"

#define LOOK_EVERY (5 * HZ)	/* one read of a register: it goes all the way to the host */
#define LOOK_SOON (HZ / 20)
#define PATIENCE (10 * HZ)	/* until it goes on without a driver that does not let go of its channel, or an answer */

static bool mend = true;
module_param(mend, bool, 0644);
MODULE_PARM_DESC(mend, "Whether Linux's drivers get their channels anew when the function was reset (default: yes)");

enum state { OFF, CALLED, JOINED, LOST, ASKING };

static enum state state;
static unsigned long since;
static DECLARE_BITMAP(known, VMBUS_PCI_FLAGS);	/* channels that Linux has heard of and not released */
static DECLARE_BITMAP(gone, VMBUS_PCI_FLAGS);	/* those of them that it has still to be told are gone */
static DECLARE_BITMAP(disks, VMBUS_PCI_FLAGS);	/* those of hv_storvsc: the last to be told */
static DECLARE_BITMAP(held, VMBUS_PCI_FLAGS);	/* those that a driver has not let go of in time */
static bool unloading;				/* an UNLOAD that nobody but us will answer */
static bool refusing;				/* an INITIATE_CONTACT of that kind */
static u8 contact[VMBUS_PCI_MESSAGE_MAX];	/* Linux's last INITIATE_CONTACT */
static u32 contact_size;

static void look(struct work_struct *unused);
static DECLARE_DELAYED_WORK(looking, look);

/* Linux may end or begin a connection at any time (rejoin_begin): then nothing else happens to it any more. */
static bool move(enum state from, enum state to)
{
	if (cmpxchg(&state, from, to) != from)
		return false;
	WRITE_ONCE(since, jiffies);
	return true;
}

static void look_in(unsigned long delay)
{
	mod_delayed_work(system_wq, &looking, delay);
}

static void lose(void)
{
	/* What Linux has still to be told comes before the state in which it is told. */
	bitmap_copy(gone, known, VMBUS_PCI_FLAGS);
	smp_wmb();
	if (!move(JOINED, LOST))
		return;
	count_up(faults);
	pr_warn("the function was reset, or is gone: Linux's drivers lose %u channels, and get them anew with it\n",
		bitmap_weight(known, VMBUS_PCI_FLAGS));
	synic_look();
}

static void ask_again(void)
{
	unsigned int count = bitmap_weight(known, VMBUS_PCI_FLAGS);

	if (count)
		pr_err("Linux's drivers hold on to %u lost channels: the others go on without them\n", count);
	bitmap_copy(held, known, VMBUS_PCI_FLAGS);
	/* The state first: the answer may be there before the post is over. */
	if (!move(LOST, ASKING))
		return;
	if (!device_enable() || device_say(contact, contact_size) != HV_STATUS_SUCCESS)
		move(ASKING, LOST);
}

static void look(struct work_struct *unused)
{
	unsigned long delay = LOOK_SOON;

	switch (READ_ONCE(state)) {
	case OFF:
		return;
	case CALLED:
		if (!device_enabled() && move(CALLED, OFF)) {
			WRITE_ONCE(refusing, true);
			synic_look();
			return;
		}
		delay = LOOK_EVERY;
		break;
	case JOINED:
		if (!READ_ONCE(mend) || device_enabled())
			delay = LOOK_EVERY;
		else
			lose();
		break;
	case LOST:
		if (!device_present())
			delay = LOOK_EVERY;
		else if (bitmap_empty(known, VMBUS_PCI_FLAGS) || time_after(jiffies, since + PATIENCE))
			ask_again();
		break;
	case ASKING:
		if (!device_enabled() || time_after(jiffies, since + PATIENCE))
			move(ASKING, LOST);
		break;
	}
	look_in(delay);
}

/* Linux switches its controller on or off: a connection begins, or is over. */
void rejoin_begin(void)
{
	bitmap_zero(known, VMBUS_PCI_FLAGS);
	bitmap_zero(gone, VMBUS_PCI_FLAGS);
	bitmap_zero(held, VMBUS_PCI_FLAGS);
	WRITE_ONCE(unloading, false);
	WRITE_ONCE(refusing, false);
	WRITE_ONCE(state, OFF);
}

/* The function does not do what it should: see why, soon. */
void rejoin_suspect(void)
{
	if (READ_ONCE(state) != OFF)
		look_in(0);
}

/* Whether Linux has heard of the channel, and not released it. */
bool rejoin_knows(u32 relid)
{
	return test_bit(relid, known);
}

/* The host's message, which was checked, before Linux gets it; returns whether it is not for Linux. */
bool rejoin_hears(const void *message)
{
	const struct vmbus_channel_message_header *header = message;
	const struct vmbus_channel_offer_channel *offer = message;
	const struct vmbus_channel_version_response *response = message;
	static const struct hv_vmbus_device_id scsi = { HV_SCSI_GUID };
	static const struct vmbus_channel_message_header request = { .msgtype = CHANNELMSG_REQUESTOFFERS };
	bool agreed;

	if (header->msgtype == CHANNELMSG_OFFERCHANNEL) {
		set_bit(offer->child_relid, known);
		assign_bit(offer->child_relid, disks, guid_equal(&offer->offer.if_type, &scsi.guid));
		device_expect(offer->child_relid);
		return false;
	}
	if (header->msgtype != CHANNELMSG_VERSION_RESPONSE)
		return false;
	agreed = response->version_supported;
	switch (READ_ONCE(state)) {
	case CALLED:
		move(CALLED, agreed ? JOINED : OFF);
		return false;
	case ASKING:
		agreed = agreed && device_say(&request, sizeof(request)) == HV_STATUS_SUCCESS;
		move(ASKING, agreed ? JOINED : LOST);
		return true;
	default:
		return false;
	}
}

/* Whether Linux speaks of a channel that the host knows nothing of, or knows as another one. */
static bool is_about_held(const void *message)
{
	const struct vmbus_channel_message_header *header = message;
	const struct vmbus_channel_relid_released *about = message; /* the number is in the same place in all of these */

	switch (header->msgtype) {
	case CHANNELMSG_OPENCHANNEL:
	case CHANNELMSG_CLOSECHANNEL:
	case CHANNELMSG_GPADL_HEADER:
	case CHANNELMSG_GPADL_TEARDOWN:
	case CHANNELMSG_RELID_RELEASED:
	case CHANNELMSG_MODIFYCHANNEL:
		return about->child_relid < VMBUS_PCI_FLAGS && test_bit(about->child_relid, held);
	default:
		return false;
	}
}

/* Linux's message, before the host gets it; returns whether it is not for the host. */
bool rejoin_says(const void *message, u32 size)
{
	const struct vmbus_channel_message_header *header = message;
	const struct vmbus_channel_relid_released *released = message;
	bool ours = READ_ONCE(state) == LOST || READ_ONCE(state) == ASKING || is_about_held(message);

	switch (header->msgtype) {
	case CHANNELMSG_INITIATE_CONTACT:
		contact_size = min_t(u32, size, sizeof(contact));
		memcpy(contact, message, contact_size);
		if (move(OFF, CALLED) || move(JOINED, CALLED)) {
			bitmap_zero(known, VMBUS_PCI_FLAGS); /* the host forgets them */
			bitmap_zero(held, VMBUS_PCI_FLAGS);
			look_in(LOOK_EVERY);
		}
		return false;
	case CHANNELMSG_RELID_RELEASED:
		if (released->child_relid < VMBUS_PCI_FLAGS) {
			clear_bit(released->child_relid, known);
			clear_bit(released->child_relid, held);
		}
		break;
	case CHANNELMSG_UNLOAD:
		if (READ_ONCE(state) == LOST) {
			WRITE_ONCE(unloading, true);
			synic_look();
		}
		break;
	default:
		break;
	}
	return ours;
}

/* Something that Linux has to be told in the host's place, put into @message; returns its size, or 0. */
u32 rejoin_tells(void *message)
{
	struct vmbus_channel_rescind_offer *rescind = message;
	struct vmbus_channel_message_header *header = message;
	unsigned long relid;

	if (READ_ONCE(refusing)) {
		WRITE_ONCE(refusing, false);
		header->msgtype = CHANNELMSG_VERSION_RESPONSE; /* and nothing else: it is not supported */
		return sizeof(struct vmbus_channel_version_response);
	}
	if (READ_ONCE(state) != LOST)
		return 0;
	smp_rmb();
	if (READ_ONCE(unloading)) {
		WRITE_ONCE(unloading, false);
		header->msgtype = CHANNELMSG_UNLOAD_RESPONSE;
		return sizeof(*header);
	}
	/*
	 * The highest first: sub-channels are offered after the channel that they belong to. Linux lets go of one after
	 * the other, so those that may hold it up are told last.
	 */
	for (relid = VMBUS_PCI_FLAGS - 1; relid; relid--)
		if (test_bit(relid, gone) && !test_bit(relid, disks))
			break;
	if (!relid)
		relid = find_last_bit(gone, VMBUS_PCI_FLAGS);
	if (relid >= VMBUS_PCI_FLAGS)
		return 0;
	clear_bit(relid, gone);
	rescind->header.msgtype = CHANNELMSG_RESCIND_CHANNELOFFER;
	rescind->child_relid = relid;
	return sizeof(*rescind);
}
