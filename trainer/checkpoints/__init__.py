"""MIGE's weights in files: the published layout, model folders and bundles, opened, converted and written."""
