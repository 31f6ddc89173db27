"""What `deploy/` has, against the code that it starts."""
