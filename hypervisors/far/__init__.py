"""Another machine's libvirt host, over ssh: the drivers themselves run there.

A libvirt URI reaches another machine's libvirtd, but not its disks: those are made by zfs, lvm and
qemu-img beside the devices. So the whole driver, with its store, works on that machine, in an agent
(``agent``): Python's own standard library and libvirt's binding are all that it needs there. It comes
over with each connection, is never written to a disk there, and ends with the connection. Here,
``drivers`` asks it (``link``), in the words of ``hypervisors.api`` (``wire``).

Nothing is weaker for the way between. Before each change the agent waits until it was noted here, in
the journal. An end of ssh, however it comes, is to a store what a kill at that moment would be, and the
next command recovers; that one's agent waits until an earlier one, which may not know yet that it was
left alone, has ended or been heard from.
"""
