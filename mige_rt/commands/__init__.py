"""The commands of `mige-rt`, by what they are about; heavy imports stay inside them."""
