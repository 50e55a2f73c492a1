// SPDX-License-Identifier: GPL-2.0-only
/*
 * The ACPI device that hv_vmbus binds to, in a table of our own:
 *
 *	Scope (\_SB) {
 *		Device (VMBS) {
 *			Name (_HID, "VMBUS")
 *			Name (_UID, Zero)
 *			Name (_STA, 0x0F)
 *			Name (_CRS, ResourceTemplate () {})
 *		}
 *	}
 *
 * It is never unloaded: hv_vmbus looks for the device only once.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/acpi.h>
#include <linux/delay.h>
#include <linux/device.h>
#include <linux/module.h>

#include "vmbus_pci.h"

#define ID "VMBUS"
#define PATIENCE_MS 10000
#define LOOK_MS 5

/* tests/unit/test_kernel_module.py builds the same bytes from the description above. */
static u8 table[] __aligned(8) = {
	/* the header: signature, length, revision, checksum, OEM, table, its revision, compiler, its revision */
	'S', 'S', 'D', 'T', 0x56, 0x00, 0x00, 0x00, 0x02, 0x57, 'V', 'M', 'B', 'U', 'S', 'D',
	'V', 'M', 'B', 'U', 'S', 'P', 'C', 'I', 0x01, 0x00, 0x00, 0x00, 'V', 'M', 'B', 'S',
	0x01, 0x00, 0x00, 0x00,
	0x10, 0x31, '\\', '_', 'S', 'B', '_',		/* Scope (\_SB) */
	0x5b, 0x82, 0x29, 'V', 'M', 'B', 'S',		/* Device (VMBS) */
	0x08, '_', 'H', 'I', 'D', 0x0d, 'V', 'M', 'B', 'U', 'S', 0x00,
	0x08, '_', 'U', 'I', 'D', 0x00,
	0x08, '_', 'S', 'T', 'A', 0x0a, 0x0f,
	0x08, '_', 'C', 'R', 'S', 0x11, 0x05, 0x0a, 0x02, 0x79, 0x00,
};

/* Whether Linux has made a device of it that a driver can bind to: it does so some time after the table was loaded. */
static bool announced(void)
{
	struct acpi_device *found = acpi_dev_get_first_match_dev(ID, NULL, -1);
	bool ready = found && acpi_get_first_physical_node(found);

	acpi_dev_put(found);
	return ready;
}

int acpi_announce(void)
{
	acpi_status status;
	int waited;

	if (announced())
		return 0; /* the machine has one of its own */
	status = acpi_load_table((struct acpi_table_header *)table, NULL);
	if (ACPI_FAILURE(status)) {
		pr_err("the ACPI device " ID " cannot be made: %s\n", acpi_format_exception(status));
		return -ENODEV;
	}
	__module_get(THIS_MODULE); /* Linux keeps the table where it is */
	for (waited = 0; !announced(); waited += LOOK_MS) {
		if (waited >= PATIENCE_MS) {
			pr_err("no ACPI device " ID " within %d ms\n", PATIENCE_MS);
			return -ETIMEDOUT;
		}
		msleep(LOOK_MS);
	}
	return 0;
}
