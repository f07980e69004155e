"""Two farms of one source: the second one's file made from the first one's, and what differs between
them."""
