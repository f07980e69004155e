"""The network services of a farm: DHCP, DNS, names, proxies and NAT, all from one model.

``render`` is pure: farm and allocations in, documents out. ``apply`` makes the live files so; ``live``
tells daemons that can be told without a reload; ``verify`` asks them as a client would.
"""
