"""rpm packages and repositories."""
