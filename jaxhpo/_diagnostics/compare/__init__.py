"""`compare`: which method to trust on a problem. What is measured, what follows from it, and how it is shown."""
