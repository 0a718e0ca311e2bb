"""The engine people run MIGE on: words and pictures in, a picture out."""
