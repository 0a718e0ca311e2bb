"""Many images from a request file: what is finished is known again, on several processes, or on a Ray cluster."""
