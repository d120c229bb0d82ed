"""Scripts that measure this project and its peers, and print a table."""
