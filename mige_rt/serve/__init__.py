"""`mige-rt serve`: images over HTTP, made by a step scheduler in a process of its own."""
