"""Experimental flows: packages on their way to a channel."""
