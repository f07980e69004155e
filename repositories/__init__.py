"""Package repositories that are transactions: a pool of packages by content, immutable generations of
them, channels that each point to one. Nothing here knows of VMs.

A repository's directory (``repositories.layout``)::

    pool/ab/<sha256>/<file>       each package's file, once, never changed
    generations/7/                an immutable tree of metadata; pool in it leads to ../../pool
    channels/tested               a link to published/tested/7: the pointer, replaced by one rename(2)
    channels/tested.mirrors       the URL of its generation, for clients that pin (derived)
    published/tested/7/           its metadata, and for a grace time those of superseded ones
    dists/tested                  deb only: leads to ../channels/tested/dists/tested
    key.asc, key.gpg              the public keys
    .farmhand/                    ours alone: lock, documents, what was read of each package
"""
