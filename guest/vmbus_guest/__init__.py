"""The guest's side: a userspace PCI driver, the bus client, test drivers and the agent. Standard library only."""
