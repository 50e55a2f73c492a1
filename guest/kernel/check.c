// SPDX-License-Identifier: GPL-2.0-only
/*
 * Which of the host's messages Linux gets to see. It trusts its host in some things: a number that it does not know and a
 * message that is too short are warnings (with panic_on_warn, the end), and a channel that is offered twice takes the
 * place of the first one, which is in use.
 */
#include <linux/hyperv.h>
#include <linux/kernel.h>

#include "vmbus_pci.h"

#define SHORTEST sizeof(struct vmbus_channel_message_header)

static const u8 shortest[CHANNELMSG_COUNT] = {
	[CHANNELMSG_OFFERCHANNEL] = sizeof(struct vmbus_channel_offer_channel),
	[CHANNELMSG_RESCIND_CHANNELOFFER] = sizeof(struct vmbus_channel_rescind_offer),
	[CHANNELMSG_ALLOFFERS_DELIVERED] = SHORTEST,
	[CHANNELMSG_OPENCHANNEL_RESULT] = sizeof(struct vmbus_channel_open_result),
	[CHANNELMSG_GPADL_CREATED] = sizeof(struct vmbus_channel_gpadl_created),
	[CHANNELMSG_GPADL_TORNDOWN] = sizeof(struct vmbus_channel_gpadl_torndown),
	[CHANNELMSG_VERSION_RESPONSE] = sizeof(struct vmbus_channel_version_response),
	[CHANNELMSG_UNLOAD_RESPONSE] = SHORTEST,
	[CHANNELMSG_TL_CONNECT_RESULT] = SHORTEST,
	[CHANNELMSG_MODIFYCHANNEL_RESPONSE] = sizeof(struct vmbus_channel_modifychannel_response),
};

/* Whether a host says such a thing; @message is our copy. */
bool check_message(const void *message, u32 size)
{
	const struct vmbus_channel_message_header *header = message;
	const struct vmbus_channel_offer_channel *offer = message;
	const struct vmbus_channel_rescind_offer *rescind = message;

	if (header->msgtype >= CHANNELMSG_COUNT || !shortest[header->msgtype] || size < shortest[header->msgtype])
		return false;
	switch (header->msgtype) {
	case CHANNELMSG_OFFERCHANNEL:
		return offer->child_relid && offer->child_relid < VMBUS_PCI_FLAGS && !rejoin_knows(offer->child_relid);
	case CHANNELMSG_RESCIND_CHANNELOFFER:
		return rescind->child_relid < VMBUS_PCI_FLAGS && rejoin_knows(rescind->child_relid);
	default:
		return true;
	}
}
