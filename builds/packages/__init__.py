"""Many source packages: what they want of one another, and the order in which they are built."""
