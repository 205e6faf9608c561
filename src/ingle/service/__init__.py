"""A server as a service of systemd: its unit, what it may see of the disk, and how both are put in place."""
