"""A repository elsewhere: on another host, or as plain files."""
