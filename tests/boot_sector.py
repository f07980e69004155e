"""The first sector of disks whose guests are to run and do nothing. Without one no disk can be imported;
with one that jumps to itself a machine keeps a core busy as long as it runs."""

IDLE = b"\xf4\xeb\xfd".ljust(510, b"\0") + b"\x55\xaa"  # hlt; and again after each interrupt
