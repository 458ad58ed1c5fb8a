"""Networks whose features are scored, with everything about them that changes a score."""
