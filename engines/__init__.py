"""The runtimes that MIGE's graphs run on, behind one small interface."""
