"""provisional"""
from hypervisors.drivers import DRIVERS
from inventory import kinds

kinds.hosts.update(DRIVERS)
